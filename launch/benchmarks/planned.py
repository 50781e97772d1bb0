"""Schedules of MoE layers, predicted: ours against none, against fixed degrees and against FSMoE's closed form.

Layers and link models are those of the paper (FSMoE, arXiv 2501.10714, sections 4 and 6). Of its 1,458 configurations 486
differ here: the number of heads changes no time in this model. Times are those of a forward and a backward pass, with an
all-reduce of the dense layers' gradients:

    in sequence         one thing after the other, whole
    degree r            r chunks forward and backward; links within and between nodes and the device work at the same time, and
                        gradients go between dispatches and combines, as in all that follow
    one link            the best degrees if messages within and between nodes wait for each other
    closed form         degrees that the paper's four cases choose from 1 to 16
    closed form, coded  those that its code chooses: 1, 2, 4 or 8, and 1 if the exchange takes less than a millisecond
    plan                the best of 1 to 16, forward and backward apart, each simulated

Testbeds: fits of the paper. Two slopes of A are ten times those of like operations (gather against scatter, all-reduce against
all-to-all; on B they are alike), probably misprints: `a` divides them by ten, `a_printed` takes them as they are.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean
from typing import Literal

import numpy as np

from launch.benchmarks.options import ModelName, Shape
from launch.benchmarks.placement import costs_of, owners
from launch.benchmarks.traces import draw
from launch.machines import BYTES, MachineName, read_machine, topology_of
from parallel.layer_cost import Setting, hidden_copies
from parallel.placement import Budget
from parallel.policies import by_cost
from parallel.schedule.closed_form import case_of, closed_form_degree, coded_degree
from parallel.schedule.cost import Chunk, EspCosts, EspWorkload, Line, esp_chunk, esp_workload, sharded_chunk, sharded_workload
from parallel.schedule.gradients import Slot, dense_slot, free_bytes, when_complete
from parallel.schedule.pipeline import ACROSS, MOST_CHUNKS, WITHIN, best, every_degree, layer_tasks
from parallel.schedule.plan import Block, plan
from parallel.schedule.timeline import Task, simulate

TestbedName = Literal["a", "a_printed", "b"]
FIXED = (1, 2, 4, 8)
DEGREES = range(1, MOST_CHUNKS + 1)


@dataclass(frozen=True)
class Testbed:
    """One testbed of the paper: its fits, and the lengths of its grid."""

    costs: EspCosts
    devices_per_node: int  # an expert, and the dense layers, are cut over this many
    lengths: tuple[int, ...]


def _milliseconds(alpha: float, beta: float) -> Line:
    return Line(alpha * 1e-3, beta * 1e-3)


_A = (_milliseconds(2.87e-1, 2.21e-7), _milliseconds(3.95e-1, 2.34e-7), _milliseconds(4.26e-2, 2.29e-11))
TESTBEDS: Mapping[TestbedName, Testbed] = {
    "a": Testbed(
        EspCosts(_A[0], _milliseconds(3.37e-1, 2.32e-7), _A[1], _milliseconds(5.11e-1, 4.95e-7), _A[2]), 8, (512, 1024, 2048)
    ),
    "a_printed": Testbed(
        EspCosts(_A[0], _milliseconds(3.37e-1, 2.32e-6), _A[1], _milliseconds(5.11e-1, 4.95e-6), _A[2]), 8, (512, 1024, 2048)
    ),
    "b": Testbed(
        EspCosts(
            _milliseconds(1.75e-1, 3.06e-7),
            _milliseconds(3.20e-2, 1.68e-7),
            _milliseconds(3.91e-2, 1.67e-7),
            _milliseconds(8.37e-2, 5.99e-7),
            _milliseconds(9.24e-2, 4.42e-11),
        ),
        4,
        (256, 512, 1024),
    ),
}


@dataclass(frozen=True)
class Compared:
    """One way to schedule, against ours."""

    geometric_mean: float  # of its time over ours
    worst: float  # the largest such ratio
    as_good: float  # share of the layers in which it is at most 0.1 % slower
    total_s: float  # over all layers
    over_bound: float | None = None  # where it was measured: its time over that of computing alone or communication alone
    predicted: float | None = None  # and what was predicted, over it


@dataclass(frozen=True)
class ScheduleCase:
    work: str
    sizes: Mapping[str, int | str]
    compared: dict[str, Compared]
    failures: Mapping[str, str]
    notes: Sequence[str]


# ---------------------------------------------------------------- one layer, the paper's grid


def grid(testbed: Testbed) -> Iterator[tuple[EspWorkload, float]]:
    """(what a layer sends and computes, how many gradients its dense layers have on a device)."""
    hiddens, wider, capacities = (1024, 2048, 4096), (2, 3, 4), (1.2, 2.4, 1.0)  # the last: no capacity, here an even load
    for rows, length, hidden, ratio, capacity, (products, squares) in itertools.product(
        (1, 2, 4), testbed.lengths, hiddens, wider, capacities, ((2, 4.0), (3, 2.5))
    ):
        work = esp_workload(rows * length, hidden, ratio * hidden, 2, capacity, testbed.devices_per_node, products)
        yield work, squares * hidden**2 / testbed.devices_per_node


def grid_case(name: str, testbed: Testbed, every: int) -> ScheduleCase:
    times: dict[str, list[float]] = {}
    degrees: list[tuple[int, int]] = []
    expected: dict[str, list[float]] = {}
    planning_s = 0.0
    for work, gradients in itertools.islice(grid(testbed), 0, None, every):
        slices = (0.0, testbed.costs.reduce.seconds(gradients))
        ways = [partial(esp_chunk, testbed.costs, work, backward=backward) for backward in (False, True)]
        started = time.perf_counter()
        options = [every_degree(chunk_of) for chunk_of in ways]
        found = [best(one, slice_s) for one, slice_s in zip(options, slices, strict=True)]
        planning_s += time.perf_counter() - started
        degrees.append((found[0].degree, found[1].degree))
        for system, seconds in _systems(ways, slices).items():
            times.setdefault(system, []).append(seconds)
        times.setdefault("plan", []).append(sum(one.seconds(slice_s) for one, slice_s in zip(found, slices, strict=True)))
        for chunk_of, one, slice_s in zip(ways, options, slices, strict=True):
            for cut in one:
                case, seconds = case_of(chunk_of(cut.degree), cut.degree, slice_s)
                expected.setdefault(case, []).append(seconds / cut.seconds(slice_s))
    apart = sum(forward != backward for forward, backward in degrees)
    common = ", ".join(f"{forward} and {backward} ({count})" for (forward, backward), count in Counter(degrees).most_common(5))
    notes = [
        f"degrees differ forward and backward in {apart / len(degrees):.1%} of the layers (the paper: 912 of 1458, 62.6%); "
        f"most often {common}",
        "the closed form over the simulation, at all degrees, by what it takes to bind the layer: " + _deviations(expected),
        f"planning a layer takes {1e3 * planning_s / len(degrees):.2f} ms",
    ]
    work_name = f"{len(degrees)} layers of the paper's grid, testbed {name}, forward and backward: predicted"
    return ScheduleCase(work_name, {"testbed": name, "layers": len(degrees), "apart": apart}, compared(times), {}, notes)


def _deviations(expected: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{case} {min(ratios):.3f} to {max(ratios):.3f} ({len(ratios)})" for case, ratios in expected.items())


def _systems(ways: Sequence[Callable[[int], Chunk]], slices: Sequence[float]) -> dict[str, float]:
    """Seconds of both passes, each with its slice of gradients."""

    def simulated(degrees: Sequence[int]) -> float:
        passes = zip(ways, degrees, slices, strict=True)
        return sum(simulate(layer_tasks(chunk_of(degree), degree, slice_s)).seconds for chunk_of, degree, slice_s in passes)

    def on_one_link(chunk_of: Callable[[int], Chunk], slice_s: float) -> float:
        return min(simulate(one_link_tasks(chunk_of(degree), degree, slice_s)).seconds for degree in DEGREES)

    closed = [closed_form_degree(chunk_of, slice_s, DEGREES) for chunk_of, slice_s in zip(ways, slices, strict=True)]
    coded = [coded_degree(chunk_of, slice_s) for chunk_of, slice_s in zip(ways, slices, strict=True)]
    return {
        "in sequence": sum(_in_sequence(chunk_of(1)) for chunk_of in ways) + sum(slices),
        **{f"degree {degree}": simulated((degree, degree)) for degree in FIXED},
        "one link": sum(map(on_one_link, ways, slices)),
        "closed form": simulated(closed),
        "closed form, coded": simulated(coded),
    }


def _in_sequence(chunk: Chunk) -> float:
    return 2 * chunk.across_s + chunk.gather_s + chunk.scatter_s + chunk.expert_s


def one_link_tasks(chunk: Chunk, degree: int, gradients_s: float) -> list[Task]:
    """The layer if all messages wait for each other, chunk by chunk: those to the experts, then gradients, then those back."""
    tasks = layer_tasks(chunk, degree, gradients_s)
    place = {task.name: number for number, task in enumerate(tasks)}
    numbers = [f" {number}" for number in range(1, degree + 1)] if degree > 1 else [""]
    order = [f"{word}{number}" for number in numbers for word in ("dispatch", "gather")]
    order += ["gradients", *(f"experts{number}" for number in numbers)]
    order += [f"{word}{number}" for number in numbers for word in ("scatter", "combine")]
    kept = [place[name] for name in order if name in place]
    moved = {old: new for new, old in enumerate(kept)}
    return [
        Task(
            tasks[old].name,
            ACROSS if tasks[old].resource == WITHIN else tasks[old].resource,
            tasks[old].seconds,
            tuple(moved[before] for before in tasks[old].after),
        )
        for old in kept
    ]


def compared(times: Mapping[str, Sequence[float]]) -> dict[str, Compared]:
    """Seconds of each layer; those of the plan among them."""
    ours = times["plan"]
    found = {}
    for system, seconds in times.items():
        ratios = [one / best_s for one, best_s in zip(seconds, ours, strict=True)]
        as_good = sum(ratio <= 1.001 for ratio in ratios) / len(ratios)
        found[system] = Compared(geometric_mean(ratios), max(ratios), as_good, sum(seconds))
    return found


# ---------------------------------------------------------------- gradients of a model


@dataclass(frozen=True)
class Model:
    """Of the paper's section 6; one row of 1,024 tokens, top-2, capacity 1.2, an MoE layer in each layer."""

    name: str
    testbed: str
    layers: int
    hidden: int
    expert_hidden: int
    products: int
    squares: float  # dense parameters of a layer over the square of the hidden size


MODELS = (
    Model("GPT2-XL", "a", 48, 1600, 6400, 2, 4.0),
    Model("Mixtral-22B", "a", 33, 6144, 16384, 3, 2.5),
    Model("GPT2-XL", "b", 48, 1600, 6400, 2, 4.0),
    Model("Mixtral-7B", "b", 7, 4096, 14336, 3, 2.5),
)
LENGTH = 1024


def gradients_case(name: str, testbed: Testbed, model: Model) -> ScheduleCase:
    costs, near = testbed.costs, testbed.devices_per_node
    work = esp_workload(LENGTH, model.hidden, model.expert_hidden, 2, 1.2, near, model.products)
    attention = (model.squares * model.hidden**2 * LENGTH + LENGTH**2 * model.hidden) / near  # multiplications, forward
    attention_s = 4 * costs.product.alpha_s + attention * costs.product.beta_s
    forward, backward = (every_degree(partial(esp_chunk, costs, work, backward=way)) for way in (False, True))
    size = int(model.squares * model.hidden**2 / near)  # numbers; so are the amounts of the all-reduce
    blocks = [Block(forward, backward, attention_s, 2 * attention_s, size)] * model.layers
    started = time.perf_counter()
    found = plan(blocks, 0, costs.reduce)
    planning_s = time.perf_counter() - started
    times = {**_without_search(blocks, costs.reduce), "plan": [found.backward_s]}
    notes = [
        f"degrees forward {_range(found.forward_degree_L)}, backward {_range(found.backward_degree_L)}; "
        f"{found.exposed_bytes / (size * model.layers):.1%} of the gradients are left to the end; "
        f"planned in {1e3 * planning_s:.0f} ms"
    ]
    work_name = f"backward pass of {model.layers} layers of {model.name} with all-reduces, testbed {name}: predicted"
    return ScheduleCase(work_name, {"testbed": name, "model": model.name, "layers": model.layers}, compared(times), {}, notes)


def _without_search(blocks: Sequence[Block], reduce: Line) -> dict[str, list[float]]:
    """Gradients after everything; all that are complete in the next MoE layer; or what is free filled, in the paper's first
    step."""
    slots: list[Slot] = []
    complete = 0
    for block in reversed(blocks):
        slots += [Slot(block.backward, complete), dense_slot(block.dense_backward_s, 0)]
        complete = block.gradient_bytes
    total = sum(slot.ready_bytes for slot in slots) + complete
    plain_s = sum(best(slot.options).free_s for slot in slots)
    return {
        "behind": [plain_s + reduce.seconds(total)],
        "next layer": [when_complete(slots, complete, reduce).seconds],
        "what is free": [plain_s + reduce.seconds(total - sum(free_bytes(slots, reduce)))],
    }


# ---------------------------------------------------------------- our layers


@dataclass(frozen=True)
class OwnLayers:
    """What is planned at once."""

    tokens: int  # of a device
    machine: MachineName
    devices: int
    memory: int  # copies that a device has room for
    layers: int
    seed: int


def own_layers_case(told: OwnLayers, name: ModelName, shape: Shape) -> ScheduleCase:
    """Layers with loads of their own and copies by cost, planned at once; dense gradients under them, as on the paper's."""
    costs = costs_of(told.machine, shape, told.tokens)
    topology = topology_of(read_machine(told.machine), told.devices)
    setting = Setting(topology, shape.top_k, Budget(hidden_copies(costs, topology.nodes), told.memory), False, costs)
    entries = told.tokens * shape.top_k * told.devices
    loads_LE = draw("settling", told.layers, shape.experts, entries, shape.top_k, np.random.default_rng(told.seed))
    owner_LE = np.tile(owners(shape.experts, told.devices), (told.layers, 1))
    plans = by_cost(loads_LE, owner_LE, setting)
    works = [sharded_workload(one, loads_E, setting) for one, loads_E in zip(plans, loads_LE, strict=True)]
    link = costs.across if topology.nodes > 1 else costs.within
    reduce = Line(2 * (topology.nodes - 1) * link.latency_s, 2 * link.byte_s / topology.devices_per_node)
    started = time.perf_counter()
    blocks = []
    for work in works:
        forward, backward = (every_degree(partial(sharded_chunk, costs, work, backward=way)) for way in (False, True))
        blocks.append(Block(forward, backward, costs.attention_s, 2 * costs.attention_s, 4 * shape.hidden**2 * BYTES))
    found = plan(blocks, 0, reduce)
    planning_s = time.perf_counter() - started
    note = (
        f"degrees forward {_range(found.forward_degree_L)}, backward {_range(found.backward_degree_L)}; all of it planned in "
        f"{planning_s:.2f} s"
    )
    where = f"{told.devices:,} x {told.machine}, room for {told.memory} copies"
    work_name = f"{told.layers} MoE layers of {name}, {told.tokens:,} tokens a device, {where}: predicted"
    sizes = {"model": name, "tokens": told.tokens, "machine": told.machine, "devices": told.devices}
    sizes |= {"layers": told.layers, "memory": told.memory, "planning_ms": round(1e3 * planning_s)}
    times = {**_our_systems(blocks, reduce), "plan": [found.seconds]}
    return ScheduleCase(work_name, sizes, compared(times), {}, [note])


def _our_systems(blocks: Sequence[Block], reduce: Line) -> dict[str, list[float]]:
    """Forward and backward of all layers, gradients after everything."""
    total = sum(block.gradient_bytes for block in blocks)
    dense_s = sum(block.dense_forward_s + block.dense_backward_s for block in blocks) + reduce.seconds(total)
    found = {}
    for degree in FIXED:
        layers_s = sum(block.forward[degree - 1].free_s + block.backward[degree - 1].free_s for block in blocks)
        found["in sequence" if degree == 1 else f"degree {degree}"] = [dense_s + layers_s]
    return found


def _range(degrees: Sequence[int]) -> str:
    return f"{min(degrees)} to {max(degrees)}" if len({*degrees}) > 1 else str(degrees[0])
