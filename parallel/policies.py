"""Who gets copies: Tessera's own policy, which weighs tokens against weights by their costs, and those of other systems.

All have one form: from a layer's loads and owners to a `Plan`, deterministic, within the same room for copies, with owners
where they are. So they can be exchanged in a run (`parallel.policy`) and compared on the same loads (`launch.bench placement`).
What else sets those systems apart, when they plan and how weights travel, is in launch/benchmarks/placement.py.

Letters: E experts of a layer, D devices, N nodes, G devices of a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush
from typing import Protocol

import numpy as np

from parallel.flows import Plan, flows, imbalance
from parallel.layer_cost import Setting, exchange_time, layer_time, pass_times
from parallel.placement import Bools, Floats, Ints, Placement, Topology, without_copies
from parallel.planning import LESS, hottest, materialise

REPLICA_PARTS = (1 / 9, 1 / 3, 1.0)  # of the mean load of a device: what one replica of an expert may have at most
LEVELLING_ROUNDS = 2  # in which holders that are busier than the mean give away what need not come to them
EVEN_ENOUGH = 1.1  # the busiest device over the mean, from which on that is not tried
HEADROOM = 1.05  # LLEP: how much more than the mean a device may have
FEWEST_TOKENS = 1024  # LLEP: fewer than these are not worth a product elsewhere


class Policy(Protocol):
    def __call__(self, loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan: ...


def plain(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """Plain expert parallelism: no copies."""
    return Plan(without_copies(owner_E, setting.topology.devices))


def hecate(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """Hecate, arXiv 2502.02581, algorithm 1: the hottest experts, as many as travel under the attention."""
    return Plan(materialise(loads_E, owner_E, setting.topology, setting.budget))


# ---------------------------------------------------------------- Tessera


def by_cost(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """The plan with the least predicted time: no copies, as many as there is room for, or fewer of the hottest experts.

    They are added where the load per replica is largest, so each number of copies divides the experts into those whose tokens
    had better move and those whose weights had better; the predicted time decides where. Where load stays uneven, experts that
    others serve in their owner's place (`llep`) are weighed too. The time is never above that without copies.
    """
    return _cheapest(plain(loads_E, owner_E, setting), loads_E, setting, present=None)


def calibrated(plan: Plan, loads_E: Floats, setting: Setting) -> Plan:
    """A plan for the loads that came, once the gate has decided; the one that there is unless another's gain pays for the wait.

    Nothing is planned where even a perfect balance would gain less time than planning takes. Source: Hecate, section 4.2, which
    adds copies; here the room of copies that turned out useless may be used too.
    """
    passing_s = sum(pass_times(plan, loads_E, setting))
    gain_s = passing_s * (1 - 1 / imbalance(flows(plan, setting.topology, loads_E).entries_D))
    if gain_s <= setting.costs.planning_s:
        return plan
    return _cheapest(plan, loads_E, setting, present=plan.placement)


def _cheapest(plan: Plan, loads_E: Floats, setting: Setting, present: Placement | None) -> Plan:
    topology, memory, owner_E = setting.topology, setting.budget.memory, plan.placement.owner_E
    if memory == 0 or topology.devices == 1 or not loads_E.any():
        return plan
    best, least_s = plan, layer_time(plan, loads_E, setting, present).total_s
    for placement in _candidates(loads_E, owner_E, topology, memory):
        time = layer_time(found := Plan(placement), loads_E, setting, present)
        if time.total_s < least_s * LESS:
            best, least_s = found, time.total_s
        elif best is not plan:
            break  # from here on there are too few
        if time.weights_s == 0:
            break  # nothing waits for copies, so fewer of them gain nothing
    for _ in range(LEVELLING_ROUNDS):
        load_D = flows(best, topology, loads_E).entries_D
        if imbalance(load_D) < EVEN_ENOUGH or not best.nearest_first:
            break
        found = Plan(best.placement, best.weights_ED * np.minimum(load_D.mean() / np.maximum(load_D, 1.0), 4.0))
        found_s = layer_time(found, loads_E, setting, present).total_s
        if found_s >= least_s * LESS:
            break
        best, least_s = found, found_s
    waits = layer_time(best, loads_E, setting, present).weights_s > 0
    if waits or imbalance(flows(best, topology, loads_E).entries_D) >= EVEN_ENOUGH:
        found = llep(loads_E, owner_E, setting)  # fewest copies, each of which serves all that it can
        if layer_time(found, loads_E, setting, present).total_s < least_s * LESS:
            return found
    return best


def _candidates(loads_E: Floats, owner_E: Ints, topology: Topology, memory: int) -> Iterator[Placement]:
    """All room used; then fewer and fewer copies."""
    devices, seats = topology.devices, topology.devices * memory
    before_E = even_replicas(loads_E, seats, devices - 1)
    yield Placement(owner_E, _pack(before_E, loads_E, owner_E, topology, memory))
    mean = float(loads_E.sum()) / devices
    for part in REPLICA_PARTS:
        extra_E = np.ceil(loads_E / (part * mean)).astype(np.int64).clip(1, devices) - 1
        if 0 < extra_E.sum() < before_E.sum():
            yield Placement(owner_E, _pack(extra_E, loads_E, owner_E, topology, memory))
            before_E = extra_E


def even_replicas(loads_E: Floats, seats: int, most: int) -> Ints:
    """How many copies beside the owner's each expert gets, at most `most`, so that the largest load per replica is least.

    That is what adding one copy after the other to the largest load per replica arrives at (EPLB; LAER-MoE), found by bisection
    of that load.
    """
    low, high = 0.0, float(loads_E.max())
    if high == 0:
        return np.zeros(len(loads_E), dtype=np.int64)

    def extra(load: float) -> Ints:
        return np.minimum(np.ceil(loads_E / load).astype(np.int64), most + 1).clip(min=1) - 1

    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if extra(middle).sum() <= seats else (middle, high)
    extra_E = extra(high)
    open_E = np.flatnonzero((extra_E < most) & (loads_E > 0))
    left = seats - int(extra_E.sum())
    hot_E = open_E[np.argsort(-loads_E[open_E] / (extra_E[open_E] + 1), kind="stable")[:left]]
    extra_E[hot_E] += 1
    return extra_E


def _pack(extra_E: Ints, loads_E: Floats, owner_E: Ints, topology: Topology, memory: int) -> Bools:
    """Gives each expert its copies, those with most load per replica first; returns where experts then are, (E, D).

    Each goes to a node with fewest of its expert, to the one whose least loaded device has least, and there to that device.
    Plain heaps: arrays would be slower than the few thousand steps that this takes.
    """
    devices, per_node = topology.devices, topology.devices_per_node
    copies_ED = without_copies(owner_E, devices).copies_ED
    per_replica_E = loads_E / (extra_E + 1)
    order_E = np.argsort(-per_replica_E, kind="stable")
    everywhere_E = order_E[extra_E[order_E] == devices - 1][:memory]
    copies_ED[everywhere_E] = True
    room = (memory - (copies_ED.sum(axis=0) - np.bincount(owner_E, minlength=devices))).tolist()
    load = (per_replica_E @ copies_ED).tolist()
    on_node = [
        [(load[device], device) for device in range(first, first + per_node) if room[device]]
        for first in range(0, devices, per_node)
    ]
    for heap in on_node:
        heapify(heap)
    placed: list[tuple[int, int]] = []
    for expert in order_E[(extra_E[order_E] > 0) & ~np.isin(order_E, everywhere_E)].tolist():
        for device in _spread(int(extra_E[expert]), int(owner_E[expert]), float(per_replica_E[expert]), on_node, room):
            placed.append((expert, device))
    if placed:
        copies_ED[tuple(np.array(placed).T)] = True
    return copies_ED


def _spread(copies: int, owner: int, load: float, on_node: list[list[tuple[float, int]]], room: list[int]) -> list[int]:
    """The devices that get copies of one expert. Updates `room`, and of each node a heap of (load, device) with room."""
    per_node = len(room) // len(on_node)
    nodes = [(int(node == owner // per_node), heap[0][0], node) for node, heap in enumerate(on_node) if heap]
    heapify(nodes)
    found: list[int] = []
    taken = []
    while nodes and len(found) < copies:
        has, _, node = heappop(nodes)
        before, device = heappop(on_node[node])
        if device == owner:
            taken.append((before, device))
        else:
            has += 1
            room[device] -= 1
            found.append(device)
            taken.append((before + load, device))
        if on_node[node]:
            heappush(nodes, (has, on_node[node][0][0], node))
    for after, device in taken:
        if room[device]:
            heappush(on_node[device // per_node], (after, device))
    return found


# ---------------------------------------------------------------- other systems


def eplb(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """DeepSeek's EPLB (github.com/deepseek-ai/EPLB), global: all room for copies is filled, the largest load per replica first;
    each goes to the least loaded device; replicas serve equal parts. Owners stay, which EPLB would pack anew too."""
    topology, memory = setting.topology, setting.budget.memory
    extra_E = even_replicas(loads_E, topology.devices * memory, topology.devices - 1)
    copies_ED = _pack(extra_E, loads_E, owner_E, Topology(topology.devices, topology.devices), memory)  # nodes do not matter
    return Plan(Placement(owner_E, copies_ED), nearest_first=False)


def laer(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """LAER-MoE, arXiv 2602.11686: copies by load, or equally many of each expert, whichever has the lower 4 exchanges and 3
    products; each goes to a node with fewest of its expert, there to the least loaded device."""
    topology, memory = setting.topology, setting.budget.memory
    seats, most = topology.devices * memory, topology.devices - 1
    plans = []
    for weights_E in (loads_E, np.ones_like(loads_E)):
        extra_E = even_replicas(weights_E, seats, most)
        plans.append(Plan(Placement(owner_E, _pack(extra_E, loads_E, owner_E, topology, memory))))
    return min(plans, key=lambda plan: sum(pass_times(plan, loads_E, setting)))


def faster_moe(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """FasterMoE's shadowing (PPoPP 2022, section 4.2): the hottest experts go everywhere, one by one while the time without
    their tokens at their owners and with their weights on the way, there and back, is shorter than before."""
    topology, costs = setting.topology, setting.costs
    link = costs.across if topology.nodes > 1 else costs.within

    def seconds(plan: Plan, shadows: int) -> float:
        found = flows(plan, topology, loads_E)
        passing = 3 * float(found.entries_D.max()) * costs.entry_s
        exchanged = 4 * exchange_time(found, float(loads_E.sum()), setting)
        return passing + exchanged + 2 * shadows * costs.expert_bytes * link.byte_s

    best = plain(loads_E, owner_E, setting)
    copies_ED = best.placement.copies_ED.copy()
    least_s = seconds(best, 0)
    for shadows, expert in enumerate(hottest(loads_E, setting.budget.memory).tolist(), start=1):
        copies_ED[expert] = True
        found = Plan(Placement(owner_E, copies_ED.copy()))
        if seconds(found, shadows) >= least_s:
            break
        best, least_s = found, seconds(found, shadows)
    return best


def llep(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """Least-loaded expert parallelism, arXiv 2601.17111: an owner serves what fits under a cap of little more than the mean,
    and what is over goes in pieces, with the expert's weights, to the least loaded devices."""
    devices = setting.topology.devices
    load_D = np.bincount(owner_E, weights=loads_E, minlength=devices)  # assigned, and owners' experts still to come
    cap = HEADROOM * float(loads_E.sum()) / devices
    room_D = np.full(devices, setting.budget.memory)
    served_ED = np.zeros((len(loads_E), devices))
    for expert in np.argsort(-loads_E, kind="stable").tolist():
        owner, count = int(owner_E[expert]), float(loads_E[expert])
        load_D[owner] -= count
        left = count - min(max(cap - load_D[owner], 0.0), count)
        served_ED[expert, owner] = count - left
        load_D[owner] += count - left
        while left > 0:
            able_D = (room_D > 0) | (served_ED[expert] > 0)
            able_D[owner] = False
            helper = int(np.where(able_D, load_D, np.inf).argmin())
            free = cap - load_D[helper]
            if not able_D.any() or free < min(FEWEST_TOKENS, left):
                helper, free = owner, left  # nobody has room for a piece that is worth its way: the owner serves it after all
            piece = min(left, free)
            room_D[helper] -= helper != owner and served_ED[expert, helper] == 0
            served_ED[expert, helper] += piece
            load_D[helper] += piece
            left -= piece
    copies_ED = served_ED > 0
    copies_ED[np.arange(len(owner_E)), owner_E] = True
    served_ED[loads_E == 0] = np.eye(devices)[owner_E[loads_E == 0]]
    return Plan(Placement(owner_E, copies_ED), served_ED, nearest_first=False)


POLICIES: Mapping[str, Policy] = {
    "cost": by_cost,
    "hecate": hecate,
    "eplb": eplb,
    "laer": laer,
    "faster_moe": faster_moe,
    "llep": llep,
    "plain": plain,
}
