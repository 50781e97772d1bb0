"""Dense gradients in slices, under what the backward pass computes and sends anyway: how many bytes go where. Exact.

Source: FSMoE, arXiv 2501.10714, section 5. The paper fills what is free first and then searches by differential evolution; here
dynamic programming over bytes in equal units finds the optimum, degrees of the MoE layers included, and the same on every rank.

Letters: S slots, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

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
    seconds: float  # of the backward pass and of what is behind it


def partition(slots: Sequence[Slot], last_bytes: int, reduce: Line, units: int = UNITS) -> Partition:
    """The partition with the least time of all that give every slot a whole number of units.

    Args:
        slots: in the order of the backward pass.
        last_bytes: that are complete only behind the last slot.
        reduce: an all-reduce of so many bytes.
        units: parts that all gradients are divided into.
    """
    total = sum(slot.ready_bytes for slot in slots) + last_bytes
    unit = max(-(-total // units), 1)
    amounts_U = np.arange(total // unit + 1, dtype=np.int64) * unit
    reduce_U = np.where(amounts_U > 0, reduce.alpha_s + amounts_U * reduce.beta_s, 0.0)
    least_U = np.full(len(amounts_U), np.inf)  # the least time so far, if so many units have been sent
    least_U[0] = 0.0
    complete, costs, chosen = 0, {}, []
    for slot in slots:
        complete += slot.ready_bytes
        if slot.options not in costs:  # the layers of a model are often alike
            costs[slot.options] = _costs(slot.options, reduce_U)
        least_U, taken_U = _extended(least_U, costs[slot.options], complete // unit)
        chosen.append(taken_U)
    left_U = np.array([reduce.seconds(total - int(amount)) for amount in amounts_U])
    sent = int((least_U + left_U).argmin())
    seconds, exposed = float(least_U[sent] + left_U[sent]), total - sent * unit
    taken = []
    for taken_U in reversed(chosen):
        taken.append(int(taken_U[sent]) * unit)
        sent -= int(taken_U[sent])
    taken.reverse()
    degrees = [best(slot.options, reduce.seconds(amount)).degree for slot, amount in zip(slots, taken, strict=True)]
    return Partition(tuple(taken), tuple(degrees), exposed, seconds)


def _costs(options: tuple[Pipelined, ...], reduce_U: Floats) -> Floats:
    """The least time of a slot for each number of units that it takes."""
    times_OU = [np.maximum(one.link_s + reduce_U, one.free_s) for one in options]
    return np.asarray(np.min(times_OU, axis=0))


def _extended(least_U: Floats, cost_U: Floats, complete: int) -> tuple[Floats, Ints]:
    """(least time with one more slot, how many units it takes then), for each number of units sent, at most those complete."""
    count = len(least_U)
    # Row u of the windows holds what was sent before if u are sent after and 0, 1, .. are taken; nothing before the start.
    before_UU = sliding_window_view(np.concatenate([np.full(count - 1, np.inf), least_U]), count)[:, ::-1]
    total_UU = before_UU + cost_U
    taken_U = total_UU.argmin(axis=1)
    after_U = total_UU[np.arange(count), taken_U]
    after_U[complete + 1 :] = np.inf
    return after_U, taken_U
