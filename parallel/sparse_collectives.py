"""SparseAllGather and SparseReduceScatter: experts to where their copies are wanted, gradients of copies back to the owners.

Source: Hecate, arXiv 2502.02581, section 3.1. Both are batches of point-to-point messages with the same plan on every rank, so
no rank waits for one that has nothing to send. They go hop by hop (routes.py), so an expert crosses the network into each node
once. On the way back every hop adds in float32 what came to it before it passes it on, in the order of ranks, so the sums do
not depend on who came first.

Letters: E experts of a layer, D devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.placement import Ints, Placement, Topology
from parallel.routes import WHOLE, routes

Parts = tuple[Tensor, ...]  # the tensors of one expert: gate_up_CD and down_DF, or their gradients
Shapes = tuple[tuple[int, ...], ...]  # of the parts of one expert


def empty_parts(experts: int, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Parts:
    """Room for the parts of this many experts, uninitialised."""
    return tuple(torch.empty(experts, *shape, dtype=dtype, device=device) for shape in shapes)


@dataclass(frozen=True)
class Message:
    expert: int
    peer: int
    half: int  # or WHOLE

    def of(self, parts: Parts) -> Parts:
        """What it carries of an expert's tensors."""
        if self.half == WHOLE:
            return parts
        return tuple(part[: len(part) // 2] if self.half == 0 else part[len(part) // 2 :] for part in parts)

    @property
    def experts(self) -> float:
        return 1.0 if self.half == WHOLE else 0.5


@dataclass(frozen=True)
class Hop:
    """What one rank sends and receives at once; both in ascending order of (expert, peer, half)."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True)
class GatherPlan:
    """One rank's part in the SparseAllGather of a layer; backwards, receives for sends, in the SparseReduceScatter."""

    across: tuple[Hop, ...]  # from node to node
    within: Hop  # owner or leader -> the other devices of its node

    @property
    def hops(self) -> tuple[Hop, ...]:
        return (*self.across, self.within)

    @property
    def num_sends(self) -> float:
        """Experts."""
        return sum(message.experts for hop in self.hops for message in hop.sends)

    @property
    def num_receives(self) -> float:
        return sum(message.experts for hop in self.hops for message in hop.receives)


def gather_plan(placement: Placement, topology: Topology, rank: int) -> GatherPlan:
    """This rank's messages of all that travel."""

    every = routes(placement, topology)

    def mine(hop: int, here_M: Ints, peer_M: Ints) -> tuple[Message, ...]:
        found = np.flatnonzero((every.hop_M == hop) & (here_M == rank))
        columns = (numbers_M[found].tolist() for numbers_M in (every.expert_M, peer_M, every.half_M))
        return tuple(Message(*one) for one in sorted(zip(*columns, strict=True)))

    hops = [
        Hop(sends=mine(hop, every.source_M, every.target_M), receives=mine(hop, every.target_M, every.source_M))
        for hop in range(every.across + 1)
    ]
    return GatherPlan(tuple(hops[:-1]), hops[-1])


class Pending:
    """Messages under way. `wait` lets later work of this rank see what arrived; on a GPU it does not block the host."""

    def __init__(self, operations: list[dist.P2POp]) -> None:
        self._kept = [operation.tensor for operation in operations]  # alive until the messages are through
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._kept = [], []


def _operations(hop: Hop, send: Callable[[Message], Parts], receive: Callable[[Message], Parts]) -> list[dist.P2POp]:
    """Messages between the same two ranks match by their order, and by tag where the transport has tags (gloo); receives first
    (all_to_all.py)."""
    operations = []
    for call, messages, parts in ((dist.irecv, hop.receives, receive), (dist.isend, hop.sends, send)):
        for message in messages:
            for index, tensor in enumerate(parts(message)):
                tag = 2 * (3 * message.expert + message.half) + index
                operations.append(dist.P2POp(call, tensor, message.peer, tag=tag))
    return operations


class SparseAllGather:
    """Brings copies of a layer's experts to this rank, and this rank's experts to others. All ranks start and finish it alike.

    `parts(expert)` gives the tensors of an expert here: the owner's are read, those of a copy are written; they must not change
    until `finish`.
    """

    def __init__(self, plan: GatherPlan, parts: Callable[[int], Parts]) -> None:
        self._parts = parts
        self._hops = list(plan.hops)
        self._pending: list[Pending] = []
        # NCCL runs messages and collectives in the order of the calls, so a hop finds what those before it brought, and must
        # not be called later than on its peers. With gloo a rank has to wait for what it received before it may send it on.
        self._in_order = dist.get_backend() == "nccl"
        self._advance()

    def _carried(self, message: Message) -> Parts:
        return message.of(self._parts(message.expert))

    def _advance(self) -> None:
        """Starts hops up to the one that the next has to wait for."""
        while self._hops:
            hop = self._hops.pop(0)
            self._pending.append(Pending(_operations(hop, self._carried, self._carried)))
            if hop.receives and not self._in_order:
                return

    def finish(self) -> None:
        """Returns when copies may be read. A leader passes on here what it received."""
        while self._pending:
            for pending in self._pending:
                pending.wait()
            self._pending = []
            self._advance()


class SparseReduceScatter:
    """Returns the gradients of a layer's copies. `parts(expert)` are the gradients here of an expert that is present."""

    def __init__(self, plan: GatherPlan, parts: Callable[[int], Parts]) -> None:
        self._plan, self._parts = plan, parts
        self._arrived: dict[Message, Parts] = {}
        self._within = Pending(_operations(_reverse(plan.within), lambda message: parts(message.expert), self._room))

    def _room(self, message: Message) -> Parts:
        self._arrived[message] = tuple(part.new_empty(part.shape) for part in self._parts(message.expert))
        return self._arrived[message]

    def finish(self) -> list[tuple[int, Parts]]:
        """See transport.Returning; one at a time."""
        self._within.wait()
        home = _by_expert(self._plan.within.sends, self._arrived)
        leads = sorted({message.expert for hop in self._plan.across for message in hop.receives})
        sums = {expert: _sum(self._parts(expert), home.pop(expert, [])) for expert in leads}
        own: dict[int, Parts] = {}  # what comes from other nodes for own experts, both halves together
        for hop in reversed(self._plan.across):
            arrived: dict[Message, Parts] = {}

            def room(message: Message, arrived: dict[Message, Parts] = arrived) -> Parts:
                if message.expert in sums:
                    arrived[message] = tuple(torch.empty_like(part) for part in message.of(sums[message.expert]))
                    return arrived[message]
                if message.expert not in own:
                    own[message.expert] = tuple(part.float().new_empty(part.shape) for part in self._parts(message.expert))
                return message.of(own[message.expert])

            Pending(_operations(_reverse(hop), lambda message: message.of(sums[message.expert]), room)).wait()
            for message, parts in arrived.items():
                for total, part in zip(message.of(sums[message.expert]), parts, strict=True):
                    total += part
        for expert, parts in own.items():
            home.setdefault(expert, []).append(parts)
        return [(expert, tuple(part.unsqueeze(0) for part in parts)) for expert in sorted(home) for parts in home[expert]]


def _sum(first: Parts, others: Sequence[Parts]) -> Parts:
    """In float32, one after the other, in tensors of their own."""
    totals = tuple(part.to(torch.float32, copy=True) for part in first)
    for parts in others:
        for total, part in zip(totals, parts, strict=True):
            total += part
    return totals


def _reverse(hop: Hop) -> Hop:
    return Hop(sends=hop.receives, receives=hop.sends)


def _by_expert(messages: Sequence[Message], arrived: dict[Message, Parts]) -> dict[int, list[Parts]]:
    found: dict[int, list[Parts]] = {}
    for message in messages:
        found.setdefault(message.expert, []).append(arrived[message])
    return found
