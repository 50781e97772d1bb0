"""Which way copies go: from owners to a leader on each node, then to the other devices there. Pure.

Source: Hecate, arXiv 2502.02581, section 3.1 names the operation and leaves its routes open. Here an expert enters a node once,
whatever number of devices there wants it, and nodes pass it on in a binomial tree: n nodes take log2(n) hops, and no owner of a
hot expert sends it to all of them.

Letters: E experts of a layer, D devices, M messages of a hop, C pairs of an expert and a node that has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.placement import Ints, Placement, Topology


@dataclass(frozen=True)
class Messages:
    """What travels in one hop, sorted by expert, then by target."""

    expert_M: Ints
    source_M: Ints
    target_M: Ints


@dataclass(frozen=True)
class Routes:
    across: tuple[Messages, ...]  # one hop after the other
    within: Messages  # after all of them

    @property
    def hops(self) -> tuple[Messages, ...]:
        return (*self.across, self.within)


def routes(placement: Placement, topology: Topology) -> Routes:
    """A node's leader for an expert is its owner, or one of the node's devices that get a copy, another one for each expert.

    In each hop between nodes every one that has an expert passes it on to one that has not: the owner's node comes first, the
    others in ascending order from there on, going round.
    """
    expert_H, device_H = np.nonzero(placement.copies_ED)
    several = np.bincount(expert_H, minlength=len(placement.owner_E))[expert_H] > 1
    expert_H, device_H = expert_H[several], device_H[several]
    owner_H, node_H = placement.owner_E[expert_H], device_H // topology.devices_per_node
    turn_H = (node_H - owner_H // topology.devices_per_node) % topology.nodes
    late_H = (device_H - expert_H) % topology.devices_per_node
    order_H = np.lexsort((late_H, device_H != owner_H, turn_H, expert_H))  # by expert, by node, the leader first
    expert_H, device_H, turn_H = expert_H[order_H], device_H[order_H], turn_H[order_H]
    leads_H = np.ones(len(expert_H), dtype=np.bool_)
    leads_H[1:] = (np.diff(expert_H) != 0) | (np.diff(turn_H) != 0)
    leader_H = device_H[leads_H][leads_H.cumsum() - 1]
    within = _sorted(expert_H[~leads_H], leader_H[~leads_H], device_H[~leads_H])

    expert_C, leader_C = expert_H[leads_H], device_H[leads_H]
    first_C = np.searchsorted(expert_C, expert_C)
    place_C = np.arange(len(expert_C)) - first_C
    across, have = [], 1
    while have <= place_C.max(initial=0):
        target = np.flatnonzero((place_C >= have) & (place_C < 2 * have))
        across.append(_sorted(expert_C[target], leader_C[target - have], leader_C[target]))
        have *= 2
    return Routes(tuple(across), within)


def _sorted(expert_M: Ints, source_M: Ints, target_M: Ints) -> Messages:
    order_M = np.lexsort((target_M, expert_M))
    return Messages(expert_M[order_M], source_M[order_M], target_M[order_M])
