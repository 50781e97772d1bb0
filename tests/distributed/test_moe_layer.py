"""Experts spread over ranks, with any owners and any copies, compute what experts on one device compute: outputs, every
gradient and three updates.

Every rank gives losses of its own; the sum of all is what one device differentiates. Cases include layers that a rank owns
nothing of, copies everywhere and nowhere, other copies behind the gate, shares from zero to one, ranks without tokens, experts
without tokens, all tokens on the same experts, several nodes, rematerialised copies, recomputed activations, several
micro-batches, and evaluation in between.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.host_device import to_host
from kernels.router import Routing, route
from kernels.squares import squares
from parallel.adamw import AdamWSettings, adamw, set_lr
from parallel.expert_arena import ExpertArena, ExpertShape
from parallel.expert_shards import ExpertShards
from parallel.moe_layer import LocalExperts, Recomputation, ShardedExperts
from parallel.offload import expert_optimizer
from parallel.peer_exchange import PeerExchange, PeerTokens
from parallel.peer_memory import PeerMemory
from parallel.placement import Floats, Ints, Placement, TransportKind
from parallel.schedule.pipeline import OFF, WHOLE, Degrees
from parallel.token_exchange import _tell_counts
from parallel.topology import World
from parallel.ways import Leg
from tests.distributed.ranks import run_ranks
from trainer.model.recompute import recomputed

pytestmark = pytest.mark.cpu_adam

SHAPE = ExpertShape(layers=3, experts=8, hidden=8, expert_hidden=6)
K, MICRO_BATCHES, STEPS, LR = 3, 2, 2, 1e-2
STAYING = (0, 2)  # layers
CASES = 8
# A large eps: at 1e-8 AdamW divides rounding noise by rounding noise where a gradient is nearly zero.
ADAMW = AdamWSettings(betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1, clip_norm=1.0)


def seeds_of(size: int) -> Sequence[int]:
    """Of the cases; many ranks have those that differ most, with all that a case may have at least once."""
    return range(CASES) if size < 8 else (0, 2, 4, 5)


@dataclass(frozen=True)
class Case:
    x: list[list[list[Tensor]]]  # for each step, micro-batch and rank: (T, D)
    logits: list[list[list[Tensor]]]  # for each step, micro-batch and rank: (L, T, E)
    owner_LE: Ints
    copies_LED: list[list[np.ndarray[Any, Any]]]  # for each step and layer
    shares: list[list[list[Floats]]]  # for each step, layer and rank: (E, D)
    ranks_per_node: int
    stays: bool  # every rank has copies of all and serves its own tokens, but for those of layer 1
    calibrated: bool  # the gate of each micro-batch finds the copies and shares of the next step better; and that tokens stay
    rematerialise: bool
    recompute: bool


def case(seed: int, size: int) -> Case:
    torch_random = torch.Generator().manual_seed(seed)
    random = np.random.default_rng(seed)
    layers, experts = SHAPE.layers, SHAPE.experts

    def tokens() -> list[int]:
        counts = random.integers(0, 12, size)
        if seed % 3 == 0:
            counts[seed % size] = 0
        return counts.tolist()

    def logits(count: int) -> Tensor:
        if seed % 4 == 1:  # all tokens want the same experts
            return torch.zeros(layers, count, experts).index_fill(2, torch.tensor([1, 3, 6]), 9.0)
        return torch.randn(layers, count, experts, generator=torch_random) * 2

    counts = [[tokens() for _ in range(MICRO_BATCHES)] for _ in range(STEPS)]
    owner_LE = random.permutation(np.repeat(np.arange(size), layers * experts // size)).reshape(layers, experts)
    copies, shares, stays = [], [], seed % 3 == 2
    for _ in range(STEPS):
        copies.append([random_copies(random, owner_E, size, density=seed % 3 / 2) for owner_E in owner_LE])
        shares.append([[random_shares(random, copies_ED) for _ in range(size)] for copies_ED in copies[-1]])
        for layer in STAYING if stays else ():
            shares[-1][layer] = [np.eye(size)[[rank] * experts] for rank in range(size)]
    return Case(
        x=[[[torch.randn(t, SHAPE.hidden, generator=torch_random) for t in micro] for micro in step] for step in counts],
        logits=[[[logits(t) for t in micro] for micro in step] for step in counts],
        owner_LE=owner_LE,
        copies_LED=copies,
        shares=shares,
        ranks_per_node=int(random.choice([n for n in (1, 2, 4, 8) if size % n == 0])),
        stays=stays,
        calibrated=seed % 3 == 1 or seed % 6 == 5,
        rematerialise=seed % 2 == 0 and not stays,
        recompute=seed % 4 > 1,
    )


def random_copies(random: np.random.Generator, owner_E: Ints, size: int, density: float) -> np.ndarray[Any, Any]:
    copies_ED = random.random((len(owner_E), size)) < density
    copies_ED[np.arange(len(owner_E)), owner_E] = True
    return copies_ED


def random_shares(random: np.random.Generator, copies_ED: np.ndarray[Any, Any]) -> Floats:
    """Some copies get nothing; rows sum to one."""
    weights_ED = copies_ED * random.random(copies_ED.shape) * (random.random(copies_ED.shape) < 0.7)
    weights_ED += copies_ED * 1e-9
    return weights_ED / weights_ED.sum(axis=1, keepdims=True)


def initial(layer: int, expert: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * layer + expert)
    size, hidden = SHAPE.hidden, SHAPE.expert_hidden
    # of a size that keeps values near one, where rounding says little
    return torch.randn(2 * hidden, size, generator=generator) * 0.4, torch.randn(size, hidden, generator=generator) * 0.4


def routed(logits_TE: Tensor) -> Routing:
    """Of tokens whose first logit is large, choices are absent."""
    routing = route(logits_TE, top_k=K, scores="softmax", renormalize=True, scale=1.0, bias_E=None, valid_T=None)
    experts_TK = torch.where((logits_TE[:, :1] > 2) & (routing.experts_TK % 3 > 0), -1, routing.experts_TK)
    return replace(routing, experts_TK=experts_TK, num_entries=int((experts_TK >= 0).sum()))


def forward(x_TD: Tensor, logits_LTE: Tensor, layers: Sequence[LocalExperts | ShardedExperts], recompute: bool) -> Tensor:
    def block(
        x_TD: Tensor, logits_TE: Tensor, experts: LocalExperts | ShardedExperts, recomputation: Recomputation | None = None
    ) -> Tensor:
        experts.prepare()
        hidden_TD = x_TD.tanh()  # where attention would be
        return x_TD + experts.start(hidden_TD, routed(logits_TE), recomputation)()

    for logits_TE, experts in zip(logits_LTE, layers, strict=True):
        x_TD = recomputed(block, x_TD, logits_TE, experts) if recompute else block(x_TD, logits_TE, experts)
    return x_TD


def calibrating(told: Case, step: int, arena: ExpertArena) -> Callable[[int, Tensor], None] | None:
    def calibrate(layer: int, counts_E: Tensor) -> None:
        placement = Placement(told.owner_LE[layer], told.copies_LED[(step + 1) % STEPS][layer])
        shares_ED = told.shares[(step + 1) % STEPS][layer][arena.world.rank]
        arena.replace(layer, placement, shares_ED, stays=told.stays and layer in STAYING)
        moved = arena._moved_bytes
        arena.materialised(layer)
        assert arena._moved_bytes == moved, "copies that are here were fetched again"

    return calibrate if told.calibrated else None


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def spread(
    world: World, seeds: Sequence[int], offload: str, kind: TransportKind, degrees: Sequence[Degrees] = (WHOLE,)
) -> list[dict[str, Any]]:
    """Layers have these degrees in turns."""
    return [spread_case(world, case(seed, world.size), offload, kind, degrees) for seed in seeds]


@contextmanager
def no_new_memory_of_peers() -> Iterator[None]:
    """All ranks make it together, which must not be in a backward pass: slices of dense gradients may wait for peers there."""
    with patch.object(PeerMemory, "__init__", side_effect=AssertionError("a backward pass makes memory of peers")):
        yield


def spread_case(world: World, told: Case, offload: str, kind: TransportKind, degrees: Sequence[Degrees]) -> dict[str, Any]:
    world = replace(world, ranks_per_node=told.ranks_per_node)
    copies = SHAPE.layers * SHAPE.experts
    owned = told.owner_LE.size // world.size
    optimizer = expert_optimizer(offload, Path(tempfile.gettempdir()), owned, SHAPE.parts, ADAMW, world.device)
    shards = ExpertShards(SHAPE, initial, told.owner_LE, copies, world, torch.float32, optimizer, kind)
    found: dict[str, Any] = {"tokens": [], "norms": []}
    for step in range(STEPS):
        placements = [Placement(*pair) for pair in zip(told.owner_LE, told.copies_LED[step], strict=True)]
        shares_LED = [by_rank[world.rank] for by_rank in told.shares[step]]
        stays_L = [told.stays and not told.calibrated and layer in STAYING for layer in range(SHAPE.layers)]
        shards.arena.place(placements, shares_LED, stays_L, rematerialise=told.rematerialise)
        layers = [
            ShardedExperts(layer, shards.arena, calibrating(told, step, shards.arena), degrees[layer % len(degrees)])
            for layer in range(SHAPE.layers)
        ]
        for micro in range(MICRO_BATCHES):
            x, logits = (leaf(part[step][micro][world.rank].to(world.device)) for part in (told.x, told.logits))
            y = forward(x, logits, layers, told.recompute)
            with shards.arena.backward_pass(), no_new_memory_of_peers():
                (y.cos().sum() * world.size).backward()
            assert x.grad is not None and logits.grad is not None, "a tensor got no gradient at all; it should get zeros"
            with torch.no_grad():
                again = forward(x, logits, layers, recompute=False)
            torch.testing.assert_close(again, y)
            found["tokens"].append((y.detach(), x.grad / world.size, logits.grad / world.size))
        found["norms"].append(shards.squared_norm().item())
        if step == 0:
            gradients = shards.optimizer.gradients()
            assert gradients is not None
            found["gradients"] = {own: [g[row] / world.size for g in gradients] for row, own in enumerate(shards.own)}
        shards.step(LR, scale=0.5)
    found["state"] = {name: tensor.clone() for name, tensor in shards.named_state(with_moments=True)}
    return found


@cache
def spread_whole(size: int, offload: str, kind: TransportKind) -> list[dict[int, dict[str, Any]]]:
    """What each rank found in each case, exchanges in one piece; two tests compare with it."""
    seeds = seeds_of(size)
    return [dict(zip(seeds, found, strict=True)) for found in run_ranks(spread, size, seeds, offload, kind)]


@cache
def one_device(seed: int, size: int) -> dict[str, Any]:
    """The same without ranks: tokens of all ranks one after the other, all experts here."""
    told = case(seed, size)
    names = [(layer, expert) for layer in range(SHAPE.layers) for expert in range(SHAPE.experts)]
    weights = {name: [leaf(part) for part in initial(*name)] for name in names}
    parameters = [part for name in names for part in weights[name]]
    optimizer = adamw(parameters, ADAMW)
    set_lr(optimizer, LR)
    found: dict[str, Any] = {"tokens": [], "norms": []}
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            x, logits = leaf(torch.cat(told.x[step][micro])), leaf(torch.cat(told.logits[step][micro], dim=1))
            stacked = [
                [torch.stack([weights[layer, e][part] for e in range(SHAPE.experts)]) for part in range(2)]
                for layer in range(SHAPE.layers)
            ]
            y = forward(x, logits, [LocalExperts(*parts) for parts in stacked], recompute=False)
            y.cos().sum().backward()
            found["tokens"].append((y.detach(), x.grad, logits.grad))
        gradients = [part.grad for part in parameters if part.grad is not None]
        found["norms"].append(sum(gradient.double().square().sum().item() for gradient in gradients))
        if step == 0:
            found["gradients"] = {
                name: [part.grad.clone() for part in weights[name] if part.grad is not None] for name in names
            }
        for gradient in gradients:
            gradient.mul_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    found["weights"] = {name: [part.detach() for part in weights[name]] for name in names}
    return found


def equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit: outputs, gradients of tokens and logits, of weights by what two updates make of them."""
    assert one["norms"] == other["norms"]
    for here, there in zip(one["tokens"], other["tokens"], strict=True):
        assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))
    for name, tensor in other["state"].items():
        assert torch.equal(one["state"][name], tensor), name


DEGREES = (
    [OFF, Degrees(2, 1), Degrees(1, 3)],
    [Degrees(3, 5), OFF, Degrees(16, 16)],
    [Degrees(4, 4), Degrees(7, 2), OFF],
)


def degrees_of(seed: int, size: int) -> Sequence[list[Degrees]]:
    """All of them where seeds differ most, in their first four, on as few ranks as can be; else one in turns."""
    return DEGREES if seed < 4 and size == 2 else [DEGREES[seed % len(DEGREES)]]


def spread_in_chunks(world: World, kind: TransportKind) -> list[tuple[int, dict[str, Any]]]:
    return [
        (seed, spread_case(world, case(seed, world.size), "none", kind, degrees))
        for seed in seeds_of(world.size)
        for degrees in degrees_of(seed, world.size)
    ]


@pytest.mark.parametrize(
    ("size", "kind"), [(2, "messages"), (4, "messages"), (8, "messages"), (4, "two_level"), (8, "two_level")]
)
def test_no_number_depends_on_the_degrees(size: int, kind: TransportKind) -> None:
    """Chunks without tokens among them: ranks have from 0 to 11."""
    for whole, cut in zip(spread_whole(size, "none", kind), run_ranks(spread_in_chunks, size, kind), strict=True):
        for seed, found in cut:
            equal(found, whole[seed])


def ways_of_rows(world: World, kind: TransportKind) -> list[tuple[int, int, int]]:
    """How often rows set out, results return, and the host waits to know of how many, with activations that are kept and with
    those that are computed again."""
    found = []
    told = replace(case(0, world.size), calibrated=False)
    for recompute in (False, True):
        with (
            patch.object(Leg, "send", autospec=True, side_effect=Leg.send) as sent,
            patch.object(Leg, "give_back", autospec=True, side_effect=Leg.give_back) as back,
            patch.object(PeerTokens, "dispatch", autospec=True, side_effect=PeerTokens.dispatch) as read,
            patch.object(PeerExchange, "summed", autospec=True, side_effect=PeerExchange.summed) as summed,
            patch("parallel.token_exchange._tell_counts", side_effect=_tell_counts) as counted,
            patch("parallel.peer_exchange.to_host", side_effect=to_host) as waited,
        ):
            spread_case(world, replace(told, recompute=recompute), "none", kind, [Degrees(2, 1)])
        waits = counted.call_count + waited.call_count
        found.append((sent.call_count + read.call_count, back.call_count + summed.call_count, waits))
    return found


@pytest.mark.parametrize("kind", ["messages", "two_level", "peer_memory"])
def test_computed_again_rows_travel_their_results_stay_and_nobody_waits_for_sizes(kind: TransportKind) -> None:
    for (sent, back, waits), (sent_again, back_again, waits_again) in run_ranks(ways_of_rows, 4, kind):
        assert sent_again > sent > 0 and back_again == back > 0
        # Where ranks read each other's memory, a first exchange may find too little room.
        assert waits_again == waits if kind != "peer_memory" else 0 < waits_again <= waits + SHAPE.layers


def close(found: Tensor, expected: Tensor, where: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{where}: {text}")


@pytest.mark.parametrize(
    ("size", "offload", "kind"),
    [
        (1, "none", "messages"),
        (2, "none", "messages"),
        (4, "none", "messages"),
        (8, "none", "messages"),
        (1, "cpu", "messages"),
        (2, "cpu", "messages"),
        (4, "none", "two_level"),
        (8, "none", "two_level"),
        (2, "none", "peer_memory"),
        (4, "none", "peer_memory"),
        (8, "cpu", "peer_memory"),
        pytest.param(2, "nvme", "messages", marks=pytest.mark.aio),
    ],
)
def test_sharded_experts_equal_experts_on_one_device(size: int, offload: str, kind: TransportKind) -> None:
    by_rank = spread_whole(size, offload, kind)
    for seed in seeds_of(size):
        results, expected = [rank[seed] for rank in by_rank], one_device(seed, size)
        for micro, wanted in enumerate(expected["tokens"]):
            for index, name in enumerate(["output", "gradient of tokens", "gradient of logits"]):
                parts = [result["tokens"][micro][index] for result in results]
                close(torch.cat(parts, dim=1 if index == 2 else 0), wanted[index], f"case {seed}, micro-batch {micro}, {name}")
        for result in results:
            assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        gradient_of = {name: parts for result in results for name, parts in result["gradients"].items()}
        norms = [sum(squares(part[None]) for part in gradient_of[name]) for name in sorted(gradient_of)]
        in_order = torch.stack(norms).view(SHAPE.layers, SHAPE.experts).sum().item()
        assert all(result["norms"][0] == in_order for result in results), "bits depend on owners"
        owned = [name for result in results for name in result["gradients"]]
        assert sorted(owned) == sorted(expected["gradients"]), "each expert has one owner"
        for result in results:
            for (layer, expert), gradients in result["gradients"].items():
                for index, part in enumerate(("gate_up", "down")):
                    where = f"case {seed}, expert {expert} of layer {layer}, {part}"
                    close(gradients[index], expected["gradients"][layer, expert][index], f"{where}, gradient")
                    state = result["state"][f"experts.{layer}.{expert}.{part}"]
                    close(state, expected["weights"][layer, expert][index], f"{where} after {STEPS} updates")
