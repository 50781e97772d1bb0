"""How many copies the experts of a layer might get, and what the layer would take then, more or less: what is packed and timed
first, since a step has no time for all. Pure.

Letters: C choices, E experts of a layer, D devices, N nodes, K top-k.
"""

from __future__ import annotations

import numpy as np

from parallel.layer_cost import LayerCosts, Setting, rows_of
from parallel.packing import even_replicas
from parallel.placement import Floats, Ints, Placement, Topology

FLATTENED = 0.75  # a power of loads in proportion to which experts get replicas
FEWER = (2, 4, 8)  # times as much load per replica, in that power, as where all room is used
PARTS = 2.0 / 1.6 ** np.arange(10)  # of the mean load of a device: what one replica may have at most
UNEVEN = 0.2  # of the spread that chance would leave is left by packing
WAITS, HOP_WAITS = 0.4, 0.8  # experts for which a device waits, of each that it takes and each hop: packed choices have so many


def numbers_of_copies(loads_E: Floats, setting: Setting) -> Ints:
    """Choices of how many copies each expert gets beside its owner's, within the room of all devices together, (C, E).

    They are added where the load per replica is largest, so that each choice divides the experts into those whose tokens had
    better move and those whose weights had better: all room used, or less; in proportion to loads, to a power of them, or to
    nothing; or the hottest experts everywhere.
    """
    devices, memory, experts = setting.topology.devices, setting.budget.memory, len(loads_E)
    seats, mean = devices * memory, float(loads_E.sum()) / devices
    # In proportion to loads the largest load per replica is least, to their square root the sum of them all (Cohen and Shenker,
    # SIGCOMM 2002), to the power of p / (p + 1) their p-norm. In between, cold experts have copies nearer to tokens, and sooner
    # those that are about to become hot.
    flat_E = loads_E**FLATTENED
    full_E = even_replicas(flat_E, seats, devices - 1)
    most = float((flat_E / (full_E + 1)).max())
    hot_E = np.argsort(-loads_E, kind="stable")
    place_E = np.empty_like(hot_E)
    place_E[hot_E] = np.arange(experts)  # 0 of the hottest
    parts_CE = np.concatenate([loads_E / (PARTS[:, None] * mean), flat_E / (np.array(FEWER)[:, None] * most)])
    everywhere = [2**power for power in range(memory.bit_length()) if 2**power <= experts]
    rest = min(seats, experts * (devices - 1))
    choices_CE = np.concatenate(
        [
            full_E[None],
            even_replicas(loads_E, seats, devices - 1)[None],
            (rest // experts + (place_E < rest % experts))[None],
            np.ceil(parts_CE).astype(np.int64).clip(1, devices) - 1,
            (place_E < np.array(everywhere)[:, None]) * (devices - 1),
        ]
    )
    copies_C = choices_CE.sum(axis=1)
    return choices_CE[(copies_C > 0) & (copies_C <= seats)]


def fewest_crossing(extra_CE: Ints, loads_E: Floats, topology: Topology) -> Floats:
    """At least so many entries go to other nodes, (C,), with so many copies of each expert beside the owner's; so many if they
    lie on as many nodes as can be, and the nearest serve."""
    return np.asarray((1 - np.minimum(extra_CE + 1, topology.nodes) / topology.nodes) @ loads_E)


def expected_times(extra_CE: Ints, loads_E: Floats, owner_E: Ints, setting: Setting, present: Placement | None) -> Floats:
    """What `layer_time` might say of each choice, (C,), before it is known on which devices copies lie.

    Replicas serve alike. The busiest device has the largest replica, or what is left to an owner of all of its experts; to it
    comes as much more as it computes. Copies are spread over devices alike, but for what owners send within a node.
    """
    topology, costs = setting.topology, setting.costs
    devices = topology.devices
    mean = float(loads_E.sum()) / devices
    share_CE = loads_E / (extra_CE + 1)
    kept_CD = _on_owners(share_CE, owner_E, devices)
    part_CE = (extra_CE + 1) / devices
    spread_C = np.sqrt(
        (share_CE**2 * part_CE * (1 - part_CE)).sum(axis=1)
    )  # of sums of replicas, were they dealt out by chance
    busiest_C = np.maximum(np.maximum(share_CE.max(axis=1), kept_CD.max(axis=1)), mean + UNEVEN * spread_C)
    across_C = fewest_crossing(extra_CE, loads_E, topology) / devices
    leaves_C = mean - (extra_CE + 1) @ loads_E / devices**2
    exchange_C = _exchange_times(np.maximum(leaves_C - across_C, 0.0), across_C, mean, busiest_C / mean, setting)
    experts_C = (len(loads_E) + extra_CE.sum(axis=1)) / devices
    products_C = 3 * (busiest_C * costs.entry_s + experts_C * costs.expert_s)
    gather_C, return_C, sums_C = _ways(extra_CE, owner_E, setting)
    backward_C = return_C + gather_C if setting.rematerialise else return_C
    waited_C = np.maximum(gather_C - costs.attention_s, 0.0)
    if present is not None:  # what is here need not come, and what comes is waited for
        waited_C, _, _ = _ways(np.maximum(extra_CE - present.beside_ED.sum(axis=1), 0), owner_E, setting)
    waited_C = waited_C + np.maximum(backward_C - 2 * costs.attention_s, 0.0)
    return np.asarray(products_C + 4 * exchange_C + costs.exchange_s + waited_C + sums_C * costs.sum_s)


def _on_owners(amount_CE: Floats | Ints, owner_E: Ints, devices: int) -> Floats:
    """What all experts of each owner have together, (C, D)."""
    at_CE = np.arange(len(amount_CE))[:, None] * devices + owner_E
    found = np.bincount(at_CE.ravel(), amount_CE.ravel(), len(amount_CE) * devices)
    return np.asarray(found.reshape(-1, devices), dtype=np.float64)


def _exchange_times(within_C: Floats, across_C: Floats, mean: float, skew_C: Floats, setting: Setting) -> Floats:
    """Of one exchange in one direction, if so many of a device's `mean` entries go to others of its node and elsewhere."""
    topology, costs, top_k = setting.topology, setting.costs, setting.top_k
    size, tokens = topology.devices_per_node, mean / setting.top_k
    far = topology.devices - size
    own_C, stays_C = mean - within_C - across_C, mean - across_C
    kinds_KC = np.array([within_C, across_C, own_C, across_C * size, stays_C])
    near_C, far_C, here_C, relayed_C, stays_C = rows_of(kinds_KC, (size - 1, far, 1, far, 1), tokens, top_k)
    row_s = skew_C * costs.row_s
    if not setting.two_level:
        ways = _way_times(near_C, skew_C, costs, near=True), _way_times(far_C, skew_C, costs, near=False)
        return np.asarray(np.maximum(*ways) + (tokens + near_C + far_C + here_C) * row_s)
    relayed_C = relayed_C / size
    inside_C = near_C + far_C * (size - 1) / size
    ways = _way_times(inside_C, skew_C, costs, near=True), _way_times(relayed_C, skew_C, costs, near=False)
    rows_C = tokens + 2 * (relayed_C + stays_C) + near_C + far_C + here_C
    return np.asarray(ways[0] + ways[1] + rows_C * row_s)


def _way_times(rows_C: Floats, skew_C: Floats, costs: LayerCosts, *, near: bool) -> Floats:
    link = costs.within if near else costs.across
    return np.asarray((rows_C > 0) * link.latency_s + rows_C * skew_C * costs.row_bytes * link.byte_s)


def _ways(extra_CE: Ints, owner_E: Ints, setting: Setting) -> tuple[Floats, Floats, Floats]:
    """(C,) each: seconds of copies on their way, of their gradients, and how many gradients the busiest device adds."""
    topology, costs, devices = setting.topology, setting.costs, setting.topology.devices
    copies_C = extra_CE.sum(axis=1)
    sums_C = (copies_C + len(owner_E)) / devices
    if topology.nodes == 1:  # owners send
        sent_CD = _on_owners(extra_CE, owner_E, devices)
        sums_C = (sent_CD + np.bincount(owner_E, minlength=devices)).max(axis=1)
        most_C = np.maximum(np.ceil(copies_C / devices), sent_CD.max(axis=1))
        there_C = (copies_C > 0) * costs.within.latency_s + most_C * (costs.expert_bytes * costs.within.byte_s)
        return there_C, there_C, sums_C
    across_C = np.minimum(extra_CE, topology.nodes - 1).sum(axis=1) / devices
    inside_C = copies_C / devices - across_C
    hops_C = np.ceil(np.log2(np.minimum(extra_CE.max(axis=1) + 1, topology.nodes)))
    uneven_C = extra_CE.min(axis=1) < devices - 1  # where all go everywhere, nobody waits for others
    passed_C = across_C + uneven_C * (WAITS * across_C + HOP_WAITS * hops_C)
    within_C = (inside_C > 0) * costs.within.latency_s + inside_C * (costs.expert_bytes * costs.within.byte_s)
    latency_C, byte_C = hops_C * costs.across.latency_s + within_C, passed_C * costs.across.byte_s
    return latency_C + byte_C * costs.expert_bytes, latency_C + byte_C * costs.sum_bytes, sums_C
