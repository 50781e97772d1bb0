"""SparseAllGather and SparseReduceScatter without messages: ranks copy weights and gradients out of each other's memory.

All ranks can read the arena's rows, so a rank fetches the copies that it needs with the GPU's copy engines, on a stream of
their own, while it computes. Gradients of copies are laid out for their owner, which fetches and adds them in the same order as
those that come as messages (sparse_collectives.py): by expert, then by rank, each sum in float32.

Letters: E experts of a layer, D devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from parallel.peer_memory import PeerMemory, view
from parallel.placement import Ints, Placement
from parallel.sparse_collectives import Parts, Shapes, empty_parts
from parallel.topology import World

FEW = 4  # copies. More take turns in two streams: between copies of some megabytes one leaves the link idle a sixth of the time


class PeerRoom:
    """Room for this many experts on each rank, which all ranks read. Made by all ranks together."""

    def __init__(self, world: World, experts: int, shapes: Shapes, dtype: torch.dtype) -> None:
        sizes = [experts * torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        self.memory = PeerMemory(world, max(sum(sizes), 1))
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        places = list(zip(starts, shapes, strict=True))
        self.of_rank: list[Parts] = [
            tuple(view(block, start, (experts, *shape), dtype) for start, shape in places) for block in self.memory.of_rank
        ]
        self.experts = experts


Copies = list[tuple[torch.Tensor, torch.Tensor]]  # (target, source)


class Background:
    """Copies beside what the device computes: on a GPU in streams of their own, on a CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def copy(self, copies: Copies, before: Callable[[], None], behind: Callable[[], None]) -> Callable[[], None]:
        """Starts `before`, the copies and `behind`, one after the other, behind what was started so far.

        The result lets what is started later wait for them.
        """
        if not self._streams:
            before()
            _copied(copies)
            behind()
            return lambda: None
        first, second = self._streams
        first.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(first):
            before()
            if len(copies) <= FEW:
                _copied(copies)
            else:
                second.wait_stream(first)
                _copied(copies[::2])
                with torch.cuda.stream(second):
                    _copied(copies[1::2])
                first.wait_stream(second)
            behind()
            done = first.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)


def _copied(copies: Copies) -> None:
    for target, source in copies:
        target.copy_(source, non_blocking=True)


@dataclass(frozen=True)
class Copied:
    """A fetch under way."""

    wait: Callable[[], None]

    def finish(self) -> None:
        """Copies may be read by what is started from here on."""
        self.wait()


@dataclass(frozen=True)
class Returned:
    """Gradients under way."""

    wait: Callable[[], None]
    arrived: list[tuple[int, Parts]]

    def finish(self) -> list[tuple[int, Parts]]:
        """See transport.Returning."""
        self.wait()
        return self.arrived


class PeerExperts:
    """The arena's rows in memory that all ranks read. All ranks make the same calls in the same order."""

    def __init__(self, world: World, rows: int, shapes: Shapes, dtype: torch.dtype) -> None:
        self.world, self._shapes, self._dtype = world, shapes, dtype
        self._background = Background(world.device)
        self._staging: PeerRoom | None = None
        self._room(rows)

    def _room(self, rows: int) -> None:
        self._rows = PeerRoom(self.world, rows, self._shapes, self._dtype)
        self._fresh = False  # whether all ranks know that the owners' rows are what they shall be

    @property
    def rows(self) -> Parts:
        return self._rows.of_rank[self.world.rank]

    def make_room(self, rows: int) -> None:
        """Rows for this many experts, uninitialised; those before are gone first."""
        self.quiesce()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # what is started reads them until then
        del self._rows
        self._room(rows)

    def quiesce(self) -> None:
        """Before owners change their rows: all have read them."""
        self._background.copy([], self._barrier, _nothing)()
        self._fresh = False

    def _barrier(self) -> None:
        self._rows.memory.meet()

    def gather(self, placement: Placement, row_E: Ints, slots: Mapping[int, int]) -> Copied:
        """Fetches this rank's copies.

        Args:
            row_E: in which row of its owner's arena each expert lies.
            slots: in which row of this rank's arena it shall.
        """
        here = placement.beside_ED[:, self.world.rank].nonzero()[0].tolist()
        moves = [(slots[expert], int(placement.owner_E[expert]), int(row_E[expert])) for expert in here]
        copies = [
            (own[to : to + count], part[row : row + count])
            for to, owner, row, count in _runs(moves)
            for own, part in zip(self.rows, self._rows.of_rank[owner], strict=True)
        ]
        news = bool(placement.extra_D.any()) and not self._fresh
        self._fresh |= news
        if not (copies or news):
            return Copied(_nothing)
        return Copied(self._background.copy(copies, self._barrier if news else _nothing, _nothing))

    def expect_gradients(self, copies: int) -> None:
        """See transport.Transport."""
        if copies > (self._staging.experts if self._staging else 0):
            self._staging = PeerRoom(self.world, copies, self._shapes, self._dtype)

    def reduce(self, way_home: WayHome, gradients: Parts) -> Returned:
        """Returns the gradients of copies, which are the last ones, to the owners. The call before must be finished."""
        if way_home.most == 0:
            return Returned(_nothing, [])
        staging = self._staging
        assert staging and staging.experts >= way_home.most, "gradients of this many copies have been expected"
        if way_home.shown:
            for target, part in zip(staging.of_rank[self.world.rank], gradients, strict=True):
                target[: way_home.shown].copy_(part[-way_home.shown :])
        room = empty_parts(way_home.coming, self._shapes, self._dtype, self.world.device)
        copies = [
            (target[to : to + count], part[place : place + count])
            for to, device, place, count in way_home.moves
            for target, part in zip(room, staging.of_rank[device], strict=True)
        ]
        arrived = [(expert, tuple(part[at : at + count] for part in room)) for expert, at, count in way_home.sums]

        def barrier() -> None:
            staging.memory.meet()  # the second time because it may be written again

        return Returned(self._background.copy(copies, barrier, barrier), arrived)


@dataclass(frozen=True)
class WayHome:
    """How the gradients of a layer's copies come to this rank: in rounds, of each own expert the first copy, then the second,
    so that what is added at once is adjacent, and every sum is in the order of ranks."""

    most: int  # copies that any rank shows
    shown: int  # copies that this one does, in the order of experts
    coming: int  # gradients that come to this rank
    moves: list[tuple[int, int, int, int]]  # (place here, from which rank, place there, how many that follow each other)
    sums: list[tuple[int, int, int]]  # (first own expert, place here, how many own experts that follow each other)


def way_home(placement: Placement, rank: int) -> WayHome:
    beside_ED, mine_E = placement.beside_ED, placement.owner_E == rank
    if not beside_ED.any():
        return WayHome(0, 0, 0, [], [])
    place_ED = beside_ED.cumsum(axis=0) - 1  # of each copy among those of its rank
    experts_C, from_C = (beside_ED & mine_E[:, None]).nonzero()
    round_C = beside_ED.cumsum(axis=1)[experts_C, from_C]
    in_turn = np.lexsort((experts_C, round_C))
    experts_C, from_C, round_C = experts_C[in_turn], from_C[in_turn], round_C[in_turn]
    there = zip(from_C.tolist(), place_ED[experts_C, from_C].tolist(), strict=True)
    breaks_C = (np.diff(mine_E.cumsum()[experts_C], prepend=-1) != 1) | (np.diff(round_C, prepend=0) != 0)
    bounds = [*breaks_C.nonzero()[0].tolist(), len(experts_C)]
    return WayHome(
        most=int(placement.extra_D.max()),
        shown=int(placement.extra_D[rank]),
        coming=len(experts_C),
        moves=_runs([(place, *at) for place, at in enumerate(there)]),
        sums=[(int(experts_C[start]), start, end - start) for start, end in pairwise(bounds)],
    )


def _runs(moves: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
    """(row here, owner, row there) of single experts -> the same with how many follow each other on both sides."""
    runs: list[tuple[int, int, int, int]] = []
    for to, owner, row in sorted(moves):
        if runs:
            first, last_owner, first_row, count = runs[-1]
            if (to, owner, row) == (first + count, last_owner, first_row + count):
                runs[-1] = first, owner, first_row, count + 1
                continue
        runs.append((to, owner, row, 1))
    return runs


def _nothing() -> None:
    pass
