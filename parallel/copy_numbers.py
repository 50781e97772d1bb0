"""How many copies the experts of a layer might get, and what the layer would take then, more or less: what is packed and timed
first, since a step has no time for all. Pure.

Letters: L layers, C choices, E experts of a layer, D devices, N nodes, K top-k.
"""

from __future__ import annotations

import numpy as np

from parallel.layer_cost import LayerCosts, Setting, beside_rows_s, rows_of
from parallel.packing import even_replicas
from parallel.placement import Bools, Floats, Ints, Placements, Topology

FLATTENED = 0.75  # a power of loads in proportion to which experts get replicas
FEWER = (2, 4, 8)  # times as much load per replica, in that power, as where all room is used
PARTS = 2.0 / 1.6 ** np.arange(10)  # of the mean load of a device: what one replica may have at most
UNEVEN = 0.2  # of the spread that chance would leave is left by packing
WAITS, HOP_WAITS = 0.4, 0.8  # experts for which a device waits, of each that it takes and each hop: packed choices have so many


def numbers_of_copies(loads_LE: Floats, setting: Setting) -> tuple[Ints, Bools]:
    """Choices of how many copies each expert gets beside its owner's, (L, C, E), and which of them are within the room of all
    devices together, (L, C).

    They are added where the load per replica is largest, so that each choice divides the experts into those whose tokens had
    better move and those whose weights had better: all room used, or less; in proportion to loads, to a power of them, or to
    nothing; or the hottest experts everywhere.
    """
    devices, memory, experts = setting.topology.devices, setting.budget.memory, loads_LE.shape[1]
    seats, mean_L = devices * memory, loads_LE.sum(axis=1) / devices
    # In proportion to loads the largest load per replica is least, to their square root the sum of them all (Cohen and Shenker,
    # SIGCOMM 2002), to the power of p / (p + 1) their p-norm. In between, cold experts have copies nearer to tokens, and sooner
    # those that are about to become hot.
    flat_LE = loads_LE**FLATTENED
    both_LE = even_replicas(np.concatenate([flat_LE, loads_LE]), seats, devices - 1)
    full_LE, proportional_LE = both_LE[: len(loads_LE)], both_LE[len(loads_LE) :]
    most_L = (flat_LE / (full_LE + 1)).max(axis=1)
    hot_LE = np.argsort(-loads_LE, axis=1, kind="stable")
    place_LE = hot_LE.argsort(axis=1)  # 0 of the hottest
    part_LC = PARTS * mean_L[:, None]
    flat_LC = np.array(FEWER) * most_L[:, None]
    parts_LCE = np.concatenate([loads_LE[:, None] / part_LC[..., None], flat_LE[:, None] / flat_LC[..., None]], axis=1)
    everywhere = [2**power for power in range(memory.bit_length()) if 2**power <= experts]
    rest = min(seats, experts * (devices - 1))
    choices_LCE = np.concatenate(
        [
            full_LE[:, None],
            proportional_LE[:, None],
            (rest // experts + (place_LE < rest % experts))[:, None],
            np.maximum(np.minimum(np.ceil(parts_LCE), devices).astype(np.int64) - 1, 0),
            (place_LE[:, None] < np.array(everywhere)[:, None]) * (devices - 1),
        ],
        axis=1,
    )
    copies_LC = choices_LCE.sum(axis=2)
    return choices_LCE, (copies_LC > 0) & (copies_LC <= seats)


def fewest_crossing(extra_LCE: Ints, loads_LE: Floats, topology: Topology) -> Floats:
    """At least so many entries go to other nodes, (L, C), with so many copies of each expert beside the owner's; so many if
    they lie on as many nodes as can be, and the nearest serve."""
    far_LCE = 1 - np.minimum(extra_LCE + 1, topology.nodes) / topology.nodes
    return np.asarray((far_LCE * loads_LE[:, None]).sum(axis=2))


def expected_times(extra_LCE: Ints, loads_LE: Floats, owner_LE: Ints, setting: Setting, present: Placements | None) -> Floats:
    """What `layer_time` might say of each choice, (L, C), before it is known on which devices copies lie.

    Replicas serve alike. The busiest device has the largest replica, or what is left to an owner of all of its experts; to it
    comes as much more as it computes. Copies are spread over devices alike, but for what owners send within a node.
    """
    topology, costs = setting.topology, setting.costs
    devices, experts = topology.devices, loads_LE.shape[1]
    mean_L1 = loads_LE.sum(axis=1)[:, None] / devices
    replicas_LCE = extra_LCE + 1
    share_LCE, part_LCE = loads_LE[:, None] / replicas_LCE, replicas_LCE / devices
    kept_LCD = _on_owners(share_LCE, owner_LE, devices)
    spread_LC = np.sqrt(  # of sums of replicas, were they dealt out by chance
        (share_LCE**2 * part_LCE * (1 - part_LCE)).sum(axis=2)
    )
    largest_LC = np.maximum(share_LCE.max(axis=2), kept_LCD.max(axis=2))
    busiest_LC = np.maximum(largest_LC, mean_L1 + UNEVEN * spread_LC)
    across_LC = fewest_crossing(extra_LCE, loads_LE, topology) / devices
    leaves_LC = mean_L1 - (replicas_LCE * loads_LE[:, None]).sum(axis=2) / devices**2
    within_LC = np.maximum(leaves_LC - across_LC, 0.0)
    exchanges_LC = _exchanges(extra_LCE, owner_LE, setting)
    exchange_LC = _exchange_times(within_LC, across_LC, mean_L1, busiest_LC / mean_L1, setting) * exchanges_LC
    experts_LC = (experts + extra_LCE.sum(axis=2)) / devices
    products_LC = 3 * (busiest_LC * costs.entry_s + experts_LC * costs.expert_s)
    gather_LC, return_LC, sums_LC = _ways(extra_LCE, owner_LE, setting)
    backward_LC = return_LC + gather_LC if setting.rematerialise else return_LC
    waited_LC = np.maximum(gather_LC - costs.attention_s, 0.0)
    if present is not None:  # what is here need not come, and what comes is waited for
        here_LE = present.extra_LE
        waited_LC = _ways(np.maximum(extra_LCE - here_LE[:, None], 0), owner_LE, setting)[0] if here_LE.any() else gather_LC
    waited_LC = waited_LC + np.maximum(backward_LC - 2 * costs.attention_s, 0.0)
    return np.asarray(products_LC + 4 * exchange_LC + beside_rows_s(exchanges_LC, costs) + waited_LC + sums_LC * costs.sum_s)


def _exchanges(extra_LCE: Ints, owner_LE: Ints, setting: Setting) -> Bools:
    """As `layer_cost.exchanges`, (L, C): not where all experts are meant to be everywhere and each device has room for them."""
    (layers, choices, experts), devices = extra_LCE.shape, setting.topology.devices
    everywhere_LC = extra_LCE.min(axis=2) == devices - 1 if setting.alone else np.zeros((layers, choices), dtype=np.bool_)
    if everywhere_LC.any():
        owned_LCD = _on_owners(np.ones((layers, 1, experts)), owner_LE, devices)
        everywhere_LC &= experts - owned_LCD.min(axis=2) <= setting.budget.memory
    return np.logical_not(everywhere_LC)


def _on_owners(amount_LCE: Floats | Ints, owner_LE: Ints, devices: int) -> Floats:
    """What all experts of each owner have together, (L, C, D)."""
    layers, choices, _ = amount_LCE.shape
    at_LCE = np.arange(layers * choices).reshape(layers, choices, 1) * devices + owner_LE[:, None]
    found = np.bincount(at_LCE.ravel(), amount_LCE.ravel(), layers * choices * devices)
    return np.asarray(found.reshape(layers, choices, devices), dtype=np.float64)


def _exchange_times(within_LC: Floats, across_LC: Floats, mean_L1: Floats, skew_LC: Floats, setting: Setting) -> Floats:
    """Of one exchange in one direction, if so many of a device's `mean` entries go to others of its node and elsewhere."""
    topology, costs, top_k = setting.topology, setting.costs, setting.top_k
    size, tokens_L1 = topology.devices_per_node, mean_L1 / setting.top_k
    far = topology.devices - size
    own_LC, stays_LC = mean_L1 - within_LC - across_LC, mean_L1 - across_LC
    kinds = np.array([within_LC, across_LC, own_LC, across_LC * size, stays_LC])
    near_LC, far_LC, here_LC, relayed_LC, stays_LC = rows_of(kinds, (size - 1, far, 1, far, 1), tokens_L1, top_k)
    row_s = skew_LC * costs.row_s
    if not setting.two_level:
        ways = _way_times(near_LC, skew_LC, costs, near=True), _way_times(far_LC, skew_LC, costs, near=False)
        return np.asarray(np.maximum(*ways) + (tokens_L1 + near_LC + far_LC + here_LC) * row_s)
    relayed_LC = relayed_LC / size
    inside_LC = near_LC + far_LC * (size - 1) / size
    ways = _way_times(inside_LC, skew_LC, costs, near=True), _way_times(relayed_LC, skew_LC, costs, near=False)
    rows_LC = tokens_L1 + 2 * (relayed_LC + stays_LC) + near_LC + far_LC + here_LC
    return np.asarray(ways[0] + ways[1] + rows_LC * row_s)


def _way_times(rows_LC: Floats, skew_LC: Floats, costs: LayerCosts, *, near: bool) -> Floats:
    link = costs.within if near else costs.across
    return np.asarray((rows_LC > 0) * link.latency_s + rows_LC * skew_LC * costs.row_bytes * link.byte_s)


def _ways(extra_LCE: Ints, owner_LE: Ints, setting: Setting) -> tuple[Floats, Floats, Floats]:
    """(L, C) each: seconds of copies on their way, of their gradients, and how many gradients the busiest device adds."""
    topology, costs, devices = setting.topology, setting.costs, setting.topology.devices
    copies_LC = extra_LCE.sum(axis=2)
    sums_LC = (copies_LC + owner_LE.shape[1]) / devices
    if topology.nodes == 1:  # owners send
        sent_LCD = _on_owners(extra_LCE, owner_LE, devices)
        owned_LCD = _on_owners(np.ones((len(owner_LE), 1, owner_LE.shape[1])), owner_LE, devices)
        sums_LC = (sent_LCD + owned_LCD).max(axis=2)
        most_LC = np.maximum(np.ceil(copies_LC / devices), sent_LCD.max(axis=2))
        there_LC = (copies_LC > 0) * costs.within.latency_s + most_LC * (costs.expert_bytes * costs.within.byte_s)
        return there_LC, there_LC, sums_LC
    across_LC = np.minimum(extra_LCE, topology.nodes - 1).sum(axis=2) / devices
    inside_LC = copies_LC / devices - across_LC
    hops_LC = np.ceil(np.log2(np.minimum(extra_LCE.max(axis=2) + 1, topology.nodes)))
    uneven_LC = extra_LCE.min(axis=2) < devices - 1  # where all go everywhere, nobody waits for others
    passed_LC = across_LC + uneven_LC * (WAITS * across_LC + HOP_WAITS * hops_LC)
    within_LC = (inside_LC > 0) * costs.within.latency_s + inside_LC * (costs.expert_bytes * costs.within.byte_s)
    latency_LC, byte_LC = hops_LC * costs.across.latency_s + within_LC, passed_LC * costs.across.byte_s
    return latency_LC + byte_LC * costs.expert_bytes, latency_LC + byte_LC * costs.sum_bytes, sums_LC
