"""Which way copies go: from owners to a leader on each node, then to the other devices there. Pure.

Source: Hecate, arXiv 2502.02581, section 3.1 names the operation and leaves its routes open. Here an expert enters a node once,
whatever number of devices there wants it, and nodes pass it on in a binomial tree: n nodes take log2(n) hops, and no owner of a
hot expert sends it to all of them.

Letters: E experts of a layer, D devices, M messages, H pairs of an expert and a device that has it, C of an expert and a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.placement import Ints, Placement, Topology


@dataclass(frozen=True)
class Routes:
    """What travels, and in which hop of those that follow each other: 0 .. `across` - 1 between nodes, `across` within them."""

    across: int
    hop_M: Ints
    expert_M: Ints
    source_M: Ints
    target_M: Ints


def routes(placement: Placement, topology: Topology) -> Routes:
    """A node's leader for an expert is its owner, or one of the node's devices that get a copy, another one for each expert.

    In each hop between nodes every one that has an expert passes it on to one that has not: the owner's node comes first, the
    others in ascending order from there on, going round.
    """
    (expert_H, device_H), owner_E, devices = placement.holders, placement.owner_E, topology.devices
    cell_H = expert_H * topology.nodes + device_H // topology.devices_per_node
    first_H = np.ones(len(cell_H), dtype=np.bool_)  # where a C begins
    first_H[1:] = cell_H[1:] != cell_H[:-1]
    late_H = (device_H - expert_H) % topology.devices_per_node
    late_H[device_H == owner_E[expert_H]] = -1
    leader_C = np.minimum.reduceat(late_H * devices + device_H, np.flatnonzero(first_H)) % devices
    leader_H = leader_C[first_H.cumsum() - 1]
    led_H = leader_H != device_H

    expert_C = expert_H[first_H]
    nodes_E = np.bincount(expert_C)
    start_C = (nodes_E.cumsum() - nodes_E)[expert_C]
    place_C = np.arange(len(expert_C)) - start_C
    home_C = np.flatnonzero(leader_C == owner_E[expert_C])[expert_C]
    leader_C = leader_C[start_C + (home_C - start_C + place_C) % nodes_E[expert_C]]  # in the order in which nodes are reached
    reached = np.flatnonzero(place_C)
    hop_M = np.frexp(place_C[reached])[1].astype(np.int64) - 1  # 2^h nodes have the expert before hop h
    across, source_M = int(hop_M.max(initial=-1)) + 1, leader_C[reached - (1 << hop_M)]
    return Routes(
        across=across,
        hop_M=np.concatenate([hop_M, np.full(np.count_nonzero(led_H), across)]),
        expert_M=np.concatenate([expert_C[reached], expert_H[led_H]]),
        source_M=np.concatenate([source_M, leader_H[led_H]]),
        target_M=np.concatenate([leader_C[reached], device_H[led_H]]),
    )
