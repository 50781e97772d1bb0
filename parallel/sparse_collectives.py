"""SparseAllGather and SparseReduceScatter: experts to where their copies are wanted, gradients of copies back to the owners.

Source: Hecate, arXiv 2502.02581, section 3.1. Both are batches of point-to-point messages, planned alike on every rank, so no
rank waits for one that has nothing to send. Across nodes they take two hops: owner to one leader on each other node, leader to
the other devices there, so an expert crosses each network card once. A leader adds its node's gradients in float32 before they
cross; owners add what arrives to theirs in the order of ranks, so the sums do not depend on who came first.

Letters: E experts of a layer, D devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from torch import Tensor

from parallel.placement import Placement, Topology

Parts = tuple[Tensor, ...]  # the tensors of one expert: gate_up_CD and down_DF, or their gradients


@dataclass(frozen=True)
class Message:
    expert: int
    peer: int


@dataclass(frozen=True)
class Hop:
    """What one rank sends and receives at once; both in ascending order of (expert, peer)."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True)
class GatherPlan:
    """One rank's part in the SparseAllGather of a layer; backwards, receives for sends, in the SparseReduceScatter."""

    across: Hop  # owner -> a leader on each other node
    within: Hop  # owner or leader -> the other devices of its node

    @property
    def num_sends(self) -> int:
        return len(self.across.sends) + len(self.within.sends)

    @property
    def num_receives(self) -> int:
        return len(self.across.receives) + len(self.within.receives)


def gather_plan(placement: Placement, topology: Topology, rank: int) -> GatherPlan:
    """A node's leader for an expert that another node owns is the lowest of its devices that get a copy."""
    across: tuple[list[Message], list[Message]] = ([], [])
    within: tuple[list[Message], list[Message]] = ([], [])

    def note(hop: tuple[list[Message], list[Message]], expert: int, source: int, destination: int) -> None:
        if source == rank:
            hop[0].append(Message(expert, destination))
        elif destination == rank:
            hop[1].append(Message(expert, source))

    for expert in np.flatnonzero(placement.copies_ED.sum(axis=1) > 1).tolist():
        owner = int(placement.owner_E[expert])
        by_node: dict[int, list[int]] = {}
        for device in np.flatnonzero(placement.copies_ED[expert]).tolist():
            by_node.setdefault(topology.node_of(device), []).append(device)
        for node, devices in by_node.items():
            source = owner if node == topology.node_of(owner) else devices[0]
            if source != owner:
                note(across, expert, owner, source)
            for device in devices:
                if device != source:
                    note(within, expert, source, device)
    return GatherPlan(Hop(tuple(across[0]), tuple(across[1])), Hop(tuple(within[0]), tuple(within[1])))


class Pending:
    """Messages under way. `wait` lets later work of this rank see what arrived; on a GPU it does not block the host."""

    def __init__(self, operations: list[dist.P2POp]) -> None:
        self._kept = [operation.tensor for operation in operations]  # alive until the messages are through
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._kept = [], []


def _operations(hop: Hop, send: Callable[[int], Parts], receive: Callable[[Message], Parts]) -> list[dist.P2POp]:
    """Messages between the same two ranks match by their order, and by tag where the transport has tags (gloo)."""
    operations = []
    for call, messages, parts in ((dist.isend, hop.sends, lambda m: send(m.expert)), (dist.irecv, hop.receives, receive)):
        for message in messages:
            for index, tensor in enumerate(parts(message)):
                operations.append(dist.P2POp(call, tensor, message.peer, tag=2 * message.expert + index))
    return operations


class SparseAllGather:
    """Brings copies of a layer's experts to this rank, and this rank's experts to others. All ranks start and finish it alike.

    `parts(expert)` gives the tensors of an expert here: the owner's are read, those of a copy are written; they must not change
    until `finish`.
    """

    def __init__(self, plan: GatherPlan, parts: Callable[[int], Parts]) -> None:
        self._plan, self._parts = plan, parts
        self._within: Pending | None = None
        self._across = Pending(_operations(plan.across, parts, lambda message: parts(message.expert)))
        # NCCL runs messages and collectives in the order of the calls, so a leader's second hop finds what the first brought,
        # and must not be called later than those of its peers. With gloo a leader has to wait before it may send.
        if not plan.across.receives or dist.get_backend() == "nccl":
            self._fan_out()

    def _fan_out(self) -> None:
        parts = self._parts
        self._within = Pending(_operations(self._plan.within, parts, lambda message: parts(message.expert)))

    def finish(self) -> None:
        """Returns when copies may be read. A leader passes on here what it received."""
        self._across.wait()
        if self._within is None:
            self._fan_out()
        assert self._within is not None
        self._within.wait()


class SparseReduceScatter:
    """Returns the gradients of a layer's copies. `parts(expert)` are the gradients here of an expert that is present."""

    def __init__(self, plan: GatherPlan, parts: Callable[[int], Parts]) -> None:
        self._plan, self._parts = plan, parts
        self._arrived: dict[Message, Parts] = {}
        self._sums: dict[int, Parts] = {}
        self._within = Pending(_operations(_reverse(plan.within), parts, self._room))

    def _room(self, message: Message) -> Parts:
        self._arrived[message] = tuple(part.new_empty(part.shape) for part in self._parts(message.expert))
        return self._arrived[message]

    def finish(self) -> list[tuple[int, Parts]]:
        """(expert, gradients to add) for this rank's own experts, in the order in which to add them."""
        self._within.wait()
        from_node = _by_expert(self._plan.within.sends, self._arrived)
        leads = {message.expert for message in self._plan.across.receives}
        for expert in leads:
            self._sums[expert] = tuple(
                sum((part.float() for part in parts[1:]), parts[0].float())
                for parts in zip(self._parts(expert), *from_node.pop(expert, []), strict=True)
            )
        remote: dict[Message, Parts] = {}

        def room(message: Message) -> Parts:
            remote[message] = tuple(part.float().new_empty(part.shape) for part in self._parts(message.expert))
            return remote[message]

        across = Pending(_operations(_reverse(self._plan.across), lambda expert: self._sums[expert], room))
        across.wait()
        from_nodes = _by_expert(self._plan.across.sends, remote)
        experts = sorted(from_node.keys() | from_nodes.keys())
        return [(e, parts) for e in experts for parts in (*from_node.get(e, []), *from_nodes.get(e, []))]


def _reverse(hop: Hop) -> Hop:
    return Hop(sends=hop.receives, receives=hop.sends)


def _by_expert(messages: Sequence[Message], arrived: dict[Message, Parts]) -> dict[int, list[Parts]]:
    found: dict[int, list[Parts]] = {}
    for message in messages:
        found.setdefault(message.expert, []).append(arrived[message])
    return found
