"""The schedule of a whole model: the number of chunks of each MoE layer, separately for forward and backward, and how many
bytes of the dense gradients travel under each part of the backward pass.

Source: FSMoE, arXiv 2501.10714, sections 4 and 5. Degrees are chosen by exact simulation, gradients by dynamic programming.

Letters: L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.schedule.cost import Line
from parallel.schedule.gradients import UNITS, Slot, dense_slot, partition
from parallel.schedule.pipeline import Pipelined, best


@dataclass(frozen=True)
class Block:
    """An MoE layer and the dense layers between it and the one before (the paper's generalised layer)."""

    forward: tuple[Pipelined, ...]  # one for each degree that it may have
    backward: tuple[Pipelined, ...]
    dense_forward_s: float
    dense_backward_s: float
    gradient_bytes: int  # of its dense layers, complete after their backward pass


@dataclass(frozen=True)
class Schedule:
    """For every rank alike."""

    forward_degree_L: tuple[int, ...]
    backward_degree_L: tuple[int, ...]
    layer_bytes_L: tuple[int, ...]  # of dense gradients that go while the layer runs backward
    dense_bytes_L: tuple[int, ...]  # and that go while the dense layers before it do
    exposed_bytes: int  # that are left, and waited for
    forward_s: float
    backward_s: float

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s


def plan(blocks: Sequence[Block], head_bytes: int, reduce: Line, units: int = UNITS) -> Schedule:
    """The fastest schedule.

    Args:
        blocks: in the order of the model.
        head_bytes: gradients of what comes after the last block, complete before its backward pass.
        reduce: an all-reduce of this many bytes of dense gradients.
        units: of the grid on which sums of gradients lie.
    """
    forward = [best(block.forward) for block in blocks]
    slots, complete = [], head_bytes
    for block in reversed(blocks):
        slots += [Slot(block.backward, complete), dense_slot(block.dense_backward_s, 0)]
        complete = block.gradient_bytes
    found = partition(slots, complete, reduce, units)
    return Schedule(
        forward_degree_L=tuple(one.degree for one in forward),
        backward_degree_L=found.degrees_S[-2::-2],
        layer_bytes_L=found.taken_S[-2::-2],
        dense_bytes_L=found.taken_S[::-2],
        exposed_bytes=found.exposed_bytes,
        forward_s=sum(one.free_s for one in forward) + sum(block.dense_forward_s for block in blocks),
        backward_s=found.seconds,
    )
