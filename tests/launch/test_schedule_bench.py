"""The table of schedules shows what the file holds, ours is never behind, and the grid is the paper's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from launch.bench import main
from launch.benchmarks.chunks import AroundName, Found, Schedule, Side, Stack, Told, measure_layers
from launch.benchmarks.experts import draw_inputs, draw_matrices
from launch.benchmarks.options import SHAPES
from launch.benchmarks.planned import FIXED, MODELS, TESTBEDS, ScheduleCase, grid, one_link_tasks
from launch.benchmarks.ranks import on_ranks
from launch.benchmarks.schedule import against_bound, table
from parallel.placement import TransportKind
from parallel.schedule.cost import Chunk, Line
from parallel.schedule.pipeline import ACROSS, COMPUTE, OFF, WHOLE, Degrees, layer_tasks
from parallel.schedule.timeline import simulate
from parallel.topology import World
from tests.parallel.schedule.chunks import esp_chunks

SMALL = [
    "schedule",
    "ranks=0",
    "every=60",
    "testbed=a,a_printed,b",
    "model=tiny",
    "devices=16",
    "tokens=256",
    "layers=3",
    "memory=1",
]


def test_the_table_shows_what_the_file_holds_and_ours_is_never_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "schedule.json"
    assert main([*SMALL, f"out={out}"]) == 0
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line.startswith("│")]
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 3 + 2 * len(MODELS) - 2 + 1
    wanted = [(system, one) for case in cases for system, one in case["compared"].items()]
    for (system, one), line in zip(wanted, lines, strict=True):
        assert line[0] == system and line[1] == f"{one['geometric_mean']:.3f}x" and line[-1] == f"{1e3 * one['total_s']:,.1f}"
        assert one["geometric_mean"] >= 1 - 1e-9 and one["worst"] >= one["geometric_mean"] * (1 - 1e-9)
    for case in cases[:3]:
        assert {f"degree {degree}" for degree in FIXED} | {"in sequence", "one link", "plan"} < set(case["compared"])
        assert case["compared"]["plan"]["as_good"] == 1.0 and case["compared"]["in sequence"]["geometric_mean"] > 1.05
        assert "of the layers (the paper: 912 of 1458" in case["notes"][0] and "experts 1.000" in case["notes"][1]
    assert "planned in" in cases[-1]["notes"][0]


def same_numbers(world: World, told: Told) -> list[float]:
    """How far gradients of dense parameters are from those of `off`, by schedule and transport; they are far from nothing."""
    matrices = draw_matrices(told.shape, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + world.rank)
    stack = Stack(told, world, torch.float32, draw_inputs(told.shape, told.tokens, "even", generator, matrices))
    experts = tuple(tensor.detach() for tensor in matrices.values())
    kinds: list[TransportKind] = ["messages", "peer_memory"]
    sides = {kind: Side(stack, kind, experts) for kind in kinds}

    def gradients(kind: TransportKind, schedule: Schedule) -> Tensor:
        sides[kind].run("gradients", schedule)
        return torch.cat([parameter.grad.flatten() for parameter in stack.dense.parameters() if parameter.grad is not None])

    layers = told.layers
    wanted = gradients("messages", Schedule([OFF] * layers))
    assert wanted.abs().max() > 0.1 and wanted.numel() == sides["messages"].slices.total
    assert torch.equal(world.sum(wanted.clone()), world.size * wanted), "ranks have the same mean"
    at_once, in_place_at_once = (gradients(kind, Schedule([WHOLE] * layers, ())) for kind in kinds)
    known = sides["messages"].slices.gradients(Line(0.0, 1.0))
    in_slices = gradients("messages", Schedule([Degrees(3, 2)] * layers, known.when_complete_P))
    in_place = gradients("peer_memory", Schedule([WHOLE] * layers, known.when_complete_P))
    behind = gradients("peer_memory", Schedule([WHOLE] * layers))
    assert sum(known.when_complete_P) == 2 * wanted.numel() * wanted.itemsize // 3, "all but the first layer's"
    assert torch.equal(at_once, in_slices) and torch.equal(in_place_at_once, in_place), "no bit depends on the slices"
    assert torch.equal(in_place, behind), "two numbers have one sum"
    return [float((found - wanted).abs().max() / wanted.abs().max()) for found in (at_once, behind)]


def both(world: World, told: Told, cases: None) -> tuple[dict[AroundName, Found], list[float]]:
    return measure_layers(world, told, cases), same_numbers(world, told)


def test_layers_on_real_ranks_beside_their_prediction() -> None:
    """And every schedule averages the same gradients."""
    told = Told(SHAPES["tiny"], 64, 32, layers=3, degrees=(1, 3), around=get_args(AroundName), seed=0, repeats=2)
    by_around, differences = on_ranks(both, 2, told, None, "cpu")
    assert max(differences) < 1e-5
    assert list(by_around) == list(get_args(AroundName))
    for around, found in by_around.items():
        sliced = around == "gradients"
        in_place = ["peer memory, gradients behind", "peer memory, whole"] if sliced else ["peer memory, whole"]
        assert list(found.predicted_ms) == [*in_place, "off", "degree 1", "degree 3", "plan"]
        assert list(found.measured_ms) == list(found.predicted_ms), "what training takes here comes first"
        assert set(found.alone_ms) == {"computing", "communication"} and found.ours == "plan"
        assert min([*found.measured_ms.values(), *found.predicted_ms.values(), *found.alone_ms.values()]) > 0
        assert found.bound_ms == max(found.alone_ms.values()) <= found.least_ms * (1 + 1e-9)
        assert (found.unshared_ms == 0) == (around == "nothing")
        assert set(found.planned) == {"plan"} and ("of the gradients under" in found.planned["plan"]) == sliced
        assert found.profiles[0].count("r^2") == 6 and "exchange" in found.profiles[0]
    assert by_around["nothing"].predicted_ms["off"] < by_around["attention"].predicted_ms["off"]
    assert by_around["attention"].predicted_ms["off"] <= by_around["gradients"].predicted_ms["off"]
    case = ScheduleCase("layers", {}, against_bound(found), {}, [])
    cells = [list(column.cells) for column in table(case).columns]
    assert cells[0] == [*list(found.measured_ms)[:-1], "computing alone", "communication alone", "plan"]
    for name, bound, predicted in zip(cells[0], cells[2], cells[3], strict=True):
        ms = {**found.measured_ms, **{f"{one} alone": ms for one, ms in found.alone_ms.items()}}[str(name)]
        assert bound == f"{ms / found.bound_ms:.2f}x"
        assert predicted == (f"{found.predicted_ms[str(name)] / ms:.2f}x" if name in found.predicted_ms else "")


@pytest.mark.parametrize("name", TESTBEDS)
def test_the_grid_is_the_papers_without_heads(name: str) -> None:
    found = list(grid(TESTBEDS[name]))
    assert 3 * len(found) == 1458
    least = min(work.gather for work, _ in found)
    assert least == 2 * 1.0 * min(TESTBEDS[name].lengths) * 1024


def test_what_is_probably_misprinted_is_corrected_in_one_testbed_only() -> None:
    a, printed = TESTBEDS["a"].costs, TESTBEDS["a_printed"].costs
    assert printed.gather.beta_s == pytest.approx(10 * a.gather.beta_s)
    assert printed.reduce.beta_s == pytest.approx(10 * a.reduce.beta_s)
    assert (a.exchange, a.scatter, a.product) == (printed.exchange, printed.scatter, printed.product)


@given(esp_chunks, st.integers(1, 16), st.integers(0, 100).map(float))
def test_on_one_link_messages_wait_for_each_other(chunk: Chunk, degree: int, gradients_s: float) -> None:
    tasks = one_link_tasks(chunk, degree, gradients_s)
    timeline, both = simulate(tasks), simulate(layer_tasks(chunk, degree, gradients_s))
    assert sorted(task.name for task in tasks) == sorted(span.task.name for span in both.spans)
    messages_s = degree * (2 * chunk.across_s + chunk.gather_s + chunk.scatter_s) + gradients_s
    assert timeline.busy_s(ACROSS) == messages_s and {task.resource for task in tasks} <= {ACROSS, COMPUTE}
    assert messages_s <= timeline.seconds <= messages_s + degree * chunk.expert_s
    if degree == 1 and gradients_s == 0:
        assert timeline.seconds == both.seconds


def test_an_unknown_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "machine=h300"]) == 2
    assert "is not in conf/machine; there are a100, h100, h200, v100" in capsys.readouterr().err
