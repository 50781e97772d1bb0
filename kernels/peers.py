"""What each rank has in memory that all can read: choices of tokens and rows; and the plan that a rank makes from them.

Shape letters: W ranks, C tokens of each that there is memory for, V = W * C, K top-k, R rows that this rank serves, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.host_device import ALIGNED

LANE_BYTES = 16  # that one access moves
HEADER = 4  # int32 numbers in front; the first is how many tokens a rank has
FIELDS = 3  # of a choice: who serves it (int32), its expert (int32), its weight (float32)


def capacity_for(tokens: int) -> int:
    """C with room for this many, and with which what a plan says of each rank begins where kernels were compiled for."""
    each = ALIGNED // torch.int32.itemsize
    return -(-tokens // each) * each


@dataclass(frozen=True)
class PeerRows:
    """A matrix in the memory of each rank, all at the same place of their blocks."""

    blocks: Sequence[Tensor]  # uint8, (W,) blocks that this device reads in place
    pointers_W: Tensor  # int64; where they begin, on the device
    start: int  # bytes from there on, a multiple of 16
    width: int  # D
    dtype: torch.dtype

    def __post_init__(self) -> None:
        assert self.start % LANE_BYTES == 0, f"rows begin at byte {self.start}"

    @cached_property
    def of_rank(self) -> list[Tensor]:
        """(rows of the whole block from `start` on, D) of each."""
        row_bytes = self.width * self.dtype.itemsize
        behind = [block[self.start :] for block in self.blocks]
        return [block[: block.shape[0] // row_bytes * row_bytes].view(self.dtype).view(-1, self.width) for block in behind]


@dataclass(frozen=True)
class PeerChoices:
    """The choices of each rank, at the beginning of its block: the header, then the fields, (C, K) each."""

    blocks: Sequence[Tensor]  # uint8, (W,) blocks that this device reads in place
    pointers_W: Tensor  # int64; where they begin, on the device
    capacity: int  # C
    top_k: int

    @property
    def nbytes(self) -> int:
        return 4 * (HEADER + FIELDS * self.capacity * self.top_k)

    @cached_property
    def of_rank(self) -> list[Tensor]:
        """All numbers of each, int32."""
        return [block[: self.nbytes].view(torch.int32) for block in self.blocks]


@dataclass(frozen=True)
class RowPlan:
    """A rank serves the tokens that chose it in the order of ranks, then of tokens."""

    row_WV: Tensor  # int32; the row of every rank's tokens at each rank that serves them, -1 elsewhere
    slots_VK: Tensor  # int32; by rows: which of this rank's experts serves each choice; -1 where it does not, and from row R on
    weights_VK: Tensor  # float32; by rows: the weights of choices served here; elsewhere anything
    numbers: Tensor  # int32, (2 + W,): the most tokens of a rank, the choices served here, the rows of each rank
