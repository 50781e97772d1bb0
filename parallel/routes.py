"""Routes of copies: from owners to a leader on each node, then to the other devices there. Pure.

Source: Hecate, arXiv 2502.02581, section 3.1 names the operation and leaves its routes open. Here an expert enters a node once,
however many of its devices want it, in two halves, and each half has its own binary tree of nodes. A node that passes on in one
tree is a leaf of the other (Sanders, Speck, Traeff, Parallel Computing 35, 2009), so no node sends more of an expert than it
receives, an owner sends it once, and n nodes take log2(n) hops.

Letters: E experts of a layer, D devices, M messages, H pairs of an expert and a device that has it, C of an expert and a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.placement import Ints, Placement, Placements, Topology

WHOLE = 2


@dataclass(frozen=True)
class Routes:
    """What travels, and in which hop of those that follow each other: 0 .. `across` - 1 between nodes, `across` within them."""

    across: int
    hop_M: Ints
    expert_M: Ints
    half_M: Ints  # which half of the expert; WHOLE within nodes
    source_M: Ints
    target_M: Ints


def routes(placement: Placement, topology: Topology) -> Routes:
    """A node's leader for an expert is its owner, or one of the node's devices that get a copy, another one for each expert.

    The nodes that want an expert stand in ascending order from the owner's on, going round, and are numbered from 1. Number n
    has half 0 from number n // 2, number 1 from the owner; half 1 goes the same way from the other end of the row.
    """
    return routes_of(Placements.of(placement), topology)


def routes_of(placements: Placements, topology: Topology) -> Routes:
    """`routes` of several layers at once; experts are counted through all of them, and `across` is the most of a layer."""
    (expert_H, device_H), owner_E = placements.holders, placements.owner_LE.ravel()
    experts, devices = placements.owner_LE.shape[1], topology.devices
    if topology.nodes == 1:  # owners lead
        led_H = owner_E[expert_H] != device_H
        expert_M = expert_H[led_H]
        hop_M, half_M = np.zeros_like(expert_M), np.full_like(expert_M, WHOLE)
        return Routes(0, hop_M, expert_M, half_M, owner_E[expert_M], device_H[led_H])
    cell_H = expert_H * topology.nodes + device_H // topology.devices_per_node
    first_H = np.ones(len(cell_H), dtype=np.bool_)  # where a C begins
    first_H[1:] = cell_H[1:] != cell_H[:-1]
    late_H = (device_H - expert_H % experts) % topology.devices_per_node
    late_H[device_H == owner_E[expert_H]] = -1
    leader_C = np.minimum.reduceat(late_H * devices + device_H, np.flatnonzero(first_H)) % devices
    leader_H = leader_C[first_H.cumsum() - 1]
    led_H = leader_H != device_H

    expert_C = expert_H[first_H]
    nodes_E = np.bincount(expert_C)
    start_C = (nodes_E.cumsum() - nodes_E)[expert_C]
    place_C = np.arange(len(expert_C)) - start_C
    home_C = np.flatnonzero(leader_C == owner_E[expert_C])[expert_C]
    leader_C = leader_C[start_C + (home_C - start_C + place_C) % nodes_E[expert_C]]  # in that order, the owner's first
    reached = np.flatnonzero(place_C)
    forth_M, last_M, owner_M = place_C[reached], nodes_E[expert_C[reached]], start_C[reached]
    back_M = last_M - forth_M
    forth_from_M, back_from_M = owner_M + forth_M // 2, owner_M + np.where(back_M == 1, 0, last_M - back_M // 2)
    hop_M = np.frexp(np.concatenate([forth_M, back_M]))[1].astype(np.int64) - 1
    across, inside = int(hop_M.max(initial=-1)) + 1, int(np.count_nonzero(led_H))
    return Routes(
        across=across,
        hop_M=np.concatenate([hop_M, np.full(inside, across)]),
        expert_M=np.concatenate([expert_C[reached], expert_C[reached], expert_H[led_H]]),
        half_M=np.repeat([0, 1, WHOLE], [len(reached), len(reached), inside]),
        source_M=np.concatenate([leader_C[forth_from_M], leader_C[back_from_M], leader_H[led_H]]),
        target_M=np.concatenate([leader_C[reached], leader_C[reached], device_H[led_H]]),
    )
