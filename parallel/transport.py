"""How experts and tokens get from rank to rank: as messages, which reach everywhere, or in memory that all ranks read.

Both give the same numbers: copies bit for bit, the sums of experts' gradients up to their order. Messages go over gloo or NCCL,
hop by hop across nodes. Memory is read over NVLink by the GPUs of one node, and as shared pages by processes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist

from kernels.errors import UserError
from parallel.peer_exchange import PeerTokens
from parallel.peer_experts import PeerExperts
from parallel.peer_memory import PeerMemory, within_reach
from parallel.placement import Ints, Placement
from parallel.sparse_collectives import (
    GatherPlan,
    Parts,
    Pending,
    Shapes,
    SparseAllGather,
    SparseReduceScatter,
    empty_parts,
    gather_plan,
)
from parallel.topology import World


class Gathering(Protocol):
    def finish(self) -> None:
        """Copies may be read from here on."""


class Returning(Protocol):
    def finish(self) -> list[tuple[int, Parts]]:
        """(expert, gradients to add) for this rank's own experts, in the order in which to add them."""


class Movement(Protocol):
    """The experts of a layer that move under one placement: SparseAllGather there, SparseReduceScatter back."""

    @property
    def num_sends(self) -> int:
        """Experts that leave this rank when copies are gathered."""

    @property
    def num_receives(self) -> int: ...

    def gather(self, slots: Mapping[int, int]) -> Gathering:
        """`slots`: in which row of this rank's arena its experts lie, and where copies shall."""

    def reduce(self, gradients: Parts, places: Mapping[int, int]) -> Returning:
        """`gradients` of this rank's experts, each at its place."""


class Transport(Protocol):
    """One rank's end. All ranks make the same calls in the same order."""

    @property
    def rows(self) -> Parts:
        """Where the arena's experts lie."""

    def make_room(self, rows: int, owned: int) -> None:
        """Rows for so many experts from here on; the first `owned` keep their values."""

    def quiesce(self) -> None:
        """Before owners change their rows: nobody reads them any more."""

    def movement(self, placement: Placement, row_E: Ints) -> Movement:
        """`row_E`: in which row of its owner's arena each expert lies."""

    def probe(self, nbytes: int, target: int, source: int) -> Callable[[], None]:
        """Moves so many bytes from this rank to `target` and to this rank from `source`, for who times it."""

    @property
    def tokens(self) -> PeerTokens | None:
        """What exchanges tokens in place; None: they travel as messages, which need no end (token_exchange.py)."""


def reads_peer_memory(wanted: Literal["auto", "messages", "peer_memory"], world: World) -> bool:
    """Whether ranks read each other's memory; auto: where all can. Collective.

    Raises UserError where that is wanted and out of reach.
    """
    if wanted == "messages" or world.size == 1:
        return False
    able = within_reach(world)
    if wanted == "peer_memory" and not able:
        raise UserError(
            f"parallel.transport=peer_memory, but the {world.size} ranks cannot read each other's memory: they have to be on "
            "one node, GPUs linked by NVLink; set parallel.transport=auto"
        )
    return able


def transport(world: World, hidden: int, rows: int, shapes: Shapes, dtype: torch.dtype, *, peer_memory: bool) -> Transport:
    """Room for `rows` experts, uninitialised, whose parts have `shapes`; tokens are `hidden` wide."""
    return PeerTransport(world, hidden, rows, shapes, dtype) if peer_memory else MessageTransport(world, rows, shapes, dtype)


@dataclass(frozen=True)
class MessageMovement:
    transport: MessageTransport
    plan: GatherPlan

    @property
    def num_sends(self) -> int:
        return self.plan.num_sends

    @property
    def num_receives(self) -> int:
        return self.plan.num_receives

    def gather(self, slots: Mapping[int, int]) -> Gathering:
        return SparseAllGather(self.plan, lambda expert: tuple(part[slots[expert]] for part in self.transport.rows))

    def reduce(self, gradients: Parts, places: Mapping[int, int]) -> Returning:
        return SparseReduceScatter(self.plan, lambda expert: tuple(part[places[expert]] for part in gradients))


class MessageTransport:
    """Over the process group."""

    def __init__(self, world: World, rows: int, shapes: Shapes, dtype: torch.dtype) -> None:
        self._world = world
        self._shapes, self._dtype = shapes, dtype
        self._rows = self._room(rows)

    def _room(self, rows: int) -> Parts:
        return empty_parts(rows, self._shapes, self._dtype, self._world.device)

    @property
    def rows(self) -> Parts:
        return self._rows

    def make_room(self, rows: int, owned: int) -> None:
        before, self._rows = self._rows, self._room(rows)
        for new, old in zip(self.rows, before, strict=True):
            new[:owned].copy_(old[:owned])

    def quiesce(self) -> None:
        """A message is a copy."""

    def movement(self, placement: Placement, row_E: Ints) -> Movement:
        return MessageMovement(self, gather_plan(placement, self._world.topology, self._world.rank))

    def probe(self, nbytes: int, target: int, source: int) -> Callable[[], None]:
        sent, received = (torch.zeros(nbytes, dtype=torch.uint8, device=self._world.device) for _ in range(2))
        return lambda: Pending([dist.P2POp(dist.isend, sent, target), dist.P2POp(dist.irecv, received, source)]).wait()

    @property
    def tokens(self) -> PeerTokens | None:
        return None


@dataclass(frozen=True)
class PeerMovement:
    experts: PeerExperts
    placement: Placement
    row_E: Ints

    @property
    def num_sends(self) -> int:
        return int(self.placement.beside_ED[self.placement.owner_E == self.experts.world.rank].sum())

    @property
    def num_receives(self) -> int:
        return int(self.placement.extra_D[self.experts.world.rank])

    def gather(self, slots: Mapping[int, int]) -> Gathering:
        return self.experts.gather(self.placement, self.row_E, slots)

    def reduce(self, gradients: Parts, places: Mapping[int, int]) -> Returning:
        return self.experts.reduce(self.placement, gradients, places)


class PeerTransport:
    """Within a node, in place."""

    def __init__(self, world: World, hidden: int, rows: int, shapes: Shapes, dtype: torch.dtype) -> None:
        self._world = world
        self._experts = PeerExperts(world, rows, shapes, dtype)
        self._tokens = PeerTokens(world, hidden, dtype)

    @property
    def rows(self) -> Parts:
        return self._experts.rows

    def make_room(self, rows: int, owned: int) -> None:
        self._experts.make_room(rows, owned)

    def quiesce(self) -> None:
        self._experts.quiesce()

    def movement(self, placement: Placement, row_E: Ints) -> Movement:
        return PeerMovement(self._experts, placement, row_E)

    def probe(self, nbytes: int, target: int, source: int) -> Callable[[], None]:
        memory = PeerMemory(self._world, nbytes)
        received = torch.zeros_like(memory.own)

        def pull() -> None:
            received.copy_(memory.of_rank[source])

        return pull

    @property
    def tokens(self) -> PeerTokens | None:
        return self._tokens
