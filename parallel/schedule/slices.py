"""Where slices of the dense gradients are sent in the backward pass, and what each consists of. Pure.

Dense gradients have one order: the last parameter first, as they complete, more or less. A slice is a run of it. Each MoE
layer has two places where slices are sent: `UNDER_LAYER`, when its first rows are there, which a slice on the same links would
delay and the experts wait for, and `UNDER_DENSE`, after its experts, while the dense layers before it compute. What is left
goes after the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

UNDER_LAYER, UNDER_DENSE = 0, 1
PLACES_OF_LAYER = 2


def place_of(layer: int, layers: int, which: int) -> int:
    """Of MoE layer `layer` among `layers`, `which` is one of the two above."""
    return PLACES_OF_LAYER * (layers - 1 - layer) + which


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's numbers."""

    parameter: int  # in the order of the gradients
    start: int
    stop: int


def pieces(sizes: Sequence[int], start: int, stop: int) -> list[Piece]:
    """What of which parameter lies between two running sums of their `sizes`, which stand in the order of the gradients."""
    found, before = [], 0
    for parameter, size in enumerate(sizes):
        first, last = max(start - before, 0), min(stop - before, size)
        if first < last:
            found.append(Piece(parameter, first, last))
        before += size
    return found


def messages(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """A slice as runs of at most `most` numbers."""
    return [(first, min(first + most, stop)) for first in range(start, stop, most)]
