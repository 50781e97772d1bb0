"""Dense gradients in slices: the mean over the ranks with the same bits for any slices, in one order on all ranks, and updates
of a trainer that are those in which ZeRO reduces by itself."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from parallel import chunk_profile, gradient_slices
from parallel.gradient_slices import GradientSlices, Span
from parallel.peer_memory import within_reach
from parallel.placement import TransportKind
from parallel.schedule.generalised import LINK
from parallel.schedule.pipeline import ATTENTION, BESIDE, COMPUTE, COPIES, GRADIENTS
from parallel.scheduling import ANNOUNCE, FILE, SLICES, WAITING
from parallel.topology import World
from tests.distributed.ranks import run_cases, run_ranks
from tests.distributed.test_trainer import LR, NOISY, own_state
from tests.models import parallel, random_batch, spec, tiny_model
from trainer.batch import Predictions, TokenLoss, TrainBatch, cross_entropy
from trainer.guard import Guard
from trainer.state import MACHINE, TrainerSpec
from trainer.step import Trainer

PLACES = 4


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]  # of parameters
    complete: tuple[int, ...]  # at which place each is, the last parameter first; PLACES: behind them all
    late: int  # a parameter that one rank completes only behind all places
    without: int  # a parameter that has no gradient on one rank
    before: bool  # whether gradients of another micro-batch are there already
    cuts: tuple[tuple[int, ...], ...]  # two lists of parts of what is complete at each place, in percent
    per_node: int
    dtype: torch.dtype
    most_bytes: int  # of a message
    least: int  # numbers that are worth a slice, where nobody plans them


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    sizes = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=7)))
    places = st.lists(st.integers(0, PLACES), min_size=len(sizes), max_size=len(sizes))
    cut = st.lists(st.integers(0, 100), min_size=PLACES, max_size=PLACES).map(tuple)
    one = st.integers(0, len(sizes) - 1)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    cuts = (draw(cut), draw(cut))
    complete = tuple(sorted(draw(places)))
    limit, least = draw(st.sampled_from([4, 64, 2**20])), draw(st.sampled_from([0, 20, 2**20]))
    return Case(
        sizes, complete, draw(one), draw(one), draw(st.booleans()), cuts, draw(st.sampled_from([1, 2, 4])), dtype, limit, least
    )


def gradient(case: Case, parameter: int, rank: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * parameter + micro)
    return torch.randn(case.sizes[parameter], generator=generator).to(case.dtype)


def own_gradient(case: Case, parameter: int, rank: int, size: int) -> Tensor:
    """What is to be averaged, on one rank."""
    if parameter == case.without and rank == size - 1:
        return torch.zeros(case.sizes[parameter], dtype=case.dtype)
    first = gradient(case, parameter, rank, 0)
    return first + gradient(case, parameter, rank, 1) if case.before else first


class Noting(GradientSlices):
    """Keeps the order in which slices set out."""

    order: list[Span]

    def _start(self, span: Span) -> None:
        self.order.append(span)
        super()._start(span)


def averaged(
    world: World, case: Case, bytes_P: tuple[int, ...] | None, rounds: int, kind: TransportKind
) -> tuple[list[Tensor], Any, list[Span]]:
    """The gradients after a backward pass in an order of this rank's own, what is complete at which place, and the slices."""
    gradient_slices.MOST_BYTES = case.most_bytes
    parameters = [nn.Parameter(torch.zeros(size, dtype=case.dtype, device=world.device)) for size in case.sizes]
    slices = Noting(parameters, world, PLACES, kind)
    slices._least = case.least
    for number in range(rounds):
        slices.order = []
        for parameter in parameters:
            parameter.grad = None
        micros = [1, 0] if case.before else [0]
        for micro in micros:
            slices.begin(reduces=micro == 0)
            for place in range(PLACES + 1):
                mine = [index for index in range(len(parameters)) if case.complete[len(parameters) - 1 - index] == place]
                late = number > 0 and world.rank == 0
                mine = [index for index in mine if not (late and index == case.late)]
                if place == PLACES and late:
                    mine.append(case.late)
                for index in mine if world.rank % 2 else reversed(mine):
                    if index != case.without or world.rank < world.size - 1:
                        (parameters[index] * gradient(case, index, world.rank, micro).to(world.device)).sum().backward()
                if place < PLACES:
                    slices.set_out(place)
            slices.finish()
        if bytes_P is not None and number == 0:
            slices.take(bytes_P)
    return [parameter.grad.cpu() for parameter in parameters if parameter.grad is not None], slices.complete_P, slices.order


def legal(case: Case, percent: tuple[int, ...], complete_P: tuple[int, ...]) -> tuple[int, ...]:
    taken: list[int] = []
    for share, complete in zip(percent, complete_P, strict=True):
        taken.append((complete * case.dtype.itemsize - sum(taken)) * share // 100 // case.dtype.itemsize * case.dtype.itemsize)
    return tuple(taken)


def reduce_all(world: World, cases: list[Case]) -> list[list[tuple[list[Tensor], Any, list[Span]]]]:
    found = []
    for case in cases:
        near = replace(world, ranks_per_node=min(case.per_node, world.size))
        first = averaged(near, case, None, 2, "messages")
        rest = [averaged(near, case, legal(case, cut, first[1]), 2, "messages") for cut in case.cuts]
        if near.topology.nodes == 1 and within_reach(near):
            rest += [averaged(near, case, legal(case, case.cuts[0], first[1]), 2, "peer_memory")]
        found.append([first, *rest])
    return found


def check_means(by_rank: list[list[list[tuple[list[Tensor], Any, list[Span]]]]], cases: list[Case], size: int) -> None:
    for number, case in enumerate(cases):
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[case.dtype]
        for parameter in range(len(case.sizes)):
            mean = torch.stack([own_gradient(case, parameter, rank, size).double() for rank in range(size)]).mean(dim=0)
            first = by_rank[0][number][0][0][parameter]
            torch.testing.assert_close(first.double(), mean, rtol=tolerance, atol=tolerance)
            for rank in range(size):
                for gradients, complete_P, _ in by_rank[rank][number]:
                    assert torch.equal(gradients[parameter], first), "the bits depend on the slices or on the rank"
                    assert complete_P == by_rank[0][number][0][1]
        for cut, (_, _, order) in enumerate(by_rank[0][number]):
            assert all(by_rank[rank][number][cut][2] == order for rank in range(size)), "ranks disagree on the slices"
            assert [start for start, _ in order] == [0, *(stop for _, stop in order[:-1])]
            assert order[-1][1] == sum(case.sizes)
            assert all((stop - start) * case.dtype.itemsize <= case.most_bytes for start, stop in order)


@pytest.mark.parametrize("size", [2, 4])
@settings(max_examples=2, deadline=None)
@given(cases=st.lists(drawn_cases(), min_size=2, max_size=10))  # the first of the examples is the smallest
def test_means_have_the_same_bits_for_any_slices_and_slices_one_order(size: int, cases: list[Case]) -> None:
    check_means(run_ranks(reduce_all, size, cases), cases, size)


def places_of(world: World) -> str:
    slices = GradientSlices([nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(6))], world, 2, "messages")
    slices.complete_P = (6, 6)
    slices.take((8, 16))
    assert slices.sums_P == (2, 6)
    with pytest.raises(ValueError, match="1 places of 2") as short:
        slices.take((8,))
    with pytest.raises(ValueError, match=r"place 1 .* 7 numbers have set out; 6 are complete there"):
        slices.take((8, 20))
    line = slices.measure().line
    assert line.alpha_s >= 0 and line.beta_s >= 0
    return str(short.value)


def test_slices_that_are_not_complete_are_refused() -> None:
    assert run_ranks(places_of, 2) == ["bytes for 1 places of 2"] * 2


def told(schedule: str | int, **changes: Any) -> TrainerSpec:
    settings = {"transport": "messages", "schedule": schedule, **changes.pop("parallel")}
    return spec(tiny_model(**changes.pop("model", {})), parallel=parallel(**settings), **changes)


UPDATES: list[dict[str, Any]] = [
    {"micro_rows": 2, "freeze_router": True, "recompute": True, "parallel": {"zero_stage": 1, "rematerialise": True}},
    {"micro_rows": 2, "parallel": {"zero_stage": 2}, "model": {"tie_embeddings": False, "router": NOISY.router}},
    {"micro_rows": 2, "dtype": "bfloat16", "value_decay": 0.5, "parallel": {"zero_stage": 2}},
    {"micro_rows": 4, "dtype": "bfloat16", "parallel": {"zero_stage": 1}},
    {"micro_rows": 2, "parallel": {"zero_stage": 2, "transport": "peer_memory"}},
]


def objective(predicted: Predictions, batch: TrainBatch) -> TokenLoss:
    """Cross entropy; what a value head is to learn beside it."""
    found = cross_entropy(predicted, batch)
    return found if predicted.values_BS is None else replace(found, returns_BS=found.loss_BS.detach())


def updates(world: World, changes: dict[str, Any], schedule: str | int) -> dict[str, Any]:
    """Two updates, one of NaN that is skipped, and one more; slices take what is complete, a third of it, and nothing."""
    guard = Guard(skip_nonfinite=5, spike_zscore=None, spike_window=2, on_spike="stop")
    trainer = Trainer(told(schedule, guard=guard, **copy.deepcopy(changes)), world)
    norms = []
    for step in range(4):
        batch = random_batch(step)
        share = batch.num_rows // world.size
        own = batch.rows(world.rank * share, (world.rank + 1) * share)
        if step == 2:
            own = replace(own, weights_BS=torch.full_like(own.weights_BS, torch.nan))
        norms.append(trainer.learn(own, objective, LR).get("train/grad_norm"))
        slices = trainer.dense.slices
        if slices is not None and slices.complete_P is not None and step in (1, 2):
            places, itemsize = len(slices.complete_P), slices.itemsize
            third = slices.complete_P[places - 1] // 3 * itemsize
            slices.take([0] * (places - 1) + [third if step == 1 else 0])
    complete_P = None if slices is None else slices.complete_P
    return {"norms": norms, "complete": complete_P, "state": own_state(trainer, with_moments=True)}


def both(world: World) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Where ranks read each other's memory layers are whole."""
    chunks = [1 if changes["parallel"].get("transport") == "peer_memory" else 2 for changes in UPDATES]
    return [
        (updates(world, changes, "off"), updates(world, changes, degree))
        for changes, degree in zip(UPDATES, chunks, strict=True)
    ]


def test_two_ranks_update_bit_for_bit_as_where_zero_reduces() -> None:
    for by_rank in run_ranks(both, 2):
        for changes, (zero, slices) in zip(UPDATES, by_rank, strict=True):
            assert zero["complete"] is None
            assert 0 < slices["complete"][0] < slices["complete"][-1], "gradients are complete under the backward pass"
            assert zero["norms"] == slices["norms"] and zero["norms"][2] is None, changes
            for name, wanted in zero["state"].items():
                if name != MACHINE:  # measured
                    assert torch.equal(slices["state"][name], wanted), f"{name} of {changes}"


def planned(world: World, schedule: str, folder: str, recompute: bool = False) -> dict[str, Any]:
    chunk_profile.BUDGET_S = 0.1
    told_auto = told(schedule, micro_rows=4, recompute=recompute, parallel={"overlap": 4, "memory": 4})
    trainer = Trainer(told_auto, world, Path(folder) / "refused")
    norms = []
    for step in range(10):
        batch = random_batch(step)
        share = batch.num_rows // world.size
        norms.append(trainer.learn(batch.rows(world.rank * share, (world.rank + 1) * share), objective, LR)["train/grad_norm"])
    slices = trainer.dense.slices
    state = own_state(trainer, with_moments=True)
    return {"norms": norms, "sums": None if slices is None else slices.sums_P, "state": state}


@pytest.mark.parametrize("recompute", [False, True])
def test_planned_slices_change_no_bit_and_stand_in_the_timeline_with_copies(tmp_path: Path, recompute: bool) -> None:
    cases = [("off", str(tmp_path)), ("auto", str(tmp_path), recompute)]
    whole, by_rank = run_cases(planned, 2, cases)
    assert by_rank[0]["sums"] == by_rank[1]["sums"] is not None
    for zero, sliced in zip(whole, by_rank, strict=True):
        assert zero["norms"] == sliced["norms"]
        assert all(torch.equal(sliced["state"][name], one) for name, one in zero["state"].items() if name != MACHINE)
    record = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert record["reduce"]["line"]["beta_s"] >= 0 and len(record["slices"]) == len(by_rank[0]["sums"])
    lanes = {
        name: {(span["task"]["name"].split()[0], span["task"]["resource"]) for span in spans}
        for name, spans in record["timelines"].items()
    }
    assert (COPIES, LINK) in lanes["forward, planned"] and (COPIES, LINK) in lanes["backward, planned"]
    assert (COPIES, WAITING) in lanes["forward, measured"] and (ATTENTION, COMPUTE) in lanes["forward, measured"]
    first = record["timelines"]["forward, measured"]
    assert [span["task"]["name"] for span in first[:4]] == [ATTENTION, ANNOUNCE, "pack", COPIES]
    seen = {name: {word for word, _ in lanes[f"{name}, measured"]} for name in ("forward", "backward")}
    assert seen["forward"] >= {"experts", "combine", "collect"} and seen["backward"] >= {"dispatch", "experts", "weights"}
    assert BESIDE in seen["backward"] or not recompute, "the layer again, while gradients of its results travel"
    if record["slices"][-2]:
        assert (GRADIENTS, LINK) in lanes["backward, planned"] and (GRADIENTS, SLICES) in lanes["backward, measured"]
