"""How the rows of an MoE layer whose tokens travel as messages are cut into chunks. Pure.

A chunk has an equal part of every rank's tokens. Straight to few ranks, a layer in several chunks has the rows that stay, those
which the rank of their token serves itself, in chunks of their own, which wait for nobody: forward, half of them are computed
while the first rows travel, and half while the last results do; backward, all while the first gradients travel, because those
of the weights hide the last. Of many ranks each serves few of its own tokens, and more chunks would only read the weights more
often. It depends on nothing but the ranks, so that sums over rows always run in the same order.

A row's cell says how far its token stands among those of its rank, from 0 to FINEST, and as much more if it travels apart from
rows that stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 4  # ranks
FINEST = 720_720  # parts that a rank's tokens are thought to be cut into: every degree up to 16 divides it


@dataclass(frozen=True)
class Cut:
    """Of one pass. Chunks are numbered in the order of their cells: those that stay first."""

    degree: int  # chunks of the rows that travel, or of all if none are apart
    staying: int = 0  # chunks of the rows that stay, where they are apart

    def __len__(self) -> int:
        return self.staying + self.degree

    @property
    def turns(self) -> tuple[int, ...]:
        """In which chunks are computed: half of what stays first, or all, and the other half last."""
        first, *rest = range(len(self))
        later = rest[: self.staying - 1] if self.staying else []
        return (first, *rest[len(later) :], *later)

    def chunk_of(self, cell: Tensor) -> Tensor:
        """Of rows, by their cells."""
        among = cell % FINEST
        travels = self.staying + among * self.degree // FINEST
        return torch.where(cell < FINEST, among * self.staying // FINEST, travels) if self.staying else travels

    def tokens_of(self, chunk: int, tokens: int) -> slice:
        """Of a rank's tokens those that a chunk has rows of."""
        part, parts = (chunk, self.staying) if chunk < self.staying else (chunk - self.staying, self.degree)
        return slice(-(-part * tokens // parts), -(-(part + 1) * tokens // parts))


def stay_apart(ranks: int, *, two_level: bool) -> bool:
    """Whether layers in several chunks have rows that stay in chunks of their own."""
    return ranks <= FEW and not two_level


def forward_cut(degree: int, *, apart: bool) -> Cut:
    """`apart`: as `stay_apart` says."""
    return Cut(degree, staying=2) if apart and degree > 1 else Cut(degree)


def backward_cut(degree: int, *, apart: bool) -> Cut:
    return Cut(degree, staying=1) if apart and degree > 1 else Cut(degree)
