"""Which experts are copied where for a step, and who owns them, as Hecate does it: pure functions of the loads.

Source: Hecate, arXiv 2502.02581: sparse materialisation (section 4.2, algorithm 1), heterogeneous sharding (section 4.3,
algorithm 2). What the paper leaves open is decided here: how many replicas an expert gets, which devices take them, and when
moving owners is worth it. Every rank computes the same plan from the same loads; ties go to the lower index.

Letters: L MoE layers, E experts of a layer, D devices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from parallel.flows import Plan, device_loads
from parallel.placement import Bools, Budget, Floats, Ints, Placement, Topology, on_owners, without_copies

LESS = 0.99  # more copies must leave at most this share of the busiest device's load, or of the predicted time
WORTH_MOVING = 0.95  # new owners must leave the busiest devices at most this share of what they have to do


def predict(loads_SLE: Floats) -> Floats:
    """The loads of the next step from those of the last S, (L, E): their mean (Hecate, section 4.2), except for layers of which
    the last step alone would have been closer to what came after it: their loads jump."""
    last_LE = loads_SLE[-1]
    if len(loads_SLE) < 2:
        return last_LE
    off_by_mean_L = np.abs(loads_SLE[:-1].mean(axis=0) - last_LE).sum(axis=1)
    off_by_last_L = np.abs(loads_SLE[-2] - last_LE).sum(axis=1)
    return np.where((off_by_last_L < off_by_mean_L)[:, None], last_LE, loads_SLE.mean(axis=0))


def hottest(loads_E: Floats, count: int) -> Ints:
    """The experts with the largest loads in descending order, at most `count`, none without load."""
    order_E = np.argsort(-loads_E, kind="stable")[:count]
    return np.asarray(order_E[loads_E[order_E] > 0], dtype=np.int64)


def materialise(loads_E: Floats, owner_E: Ints, topology: Topology, budget: Budget) -> Placement:
    """Sparse materialisation: copies of at most the `overlap` hottest experts, at most `memory` on a device.

    Of the hottest 1, 2, 4, .., `overlap` experts those are copied with which the busiest device has least to do, none if that
    is best: what a hot expert's owner no longer computes others do, which the paper does not look at.
    """
    best = without_copies(owner_E, topology.devices)
    if budget.memory == 0 or topology.devices == 1:
        return best
    hot_E = hottest(loads_E, budget.overlap)
    least = device_loads(Plan(best), topology, loads_E).max()
    for count in sorted({*(2**power for power in range(len(hot_E).bit_length())), len(hot_E)} - {0}):
        found = replicate(hot_E[:count], loads_E, owner_E, topology, budget.memory)
        most = device_loads(Plan(found), topology, loads_E).max()
        if most < least * LESS:
            best, least = found, most
    return best


def replicate(hot_E: Ints, loads_E: Floats, owner_E: Ints, topology: Topology, memory: int) -> Placement:
    """Copies of these experts, at most `memory` on a device (Hecate, algorithm 1).

    Where all of them fit they go everywhere. Else replicas are apportioned to experts by load (largest remainder), and go to
    nodes without one first, then to nodes and devices with more room.
    """
    copies_ED = on_owners(owner_E, topology.devices)
    if len(hot_E) <= memory:
        copies_ED[hot_E] = True
        return Placement(owner_E, copies_ED)
    replicas_E = apportion(loads_E[hot_E], topology.devices * memory, topology.devices - 1)
    room_ND = np.full((topology.nodes, topology.devices_per_node), memory)
    for expert, replicas in zip(hot_E.tolist(), replicas_E.tolist(), strict=True):
        _replicate(copies_ED[expert].reshape(room_ND.shape), replicas, room_ND)
    return Placement(owner_E, copies_ED)


def _replicate(has_ND: Bools, replicas: int, room_ND: Ints) -> None:
    """Adds replicas of an expert while there is room, in place: to nodes with fewest of it, then with most room, then to the
    device with most room. N nodes, D devices of each."""
    holders_N, node_room_N = has_ND.sum(axis=1), room_ND.sum(axis=1)
    open_N = (~has_ND & (room_ND > 0)).sum(axis=1)
    more = int(node_room_N.max()) + 1
    key_N = np.where(open_N > 0, holders_N * more - node_room_N, np.iinfo(np.int64).max)
    for _ in range(min(replicas, int(open_N.sum()))):
        node = int(key_N.argmin())
        device = int(np.where(has_ND[node], -1, room_ND[node]).argmax())
        has_ND[node, device] = True
        room_ND[node, device] -= 1
        open_N[node] -= 1
        key_N[node] = key_N[node] + more + 1 if open_N[node] else np.iinfo(np.int64).max


def apportion(weights_E: Floats, seats: int, most: int) -> Ints:
    """`seats` in proportion to the weights, at most `most` each: whole shares first, then the largest remainders (Hamilton)."""
    seats = min(seats, most * len(weights_E))
    quota_E = weights_E / weights_E.sum() * seats
    given_E = np.minimum(np.floor(quota_E), most).astype(np.int64)
    while (left := seats - int(given_E.sum())) > 0:
        remainder_E = np.where(given_E < most, quota_E - given_E, -np.inf)
        open_E = np.argsort(-remainder_E, kind="stable")[: min(left, int((given_E < most).sum()))]
        given_E[open_E] += 1
    return given_E


# ---------------------------------------------------------------- owners


def reshard(
    loads_LE: Floats, owner_LE: Ints, topology: Topology, overlap: int, plan: Callable[[Floats, Ints], list[Plan]]
) -> tuple[Ints, list[Plan]]:
    """Heterogeneous sharding: owners that spread each layer's load, whatever number of a layer's experts a device then owns.

    Every device keeps owning equally many experts over all layers together, so memory does not change. The `overlap` hottest
    experts of a layer are likely to be copied: they fill what is left, on their present owner where it has room. Returns the
    present owners unless with the new ones, and the copies that `plan` makes of loads and owners then, the busiest devices have
    at most `WORTH_MOVING` as much to do; and the plans with them.
    """
    layers, experts = owner_LE.shape
    cold_LE = np.array(loads_LE, dtype=np.float64)
    hot: list[tuple[int, int]] = []
    for layer in range(layers):
        found = hottest(loads_LE[layer], overlap)
        cold_LE[layer, found] = 0.0
        hot += [(layer, expert) for expert in found.tolist()]
    room_D = np.full(topology.devices, layers * experts // topology.devices)
    new_LE = np.full_like(owner_LE, -1)
    hot_LE = np.zeros(owner_LE.shape, dtype=np.bool_)
    if hot:
        hot_LE[tuple(np.array(hot).T)] = True
    for layer in np.argsort(-cold_LE.max(axis=1), kind="stable").tolist():
        load_D = np.zeros(topology.devices)
        for expert in np.argsort(-cold_LE[layer], kind="stable").tolist():
            if not hot_LE[layer, expert]:
                device = _least_loaded(load_D, room_D, topology)
                new_LE[layer, expert] = device
                load_D[device] += cold_LE[layer, expert]
                room_D[device] -= 1
    for layer, expert in hot:
        present = int(owner_LE[layer, expert])
        device = present if room_D[present] > 0 else int(np.argmax(room_D > 0))
        new_LE[layer, expert] = device
        room_D[device] -= 1
    staying, moving = plan(loads_LE, owner_LE), plan(loads_LE, new_LE)
    before, after = (busiest(loads_LE, plans, topology) for plans in (staying, moving))
    return (new_LE, moving) if after <= WORTH_MOVING * before and after < before else (owner_LE, staying)


def _least_loaded(load_D: Floats, room_D: Ints, topology: Topology) -> int:
    """The least loaded device of the least loaded node among those with room; where equal, that with less room."""
    per_node, nodes = topology.devices_per_node, topology.nodes
    node_load_N, node_room_N = load_D.reshape(nodes, per_node).sum(axis=1), room_D.reshape(nodes, per_node).sum(axis=1)
    node = int(np.lexsort((np.arange(nodes), node_room_N, node_load_N, node_room_N == 0))[0])
    mine = slice(node * per_node, (node + 1) * per_node)
    order = np.lexsort((np.arange(per_node), room_D[mine], load_D[mine], room_D[mine] == 0))
    return node * per_node + int(order[0])


def busiest(loads_LE: Floats, plans: list[Plan], topology: Topology) -> float:
    """The sum over layers of the busiest device's entries."""
    return sum(float(device_loads(plan, topology, loads_E).max()) for plan, loads_E in zip(plans, loads_LE, strict=True))
