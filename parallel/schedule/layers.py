"""All MoE layers of a model together: the number of chunks of each, the slices of dense gradients that travel under them, and
the time of both passes, planned or not. Pure.

Source: FSMoE, arXiv 2501.10714, sections 4 and 5.

Letters: L MoE layers, P places of the backward pass where slices are sent (slices.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from parallel.schedule.cost import Line
from parallel.schedule.execution import (
    ExecutionCosts,
    LayerPlan,
    LayerWork,
    backward_tasks,
    degrees_of,
    forward_tasks,
    in_sequence_s,
    plan_layer,
)
from parallel.schedule.generalised import Around, backward_around, forward_around, slices_of, slots_of
from parallel.schedule.gradients import Slot
from parallel.schedule.pipeline import COPIES, GRADIENTS, Degrees
from parallel.schedule.slices import UNDER_DENSE, UNDER_LAYER, place_of
from parallel.schedule.timeline import Task, simulate


@dataclass(frozen=True)
class DenseGradients:
    """Of a backward pass: bytes that are complete at each place on every rank, of all of them, and what a slice takes."""

    complete_P: tuple[int, ...]
    total: int
    reduce: Line

    @property
    def when_complete_P(self) -> tuple[int, ...]:
        """Bytes that each place takes if it takes all that are complete: as slices do that nobody plans."""
        return tuple(np.diff([0, *self.complete_P]).tolist())

    def left_s(self, bytes_P: Sequence[int]) -> float:
        """Of what goes after the pass if each place takes this many bytes."""
        return self.reduce.seconds(self.total - sum(bytes_P))


def plan_layers(
    costs: ExecutionCosts,
    works: Sequence[LayerWork],
    arounds: Sequence[Around],
    tokens: int,
    present_L: Sequence[Degrees],
    dense: DenseGradients | None,
) -> tuple[list[LayerPlan], tuple[int, ...] | None]:
    """(the plan of each layer, with its slices; bytes of the slice at each place, None without `dense`).

    Args:
        arounds: what lies around each layer, except for the slices.
        tokens: of a rank.
        present_L: degrees that stay where they are nearly the fastest.
    """
    bytes_P = None if dense is None else _slice_bytes(costs, works, arounds, tokens, dense)
    sliced = arounds if dense is None or bytes_P is None else with_slices(arounds, bytes_P, dense.reduce)
    layers = zip(works, present_L, sliced, strict=True)
    return [plan_layer(costs, work, tokens, present, around) for work, present, around in layers], bytes_P


def with_slices(arounds: Sequence[Around], bytes_P: Sequence[int], reduce: Line) -> list[Around]:
    """If the slice at each place has this many bytes."""
    seconds_P = [reduce.seconds(sent) for sent in bytes_P]
    places = [place_of(layer, len(arounds), UNDER_LAYER) for layer in range(len(arounds))]
    return [
        replace(around, layer_slice_s=seconds_P[place], dense_slice_s=seconds_P[place + UNDER_DENSE])
        for place, around in zip(places, arounds, strict=True)
    ]


def _slice_bytes(
    costs: ExecutionCosts, works: Sequence[LayerWork], arounds: Sequence[Around], tokens: int, dense: DenseGradients
) -> tuple[int, ...]:
    """By place of the backward pass."""
    ready_P = dense.when_complete_P
    slots: list[Slot] = []
    for work, around in zip(reversed(works), reversed(arounds), strict=True):
        ready = ready_P[len(slots)], ready_P[len(slots) + 1]
        slots += slots_of(partial(backward_tasks, costs, work), degrees_of(tokens), around, ready, costs.factor)
    return slices_of(slots, dense.total - dense.complete_P[-1], dense.reduce).taken_S


# ---------------------------------------------------------------- what both passes take


def passes_s(
    costs: ExecutionCosts,
    works: Sequence[LayerWork],
    arounds: Sequence[Around],
    degrees_L: Sequence[Degrees],
    left_s: float = 0.0,
) -> float:
    """Seconds of both passes of all layers, one after the other, with what tells each rank what will come.

    Args:
        arounds: with their slices; layers in sequence have none.
        left_s: of the dense gradients that are averaged behind the backward pass.
    """
    forward_s, backward, more_s = 0.0, list[Task](), 0.0
    for work, around, degrees in zip(works, arounds, degrees_L, strict=True):
        if degrees.in_sequence:
            alone_s = costs.announce_s + in_sequence_s(costs, work)
            forward_s += around.attention_s + around.attention_back_s + around.copies_s + alone_s
            more_s += (costs.factor(0) - 1) * alone_s
            continue
        ahead = forward_tasks(costs, work, degrees.forward)
        forward_s += costs.announce_s + simulate(forward_around(ahead, around)).seconds
        more_s += (costs.factor(degrees.forward) - 1) * (costs.announce_s + simulate(ahead).seconds)
        back = backward_tasks(costs, work, degrees.backward)
        more_s += (costs.factor(degrees.backward) - 1) * simulate(back).seconds
    for work, around, degrees in reversed(list(zip(works, arounds, degrees_L, strict=True))):
        if not degrees.in_sequence:
            backward = _followed_by(backward, backward_around(backward_tasks(costs, work, degrees.backward), around))
    return forward_s + simulate(backward).seconds + more_s + left_s


def _followed_by(tasks: list[Task], layer: Sequence[Task]) -> list[Task]:
    """The layer begins when the one after it in the model is done, except for what is under way beside it."""
    followed = {before for task in tasks for before in task.after}
    ends = tuple(place for place, task in enumerate(tasks) if place not in followed and task.name not in (GRADIENTS, COPIES))
    first, shifted = len(tasks), list[Task]()
    for task in layer:
        shifted.append(replace(task, after=tuple(place + first for place in task.after) or ends))
    return tasks + shifted
