"""How experts and tokens get from rank to rank: as messages, which reach everywhere, or in memory that all ranks read.

All give the same numbers: copies bit for bit, sums up to their order. Messages go over gloo or NCCL, hop by hop across nodes;
of nodes with several ranks tokens may do so too (two_level_exchange.py). Memory is read over NVLink by GPUs of one node, and
as shared pages by processes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist

from kernels.errors import UserError
from parallel.hooks import Hooks
from parallel.peer_exchange import PeerTokens
from parallel.peer_experts import PeerExperts, WayHome, way_home
from parallel.peer_memory import PeerMemory, within_reach
from parallel.placement import Ints, Placement, Topology, TransportKind
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
from parallel.two_level_exchange import check_two_levels, has_two_levels, two_levels
from parallel.ways import Levels, one_level


class Gathering(Protocol):
    def finish(self) -> None:
        """Copies may be read from here on."""


class Returning(Protocol):
    def finish(self) -> list[tuple[int, Parts]]:
        """(expert, gradients (N, ...) to add) for this rank's own experts, that one and the N - 1 own ones after it, in the
        order in which to add them."""


class Movement(Protocol):
    """The experts of a layer that move under one placement: SparseAllGather there, SparseReduceScatter back."""

    @property
    def num_sends(self) -> float:
        """Experts that leave this rank when copies are gathered; halves count as such."""

    @property
    def num_receives(self) -> float: ...

    def gather(self, slots: Mapping[int, int]) -> Gathering:
        """`slots`: in which row of this rank's arena its experts lie, and where copies shall."""

    def reduce(self, gradients: Parts, places: Mapping[int, int]) -> Returning:
        """`gradients` of this rank's experts, each at its place: after own ones, those of copies in the order of experts."""


class Transport(Protocol):
    """One rank's end. All ranks make the same calls in the same order."""

    @property
    def rows(self) -> Parts:
        """Where the arena's experts lie."""

    def make_room(self, rows: int) -> None:
        """Rows for this many experts from here on, uninitialised; those before are gone first."""

    def quiesce(self) -> None:
        """Before owners change their rows: nobody reads them any more."""

    def movement(self, placement: Placement, row_E: Ints) -> Movement:
        """`row_E`: in which row of its owner's arena each expert lies."""

    def expect_gradients(self, copies: int) -> None:
        """Of this many copies of a layer, on any rank, before the forward pass whose backward pass brings them home. Collective
        where memory for them has to grow, which must not happen later: hosts would wait for each other, and each for all that
        its GPU has been given, while slices of dense gradients wait there for peers."""

    def probe(self, nbytes: int, target: int, source: int) -> Callable[[], None]:
        """Moves this many bytes from this rank to `target` and to this rank from `source`, for who times it."""

    def travel(self, kind: TransportKind) -> None:
        """From here on tokens travel so, if they travel as messages. Collective."""

    @property
    def tokens(self) -> PeerTokens | Levels:
        """What exchanges the tokens of a whole layer in place; or the levels over which they travel as messages, which may go
        in chunks (token_exchange.py)."""


def transport_kind(wanted: Literal["auto"] | TransportKind, world: World) -> TransportKind:
    """What `wanted` means in this world: auto reads memory where all ranks can, and else sends messages, in two levels where
    several nodes have several ranks each, until it is known what takes less (`alternatives`). Collective.

    Raises UserError where the ranks do not lie as it is wanted.
    """
    if wanted == "messages" or world.size == 1:
        return "messages"
    if wanted == "two_level":
        check_two_levels(world.topology)
        return "two_level"
    in_reach = within_reach(world)
    if wanted == "peer_memory" and not in_reach:
        raise UserError(
            f"parallel.transport=peer_memory, but the {world.size} ranks cannot read each other's memory: they have to be on "
            "one node, GPUs linked by NVLink; set parallel.transport=auto"
        )
    return auto_kind(world.topology, in_reach=in_reach)


def auto_kind(topology: Topology, *, in_reach: bool) -> TransportKind:
    """What auto means at first. `in_reach`: whether ranks can read each other's memory."""
    if in_reach:
        return "peer_memory"
    return "two_level" if has_two_levels(topology) else "messages"


def alternatives(wanted: Literal["auto"] | TransportKind, kind: TransportKind) -> tuple[TransportKind, ...]:
    """What tokens may travel by, where `wanted` means `kind` at first: who measures decides (scheduling.py)."""
    return ("messages", "two_level") if wanted == "auto" and kind == "two_level" else (kind,)


def transport(
    world: World, hidden: int, rows: int, shapes: Shapes, dtype: torch.dtype, kind: TransportKind, hooks: Hooks
) -> Transport:
    """Room for `rows` experts, uninitialised, whose parts have `shapes`; tokens are `hidden` wide. `hooks`: of messages."""
    if kind == "peer_memory":
        return PeerTransport(world, hidden, rows, shapes, dtype)
    return MessageTransport(world, rows, shapes, dtype, kind, hooks)


@dataclass(frozen=True)
class MessageMovement:
    transport: MessageTransport
    plan: GatherPlan

    @property
    def num_sends(self) -> float:
        return self.plan.num_sends

    @property
    def num_receives(self) -> float:
        return self.plan.num_receives

    def gather(self, slots: Mapping[int, int]) -> Gathering:
        return SparseAllGather(self.plan, lambda expert: tuple(part[slots[expert]] for part in self.transport.rows))

    def reduce(self, gradients: Parts, places: Mapping[int, int]) -> Returning:
        return SparseReduceScatter(self.plan, lambda expert: tuple(part[places[expert]] for part in gradients))


class MessageTransport:
    """Over process groups."""

    def __init__(self, world: World, rows: int, shapes: Shapes, dtype: torch.dtype, kind: TransportKind, hooks: Hooks) -> None:
        self._world, self._hooks = world, hooks
        self._shapes, self._dtype = shapes, dtype
        self._rows: Parts = self._room(rows)
        self._made: dict[TransportKind, Levels] = {}
        self.travel(kind)

    def _room(self, rows: int) -> Parts:
        return empty_parts(rows, self._shapes, self._dtype, self._world.device)

    @property
    def rows(self) -> Parts:
        return self._rows

    def make_room(self, rows: int) -> None:
        self._rows = ()
        self._rows = self._room(rows)

    def quiesce(self) -> None:
        """A message is a copy."""

    def movement(self, placement: Placement, row_E: Ints) -> Movement:
        return MessageMovement(self, gather_plan(placement, self._world.topology, self._world.rank))

    def expect_gradients(self, copies: int) -> None:
        """Messages need no memory that peers know."""

    def probe(self, nbytes: int, target: int, source: int) -> Callable[[], None]:
        sent, received = (torch.zeros(nbytes, dtype=torch.uint8, device=self._world.device) for _ in range(2))
        return lambda: Pending([dist.P2POp(dist.isend, sent, target), dist.P2POp(dist.irecv, received, source)]).wait()

    def travel(self, kind: TransportKind) -> None:
        if kind not in self._made:
            levels_of = two_levels if kind == "two_level" else one_level
            self._made[kind] = levels_of(self._world, self._hooks)
        self._levels = self._made[kind]

    @property
    def tokens(self) -> Levels:
        return self._levels


@dataclass(frozen=True)
class PeerMovement:
    experts: PeerExperts
    placement: Placement
    row_E: Ints
    way_home: WayHome  # of every micro-batch

    @property
    def num_sends(self) -> float:
        return self.way_home.coming

    @property
    def num_receives(self) -> float:
        return self.way_home.shown

    def gather(self, slots: Mapping[int, int]) -> Gathering:
        return self.experts.gather(self.placement, self.row_E, slots)

    def reduce(self, gradients: Parts, places: Mapping[int, int]) -> Returning:
        return self.experts.reduce(self.way_home, gradients)


class PeerTransport:
    """Within a node, in place."""

    def __init__(self, world: World, hidden: int, rows: int, shapes: Shapes, dtype: torch.dtype) -> None:
        self._world = world
        self._experts = PeerExperts(world, rows, shapes, dtype)
        self._tokens = PeerTokens(world, hidden, dtype)

    @property
    def rows(self) -> Parts:
        return self._experts.rows

    def make_room(self, rows: int) -> None:
        self._experts.make_room(rows)

    def quiesce(self) -> None:
        self._experts.quiesce()

    def movement(self, placement: Placement, row_E: Ints) -> Movement:
        return PeerMovement(self._experts, placement, row_E, way_home(placement, self._world.rank))

    def expect_gradients(self, copies: int) -> None:
        self._experts.expect_gradients(copies)

    def probe(self, nbytes: int, target: int, source: int) -> Callable[[], None]:
        memory = PeerMemory(self._world, nbytes)
        received = torch.zeros_like(memory.own)

        def pull() -> None:
            received.copy_(memory.of_rank[source])

        return pull

    def travel(self, kind: TransportKind) -> None:
        assert kind == "peer_memory", f"there are no process groups for {kind}"

    @property
    def tokens(self) -> PeerTokens:
        return self._tokens
