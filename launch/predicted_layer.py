"""One MoE layer of a predicted pretraining: its plan, its timelines, and the dense gradients under its backward pass.

The code that plans a run plans everything here: policies place copies from earlier loads, the number of chunks is chosen by
exact simulation from the mean load (parallel/schedule/execution.py), and slices of dense gradients by dynamic programming
(parallel/schedule/gradients.py). Times are then those of the actual loads.

Letters: S steps of a trace, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from statistics import mean
from typing import TypeVar

import numpy as np

from parallel.flows import Plan, device_loads, imbalance
from parallel.layer_cost import CopyTimes, Setting, copy_times
from parallel.materialisation import WINDOW
from parallel.placement import Floats, Ints, TransportKind, without_copies
from parallel.planning import predict
from parallel.policies import POLICIES
from parallel.schedule.cost import Line, ShardedWorkload, sharded_workload
from parallel.schedule.execution import (
    UP_SHARE,
    ExecutionCosts,
    LayerWork,
    again_tasks,
    backward_tasks,
    degrees_of,
    forward_tasks,
    in_sequence,
    plan_layer,
)
from parallel.schedule.generalised import (
    Around,
    around_copies,
    backward_around,
    forward_around,
    slices_of,
    slots_of,
)
from parallel.schedule.gradients import Partition, Slot, when_complete
from parallel.schedule.pipeline import COMPUTE, WHOLE, Degrees, best
from parallel.schedule.published import published
from parallel.schedule.timeline import Task, Timeline, simulate
from parallel.schedule.transports import Choice, Way, choose_transport

Numbers = TypeVar("Numbers", ShardedWorkload, CopyTimes[float])


@dataclass(frozen=True)
class PassTime:
    """Of one direction: what is computed, and how much longer it takes with the tokens on their ways, and then with copies."""

    products_s: float
    tokens_s: float
    copies_s: float

    @property
    def total_s(self) -> float:
        return self.products_s + self.tokens_s + self.copies_s


@dataclass(frozen=True)
class Described:
    """A layer, as its tasks need it."""

    costs: ExecutionCosts
    work: LayerWork
    around: Around
    tokens: int  # of a device
    in_place: bool  # ranks read each other's memory: the layer is whole, and only slices and copies travel beside it

    def forward(self, degrees: Degrees, *, copies: bool = True) -> Timeline:
        around = self.around if copies else Around(self.around.attention_s)
        return simulate(forward_around(self._tasks(forward_tasks, degrees.forward, degrees), around))

    def backward(self, degrees: Degrees, *, copies: bool = True, slices_s: tuple[float, float] = (0.0, 0.0)) -> Timeline:
        around = self.around if copies else Around(self.around.attention_s)
        around = replace(around, layer_slice_s=slices_s[0], dense_slice_s=slices_s[1])
        return simulate(backward_around(self._tasks(backward_tasks, degrees.backward, degrees), around))

    def _tasks(self, tasks_of: Callable[..., list[Task]], degree: int, degrees: Degrees) -> list[Task]:
        tasks = tasks_of(self.costs, self.work, degree)
        if self.in_place:  # the device itself reads, and results when gradients of weights are there too
            tasks = [replace(task, resource=COMPUTE) for task in tasks]
            tasks.sort(key=lambda task: task.name.startswith(("combine", "collect")))
        return in_sequence(tasks) if self.in_place or degrees.in_sequence else tasks

    def again(self, degrees: Degrees) -> Timeline:
        """Without copies."""
        return simulate(forward_around(self._tasks(again_tasks, degrees.forward, degrees), Around(self.around.attention_s)))

    def planned(self) -> Degrees:
        return WHOLE if self.in_place else plan_layer(self.costs, self.work, self.tokens, around=self.around).degrees

    def slots(self) -> list[Slot]:
        """The two places of the layer where slices of dense gradients are sent, without any that are complete."""
        degrees = [1] if self.in_place else degrees_of(self.tokens)
        return slots_of(lambda degree: self._tasks(backward_tasks, degree, WHOLE), degrees, self.around, (0, 0))


@dataclass(frozen=True)
class LayerPrediction:
    """One MoE layer with its attention and one micro-batch, on average over the steps of a trace."""

    forward: PassTime
    backward: PassTime
    again: PassTime  # forward once more, where activations are recomputed; copies are there, or counted with the backward pass
    imbalance: float  # entries of the busiest rank over the mean
    setting: Setting
    typical: Described  # of the mean loads, from which it was planned
    degrees: Degrees


def predicted_layer(policy: str, loads_SE: Floats, owner_E: Ints, setting: Setting, *, chunk_s: float) -> LayerPrediction:
    """Plans every step but the first from what is known before it. Loads are those of all devices."""
    topology, tokens = setting.topology, _tokens(loads_SE, setting)
    expected_SE = np.concatenate([predict(loads_SE[max(step - WINDOW, 0) : step, None]) for step in range(1, len(loads_SE))])
    plans = POLICIES[policy](expected_SE, np.tile(owner_E, (len(expected_SE), 1)), setting)
    came = list(zip(plans, loads_SE[1:], strict=True))
    works = [sharded_workload(plan, loads_E, setting) for plan, loads_E in came]
    times = [copy_times(plan.placement, topology, setting.costs) for plan in plans]

    def described(work: ShardedWorkload, copying: CopyTimes[float]) -> Described:
        around = around_copies(copying, Around(setting.costs.attention_s), rematerialise=setting.rematerialise)
        return Described(*published(setting.costs, work, copying.sums_s, chunk_s), around, tokens, setting.in_place)

    typical = described(_mean(works), _mean(times))
    degrees = typical.planned()
    pass_times = cache(partial(_pass_times, degrees=degrees))  # steps are often alike
    taken = [pass_times(described(work, copying)) for work, copying in zip(works, times, strict=True)]
    return LayerPrediction(
        forward=_mean_time([forward for forward, *_ in taken]),
        backward=_mean_time([backward for _, backward, _ in taken]),
        again=_mean_time([again for *_, again in taken]),
        imbalance=mean(imbalance(device_loads(plan, topology, loads_E)) for plan, loads_E in came),
        setting=setting,
        typical=typical,
        degrees=degrees,
    )


def _tokens(loads_SE: Floats, setting: Setting) -> int:
    return max(round(float(loads_SE[0].sum()) / setting.top_k / setting.topology.devices), 1)


def _mean(records: Sequence[Numbers]) -> Numbers:
    """Field by field; what is no number is alike in all."""
    found = {field.name: [getattr(one, field.name) for one in records] for field in fields(records[0])}
    return replace(records[0], **{name: mean(each) for name, each in found.items() if not isinstance(each[0], bool)})


def _pass_times(layer: Described, degrees: Degrees) -> tuple[PassTime, PassTime, PassTime]:
    """Both passes, and the forward pass again; what tells each rank what will come is the forward pass's."""
    costs, work, around = layer.costs, layer.work, layer.around
    found = []
    for timeline_of, products_s, announce_s in (
        (layer.forward, around.attention_s + costs.forward.seconds(work.entries), costs.announce_s),
        (
            layer.backward,
            around.attention_back_s + costs.backward.seconds(work.entries) + costs.weights.seconds(work.entries),
            0.0,
        ),
    ):
        alone_s = timeline_of(degrees, copies=False).seconds
        with_copies_s = timeline_of(degrees).seconds if layer.around.copies_s else alone_s
        found.append(PassTime(products_s, alone_s - products_s + announce_s, with_copies_s - alone_s))
    products_s = around.attention_s + UP_SHARE * costs.forward.seconds(work.entries)
    again = PassTime(products_s, layer.again(degrees).seconds + costs.announce_s - products_s, 0.0)
    return found[0], found[1], again


def _mean_time(times: Sequence[PassTime]) -> PassTime:
    return PassTime(*(mean(getattr(one, field.name) for one in times) for field in fields(PassTime)))


# ---------------------------------------------------------------- how tokens travel


def chosen_transport(
    settings: dict[TransportKind, Setting], loads_E: Floats, owner_E: Ints, chunk_s: float
) -> Choice[TransportKind]:
    """As a run chooses before its first update: of a layer without copies."""
    (one, *_) = settings.values()
    plan = Plan(without_copies(owner_E, one.topology.devices))
    ways = {}
    for kind, setting in settings.items():
        costs, work = published(setting.costs, sharded_workload(plan, loads_E, setting), 0.0, chunk_s)
        ways[kind] = Way(costs, [work])
    return choose_transport(ways, _tokens(loads_E[None], one), [Around(one.costs.attention_s)])


# ---------------------------------------------------------------- dense gradients


@dataclass(frozen=True)
class DenseBytes:
    """Gradients of what is no expert, by when the backward pass completes them."""

    head: int  # before the last MoE layer
    layer: int  # of each MoE layer, after it
    below: int  # after the first

    def total(self, layers: int) -> int:
        return self.head + layers * self.layer + self.below


def gradient_slices(layer: LayerPrediction, layers: int, dense: DenseBytes, reduce: Line) -> tuple[Partition, float]:
    """(where slices go in one backward pass, how much longer they make it). Layers that are not planned, because ranks read
    each other's memory, take what is complete."""
    under_layer, under_dense = layer.typical.slots()
    ready = [dense.head, *[dense.layer] * (layers - 1)]
    slots = [slot for size in ready for slot in (replace(under_layer, ready_bytes=size), under_dense)]
    last = dense.layer + dense.below
    found = (when_complete if layer.typical.in_place else slices_of)(slots, last, reduce)
    return found, found.seconds - sum(best(slot.options).free_s for slot in slots)


def typical_slices(partition: Partition, layers: int) -> tuple[int, int]:
    """Bytes under the layer in the middle, and under the dense layers before it."""
    place = 2 * (layers // 2)
    under_layer, under_dense = np.array(partition.taken_S)[[place, place + 1]].tolist()
    return under_layer, under_dense
