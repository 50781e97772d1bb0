"""Dense gradients in slices, overlapped with what the backward pass computes and sends: how many bytes go where.

Source: FSMoE, arXiv 2501.10714, section 5. The paper fills what is free first and searches for the rest by differential
evolution. Here dynamic programming finds the optimum, degrees of the MoE layers included, over all partitions whose running
sums lie on a grid: equal units, what is complete before each slot, and the sums of the paper's first step. So it is never worse
than that, nor than sending at once what is complete, and the same on every rank.

Letters: S slots, G points of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from parallel.placement import Floats, Ints
from parallel.schedule.cost import Line
from parallel.schedule.pipeline import Pipelined, best

UNITS = 256


@dataclass(frozen=True)
class Slot:
    """A part of the backward pass that can take gradients along: an MoE layer, or dense layers, under which links are idle."""

    options: tuple[Pipelined, ...]  # one for each degree that it may have
    ready_bytes: int  # of gradients that are complete when it begins, and were not when the slot before began


def dense_slot(seconds: float, ready_bytes: int) -> Slot:
    return Slot((Pipelined(1, 0.0, seconds),), ready_bytes)


@dataclass(frozen=True)
class Partition:
    """Which slot takes how many bytes of the gradients that are complete by then, and in how many chunks it is cut."""

    taken_S: tuple[int, ...]
    degrees_S: tuple[int, ...]
    exposed_bytes: int  # that are left, and sent behind the backward pass
    seconds: float  # of the backward pass and of what is after it


def free_bytes(slots: Sequence[Slot], reduce: Line) -> tuple[int, ...]:
    """What each slot takes if it takes all that costs no time there: the paper's first step. (S,)"""
    taken, pending = [], 0
    for slot in slots:
        whole = best(slot.options)
        pending += slot.ready_bytes
        free = max((whole.free_s - whole.link_s - reduce.alpha_s) / reduce.beta_s, 0.0)
        taken.append(int(min(free, pending)))
        pending -= taken[-1]
    return tuple(taken)


def partition(slots: Sequence[Slot], last_bytes: int, reduce: Line, units: int = UNITS) -> Partition:
    """The partition with the least time of all on the grid.

    Args:
        slots: in the order of the backward pass.
        last_bytes: that are complete only after the last slot.
        reduce: an all-reduce of this many bytes.
        units: of the grid.
    """
    complete_S = list(accumulate(slot.ready_bytes for slot in slots))
    total = (complete_S[-1] if complete_S else 0) + last_bytes
    free_S = free_bytes(slots, reduce)
    if sum(free_S) + last_bytes == total:  # nothing that is complete is left, and nothing costs time: there is no better one
        return partitioned(slots, free_S, last_bytes, reduce)
    points_G = _grid(complete_S, accumulate(free_S), total, units)
    step_GG = points_G[:, None] - points_G  # what is taken between two running sums
    reduce_GG = np.where(step_GG > 0, reduce.alpha_s + step_GG * reduce.beta_s, np.where(step_GG == 0, 0.0, np.inf))
    least_G = np.full(len(points_G), np.inf)  # the least time so far, if so much has been sent
    least_G[0] = 0.0
    costs: dict[tuple[Pipelined, ...], Floats] = {}
    chosen: list[Ints] = []
    for slot, complete in zip(slots, complete_S, strict=True):
        if slot.options not in costs:  # the layers of a model are often alike
            costs[slot.options] = _costs(slot.options, reduce_GG)
        total_GG = costs[slot.options] + least_G
        chosen.append(total_GG.argmin(axis=1))
        least_G = np.where(points_G <= complete, total_GG.min(axis=1), np.inf)
    least_G = least_G + reduce_GG[-1]  # all of it is sent in the end
    sums = [int(least_G.argmin())]
    for before_G in reversed(chosen):
        sums.append(int(before_G[sums[-1]]))
    sent_S = points_G[sums[::-1]]
    return partitioned(slots, tuple(np.diff(sent_S).tolist()), last_bytes, reduce)


def partitioned(slots: Sequence[Slot], taken_S: tuple[int, ...], last_bytes: int, reduce: Line) -> Partition:
    """If each slot takes this many bytes, and has the degree that is best with them."""
    slices_S = [reduce.seconds(taken) for taken in taken_S]
    found = [best(slot.options, slice_s) for slot, slice_s in zip(slots, slices_S, strict=True)]
    exposed = sum(slot.ready_bytes for slot in slots) + last_bytes - sum(taken_S)
    seconds = sum(one.seconds(slice_s) for one, slice_s in zip(found, slices_S, strict=True)) + reduce.seconds(exposed)
    return Partition(taken_S, tuple(one.degree for one in found), exposed, seconds)


def when_complete(slots: Sequence[Slot], last_bytes: int, reduce: Line) -> Partition:
    """If each slot takes all that is complete, as slices do that nobody plans."""
    return partitioned(slots, tuple(slot.ready_bytes for slot in slots), last_bytes, reduce)


def _grid(complete: Sequence[int], free: accumulate[int], total: int, units: int) -> Ints:
    """Running sums that are tried, ascending, from nothing to all."""
    equal = np.arange(units + 1, dtype=np.int64) * max(-(-total // units), 1)
    return np.unique(np.array([*equal[equal <= total], *complete, *free, 0, total], dtype=np.int64))


def _costs(options: tuple[Pipelined, ...], reduce_GG: Floats) -> Floats:
    """The least time of a slot that goes from one running sum, the second axis, to another."""
    found = np.full(reduce_GG.shape, np.inf)
    for one in _useful(options):
        np.minimum(found, np.maximum(one.link_s + reduce_GG, one.free_s), out=found)
    return found


def _useful(options: Sequence[Pipelined]) -> list[Pipelined]:
    """Without those that are slower than another whatever they take along."""
    kept: list[Pipelined] = []
    for one in sorted(options, key=lambda option: (option.link_s, option.free_s)):
        if not kept or one.free_s < kept[-1].free_s:
            kept.append(one)
    return kept
