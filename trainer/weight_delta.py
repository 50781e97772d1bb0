"""The lossless difference between two versions of the weights: where bits differ, and the new values.

An update of AdamW moves a weight by about the learning rate, and bfloat16 represents only changes of at least about 1/256 of
the weight, so at the learning rates of RL most bits stay (PULSE, arXiv 2602.03839). Bits are compared, not numbers: NaN has
payloads, and zero has two signs. New values replace old ones; differences would not add up exactly.

Positions are stored as the counts of unchanged elements before each changed one, in numbers of 8, 16 or 32 bits, whichever
takes the fewest bytes. The largest number of a width means that many elements, and that the count continues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.weights import PackedTensors

CHUNK = 1 << 22  # elements compared at once; bounds the memory of masks and positions
WIDTHS = (1, 2, 4)  # bytes of a count
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> what it is written as

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Changes:
    """Changed elements of a part of a tensor: those `encoded` from element `first` on have now the bits `values`."""

    name: str
    dtype: str
    first: int
    encoded: NDArray[np.unsignedinteger]
    values: NDArray[np.integer]


@dataclass(frozen=True)
class WeightDelta:
    """What turns the weights of version `base` into newer ones."""

    base: int
    changes: tuple[Changes, ...]
    elements: int  # of all tensors, changed or not

    @property
    def nbytes(self) -> int:
        return sum(part.encoded.nbytes + part.values.nbytes for part in self.changes)

    @property
    def changed_share(self) -> float:
        return sum(len(part.values) for part in self.changes) / max(self.elements, 1)


def difference(old: PackedTensors, new: PackedTensors, base: int) -> WeightDelta:
    """The delta from `old`, which has version `base`, to `new`; they have the same layout."""
    assert old.layout == new.layout, "a delta is between the same tensors"
    changes, elements = list[Changes](), 0
    for name, (start, dtype, shape) in new.layout.items():
        size, count = getattr(torch, dtype).itemsize, math.prod(shape)
        old_N, new_N = (block.data[start : start + count * size].view(f"i{size}") for block in (old, new))
        elements += count
        for first in range(0, count, CHUNK):  # NumPy, which finds the few that differ several times faster than torch
            part_N = new_N[first : first + CHUNK]
            positions = np.flatnonzero(old_N[first : first + CHUNK] != part_N)
            if len(positions):
                changes.append(Changes(name, dtype, first, encode(positions), part_N[positions]))
    return WeightDelta(base, tuple(changes), elements)


@torch.no_grad()
def apply(delta: WeightDelta, tensors: Mapping[str, Tensor]) -> None:
    """Makes `tensors`, which hold version `delta.base` on any device, the newer ones, in place."""
    for part in delta.changes:
        tensor = tensors[part.name]
        assert str(tensor.dtype) == f"torch.{part.dtype}", f"{part.name} is {tensor.dtype}, its changes are {part.dtype}"
        positions = torch.from_numpy(part.first + decode(part.encoded)).to(tensor.device)
        bits(tensor)[positions] = torch.tensor(part.values, device=tensor.device)


def bits(tensor: Tensor) -> Tensor:
    """The elements of a contiguous tensor as integers, (N,); a view."""
    return tensor.view(-1).view(WORDS[tensor.element_size()])


def encode(positions: Positions) -> NDArray[np.unsignedinteger]:
    """Ascending positions as counts of what lies between them."""
    gaps = np.diff(positions, prepend=-1) - 1

    def size(width: int) -> int:
        return int((gaps // _limit(width) + 1).sum()) * width

    width = min(WIDTHS, key=size)
    limit = _limit(width)
    ends = np.cumsum(gaps // limit + 1)
    encoded = np.full(ends[-1] if len(ends) else 0, limit, dtype=f"u{width}")
    encoded[ends - 1] = gaps % limit
    return encoded


def decode(encoded: NDArray[np.unsignedinteger]) -> Positions:
    ends = encoded != _limit(encoded.itemsize)
    between: Positions = np.cumsum(encoded, dtype=np.int64)[ends]
    return between + np.arange(len(between))


def _limit(width: int) -> int:
    """The largest number of this many bytes."""
    return (1 << 8 * width) - 1
