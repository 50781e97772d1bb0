"""Rows on their ways: to the ranks that serve them and back, in chunks, over one level or two.

What is to be sent to whom is told first (token_exchange.py). All ranks call everything here together, in the same order.

Letters: T tokens of this rank, or rows that it passes on, K top-k, S rows sent, R rows received, C chunks, P rows of one,
D model, W members of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.rows import combine_rows, spread_rows
from parallel.all_to_all import AllToAll
from parallel.cuts import Cut
from parallel.hooks import Change, Hooks, unchanged
from parallel.topology import World


@dataclass(frozen=True)
class Level:
    """Ranks among which rows travel in one leg. Each member stands for `each` consecutive ranks, for which it takes rows."""

    world: World
    group: dist.ProcessGroup | None  # None: all ranks
    size: int
    each: int
    hooks: Hooks  # what rows travel as

    @property
    def here(self) -> int:
        """The member that this rank is."""
        return self.world.rank // self.each % self.size

    def member_of(self, rank_TK: Tensor) -> Tensor:
        """Which member takes a choice that a rank serves; int64, -1 stays."""
        if self.group is None:
            return rank_TK.long()
        if self.each > 1:
            return rank_TK.long() // self.each
        return torch.where(rank_TK >= 0, rank_TK.long() % self.size, -1)


Levels = tuple[Level, ...]  # in the order in which a row passes them


def one_level(world: World, hooks: Hooks) -> Levels:
    """Straight to the ranks."""
    return (Level(world, None, world.size, 1, hooks),)


@dataclass(frozen=True)
class Splits:
    """Rows from this rank to each member, and from each to this one."""

    send_W: list[int]
    receive_W: list[int]


class InFlight:
    """Rows under way to this rank; `arrived` gives what they are when they are there. Without splits they stay here."""

    def __init__(
        self, level: Level, sent: Tensor, splits: Splits | None, *, back: bool = False, arrived: Change = unchanged
    ) -> None:
        self._world, self._arrived = level.world, arrived
        self._rows: Tensor | None = None
        self._sent = sent.contiguous()  # alive until it is through
        self._received, self._under_way = self._sent, None
        if splits is not None:
            send_W, receive_W = (splits.receive_W, splits.send_W) if back else (splits.send_W, splits.receive_W)
            self._received = sent.new_empty(sum(receive_W), *sent.shape[1:])
            self._under_way = AllToAll(self._received, self._sent, receive_W, send_W, level.group)

    def wait(self) -> Tensor:
        """The rows. On a GPU the host does not wait, only what it starts from here on; this wait alone counts as exposed."""
        if self._under_way is not None:
            with self._world.exposed:
                self._under_way.wait()
        if self._rows is None:
            self._rows = self._arrived(self._received)
        return self._rows


@dataclass(frozen=True)
class Apart:
    """Tokens that have rows in several chunks."""

    chunk_TK: Tensor  # int64: which has the row of a choice
    all_TK: Tensor  # int32: the row in the messages of all chunks, one after the other; as Leg.place_TK


@dataclass(frozen=True)
class Leg:
    """Rows over one level and results back, in chunks."""

    level: Level
    cut: Cut
    rows: list[slice]  # of each chunk, among the rows that are sent
    place_TK: Tensor  # int32: the row, in its chunk's message, of a choice that is its row's first for that member; else -1
    apart: Apart | None  # where rows that stay are
    splits: list[Splits]  # of each chunk

    def of_chunk(self, chunk: int) -> slice:
        """Among the rows that are sent."""
        return self.rows[chunk]

    def pack(self, x_PD: Tensor, chunk: int) -> Tensor:
        """The message of a chunk's rows, in its order."""
        place_N, top_k = self._places(chunk)
        rows_SD = x_PD.new_empty(sum(self.splits[chunk].send_W), x_PD.shape[1])
        spread_rows(x_PD, place_N, top_k, rows_SD)
        return rows_SD

    def send(self, rows_SD: Tensor, chunk: int) -> InFlight:
        hooks = self.level.hooks
        return InFlight(self.level, hooks.before_dispatch(rows_SD), self._travels(chunk), arrived=hooks.after_dispatch)

    def give_back(self, y_PD: Tensor, chunk: int) -> InFlight:
        """Results of the rows of a chunk, in the order in which they arrived."""
        hooks = self.level.hooks
        return InFlight(self.level, hooks.before_combine(y_PD), self._travels(chunk), back=True, arrived=hooks.after_combine)

    def _travels(self, chunk: int) -> Splits | None:
        return self.splits[chunk] if chunk >= self.cut.staying else None

    def collect(self, rows_SD: Tensor, chunk: int) -> Tensor:
        """Results of the rows that are sent; those of several members are added in float32."""
        assert self.apart is None, "a row's results are in several chunks"
        return combine_rows(rows_SD, *self._places(chunk))

    def collect_all(self, rows_C: Sequence[Tensor]) -> Tensor:
        """Those of all chunks together."""
        assert self.apart is not None
        return combine_rows(torch.cat(list(rows_C)), self.apart.all_TK.flatten(), self.place_TK.shape[1])

    def _places(self, chunk: int) -> tuple[Tensor, int]:
        place_TK = self.place_TK[self.of_chunk(chunk)]
        if self.apart is not None:
            place_TK = torch.where(self.apart.chunk_TK[self.of_chunk(chunk)] == chunk, place_TK, -1)
        return place_TK.flatten(), place_TK.shape[1]


@dataclass(frozen=True)
class Way:
    """Rows to their ranks and results back, leg by leg."""

    legs: tuple[Leg, ...]
    row_R: Tensor  # int64: rows as they arrive, chunk by chunk; where each stands in the order in which they are worked on

    @property
    def cut(self) -> Cut:
        return self.legs[0].cut

    def __len__(self) -> int:
        return len(self.cut)

    def arrived(self, chunk: int) -> slice:
        """The rows of a chunk among those that arrive."""
        received = [sum(splits.receive_W) for splits in self.legs[-1].splits]
        before = sum(received[:chunk])
        return slice(before, before + received[chunk])

    def there(self, x_TD: Tensor) -> Tensor:
        """All rows of a way in one chunk, one leg after the other: (T, D) -> (R, D)."""
        for leg in self.legs:
            x_TD = leg.send(leg.pack(x_TD, 0), 0).wait()
        return x_TD

    def back(self, y_RD: Tensor) -> Tensor:
        """And their results: (R, D) -> (T, D)."""
        for leg in reversed(self.legs):
            y_RD = leg.collect(leg.give_back(y_RD, 0).wait(), 0)
        return y_RD


@dataclass(frozen=True)
class Hop:
    """What does not depend on the chunks of a leg: numbers of all rows at once go back by it."""

    level: Level
    splits: Splits
    row_TK: Tensor  # int64: the sent row that carries a choice; the number of rows sent, of one that is absent
    source_R: Tensor  # int64: rows in the order in which they are worked on; where each stands by sender and order there

    def give_back(self, numbers_RK: Tensor) -> InFlight:
        """A number of each choice, in the order in which rows are worked on."""
        sorted_RK = torch.empty_like(numbers_RK)
        sorted_RK[self.source_R] = numbers_RK
        return InFlight(self.level, sorted_RK, self.splits, back=True)

    def collect(self, back: InFlight) -> Tensor:
        """(T, K); 0 of absent choices."""
        numbers_SK = back.wait()
        numbers_SK = torch.cat([numbers_SK, numbers_SK.new_zeros(1, numbers_SK.shape[1])])  # what an absent choice finds
        return numbers_SK.gather(0, self.row_TK)
