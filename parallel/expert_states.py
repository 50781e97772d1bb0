"""Float32 masters and AdamW's moments of the experts that a rank owns, handed out one expert at a time.

`StatesInMemory` keeps them on a device or on the host, nvme.py in a file. A row is one expert. Nothing here communicates.

Letters: O experts owned by a rank over all layers, D model, F expert hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.adamw import MOMENTS
from parallel.sparse_collectives import Parts, Shapes


@dataclass(frozen=True)
class ExpertState:
    """Of one expert."""

    masters: Parts  # gate_up (2F, D) and down (D, F), float32
    moments: tuple[dict[str, Tensor], ...]  # of each of the masters, by the names of MOMENTS

    def tensors(self) -> list[Tensor]:
        return [*self.masters, *(moment for moments in self.moments for moment in moments.values())]


class ExpertStates(ABC):
    rows: int  # O
    parts: Shapes  # of one expert's masters

    def read(self, rows: Sequence[int]) -> Iterator[ExpertState]:
        """The states of these rows, no row twice, one after the other; each is valid until the next is asked for."""
        return self._visit(rows, change=False)

    @torch.no_grad()
    def change(self, rows: Sequence[int], function: Callable[[int, ExpertState], None]) -> None:
        """Calls `function(row, state)` for these rows, no row twice; what it writes into the state is kept."""
        with closing(self._visit(rows, change=True)) as states:
            for index, state in enumerate(states):
                function(rows[index], state)

    @abstractmethod
    def _visit(self, rows: Sequence[int], *, change: bool) -> Generator[ExpertState]:
        """With `change`, a state is kept as it is when the next is asked for."""

    @abstractmethod
    def reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row order[i] was; `order` is a permutation of the rows."""


class StatesInMemory(ExpertStates):
    def __init__(self, rows: int, parts: Shapes, device: torch.device) -> None:
        """Masters are unset, moments are zero."""
        self.rows, self.parts = rows, parts
        self.masters = tuple(torch.empty(rows, *part, dtype=torch.float32, device=device) for part in parts)
        self.moments = tuple({key: torch.zeros_like(master) for key in MOMENTS} for master in self.masters)

    def _visit(self, rows: Sequence[int], *, change: bool) -> Generator[ExpertState]:
        for row in rows:
            masters = tuple(master.detach()[row] for master in self.masters)
            yield ExpertState(masters, tuple({key: part[row] for key, part in moments.items()} for moments in self.moments))

    @torch.no_grad()
    def reorder(self, order: Sequence[int]) -> None:
        """One tensor after the other, so that memory rises by a third of what a rank owns at most."""
        for master, moments in zip(self.masters, self.moments, strict=True):
            for tensor in (master, *moments.values()):
                tensor.copy_(tensor[order])
