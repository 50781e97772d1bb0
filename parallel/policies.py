"""Who gets copies: Tessera's own policy, which weighs tokens against weights by their costs, and those of other systems.

All have one form: from a layer's loads and owners to a `Plan`, deterministic, within the same room for copies, with owners
where they are. So they can be exchanged in a run (`parallel.policy`) and compared on the same loads (`launch.bench placement`).
What else sets those systems apart, when they plan and how weights travel, is in launch/benchmarks/placement.py.

Letters: E experts of a layer, D devices, N nodes, G devices of a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heapreplace
from typing import Protocol

import numpy as np

from parallel.copy_numbers import expected_times, numbers_of_copies
from parallel.flows import Plan, flows, imbalance
from parallel.layer_cost import Setting, WeightsTime, exchange_time, least_pass_s, pass_times, weights_time
from parallel.packing import even_replicas, pack
from parallel.placement import Floats, Ints, Placement, Topology, without_copies
from parallel.planning import LESS, hottest, materialise

AHEAD = 0.97  # of the first choice's expected time counts where loads are those of steps before: others suit them alone
LEVELLING_ROUNDS = 2  # in which holders that are busier than the mean give away what need not come to them
EVEN_ENOUGH = 1.1  # the busiest device over the mean, from which on that is not tried
HEADROOM = 1.05  # LLEP: how much more than the mean a device may have
FEWEST_TOKENS = 1024  # LLEP: fewer than these are not worth a product elsewhere
NO_WEIGHTS = WeightsTime(0.0, 0.0)


@dataclass(frozen=True)
class Search:
    """How far `by_cost` goes through the numbers of copies, those with the least expected time first."""

    seats: float  # copies that all devices together have room for, up to which this holds
    choices: int  # that are packed and timed at most
    copies: int  # that may be packed beside those of the first
    within: float  # of the best plan's time: what is expected to take more is not looked at


# A plan shall take 1 ms of the host's time for 64 devices with room for 4 copies, and 20 for 1,024.
SEARCHES = Search(64, 3, 320, 1.1), Search(320, 3, 64, LESS), Search(np.inf, 4, 4096, LESS)


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
    """The plan with the least predicted time: no copies, as many as there is room for, or fewer (copy_numbers.py).

    There is time to look at a few choices only, so those come first that are expected to take least. Where load stays uneven or
    copies cost much, experts that others serve in their owner's place (`llep`) are weighed too. The time is never above that
    without copies.
    """
    bare = plain(loads_E, owner_E, setting)
    weights = weights_time(bare.placement, setting, present=None)
    return _cheapest(_timed(bare, loads_E, setting, weights), loads_E, setting, present=None)


def calibrated(plan: Plan, loads_E: Floats, setting: Setting) -> Plan:
    """A plan for the loads that came, once the gate has decided; the one that there is unless another's gain pays for the wait.

    Nothing is planned where even a perfect balance would gain less time than planning takes. Source: Hecate, section 4.2, which
    adds copies; here the room of copies that turned out useless may be used too.
    """
    there = _timed(plan, loads_E, setting, NO_WEIGHTS)
    if there.passing_s * (1 - 1 / imbalance(there.load_D)) <= setting.costs.planning_s:
        return plan
    there = replace(there, weights=weights_time(plan.placement, setting, plan.placement))
    return _cheapest(there, loads_E, setting, present=plan.placement)


@dataclass(frozen=True)
class _Timed:
    """A plan, the entries that each device computes under it, and its predicted time."""

    plan: Plan
    load_D: Floats
    passing_s: float
    weights: WeightsTime

    @property
    def total_s(self) -> float:
        return self.passing_s + self.weights.total_s


def _timed(plan: Plan, loads_E: Floats, setting: Setting, weights: WeightsTime) -> _Timed:
    found = flows(plan, setting.topology, loads_E)
    return _Timed(plan, found.entries_D, sum(pass_times(found, setting)), weights)


def _cheapest(bare: _Timed, loads_E: Floats, setting: Setting, present: Placement | None) -> Plan:
    topology, memory, owner_E = setting.topology, setting.budget.memory, bare.plan.placement.owner_E
    if memory == 0 or topology.devices == 1 or not loads_E.any():
        return bare.plan
    seats, extra_CE = topology.devices * memory, numbers_of_copies(loads_E, setting)
    expected_C, copies_C = expected_times(extra_CE, loads_E, owner_E, setting, present), extra_CE.sum(axis=1)
    search = next(one for one in SEARCHES if seats <= one.seats)
    best, looked_at, packed = bare, 0, 0
    if present is None:
        expected_C[0] *= AHEAD
    for choice in np.argsort(expected_C, kind="stable").tolist():
        if expected_C[choice] >= best.total_s * search.within or looked_at == search.choices:
            break
        if looked_at and packed + copies_C[choice] > search.copies:
            continue
        packed += int(copies_C[choice]) if looked_at else 0
        looked_at += 1
        placement = Placement(owner_E, pack(extra_CE[choice], loads_E, owner_E, topology, memory))
        found = _timed(Plan(placement), loads_E, setting, NO_WEIGHTS)
        if found.total_s < best.total_s * LESS:
            found = replace(found, weights=weights_time(placement, setting, present))
        if found.total_s < best.total_s * LESS:
            best = found
    best = _levelled(best, loads_E, setting)
    return _with_fewest(best, loads_E, setting, present) or best.plan


def _with_fewest(best: _Timed, loads_E: Floats, setting: Setting, present: Placement | None) -> Plan | None:
    """Copies each of which serves all that it can, where `best` is uneven or waits for its copies, and they take less time."""
    if best.weights.total_s < (1 - LESS) * best.total_s and imbalance(best.load_D) < EVEN_ENOUGH:
        return None
    topology, owner_E, entries = setting.topology, best.plan.placement.owner_E, float(loads_E.sum())
    busiest = min(float(np.bincount(owner_E, weights=loads_E).max()), HEADROOM * entries / topology.devices)
    crossing = entries * (1 - topology.devices_per_node / topology.devices)  # to whoever serves, wherever
    if least_pass_s(crossing, busiest, entries, setting) >= best.total_s * LESS:
        return None
    plan = llep(loads_E, owner_E, setting)
    spare_s = best.total_s * LESS - _timed(plan, loads_E, setting, NO_WEIGHTS).passing_s
    return plan if spare_s > 0 and weights_time(plan.placement, setting, present).total_s < spare_s else None


def _levelled(best: _Timed, loads_E: Floats, setting: Setting) -> _Timed:
    """The same copies; holders that are busier than the mean give away what need not come to them."""
    for _ in range(LEVELLING_ROUNDS):
        if imbalance(best.load_D) < EVEN_ENOUGH or not best.plan.nearest_first:
            break
        less_D = np.minimum(best.load_D.mean() / np.maximum(best.load_D, 1.0), 4.0)
        found = _timed(Plan(best.plan.placement, best.plan.weights_ED * less_D), loads_E, setting, best.weights)
        if found.total_s >= best.total_s * LESS:
            break
        best = found
    return best


# ---------------------------------------------------------------- other systems


def eplb(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """DeepSeek's EPLB (github.com/deepseek-ai/EPLB), global: all room for copies is filled, the largest load per replica first;
    each goes to the least loaded device; replicas serve equal parts. Owners stay, which EPLB would pack anew too."""
    topology, memory = setting.topology, setting.budget.memory
    extra_E = even_replicas(loads_E, topology.devices * memory, topology.devices - 1)
    copies_ED = pack(extra_E, loads_E, owner_E, Topology(topology.devices, 1), memory)  # nodes do not matter
    return Plan(Placement(owner_E, copies_ED), nearest_first=False)


def laer(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """LAER-MoE, arXiv 2602.11686: copies by load, or equally many of each expert, whichever has the lower 4 exchanges and 3
    products; each goes to a node with fewest of its expert, there to the least loaded device."""
    topology, memory = setting.topology, setting.budget.memory
    seats, most = topology.devices * memory, topology.devices - 1
    plans = []
    for weights_E in (loads_E, np.ones_like(loads_E)):
        extra_E = even_replicas(weights_E, seats, most)
        plans.append(Plan(Placement(owner_E, pack(extra_E, loads_E, owner_E, topology, memory))))
    return min(plans, key=lambda plan: sum(pass_times(flows(plan, topology, loads_E), setting)))


def faster_moe(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """FasterMoE's shadowing (PPoPP 2022, section 4.2): the hottest experts go everywhere, one by one while the time without
    their tokens at their owners and with their weights on the way, there and back, is shorter than before."""
    topology, costs = setting.topology, setting.costs
    link = costs.across if topology.nodes > 1 else costs.within

    def seconds(plan: Plan, shadows: int) -> float:
        found = flows(plan, topology, loads_E)
        passing = 3 * float(found.entries_D.max()) * costs.entry_s
        exchanged = 4 * exchange_time(found, setting)
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
    load_D = np.bincount(owner_E, weights=loads_E, minlength=devices)
    cap = HEADROOM * float(loads_E.sum()) / devices
    room = [setting.budget.memory] * devices
    served_ED = np.zeros((len(loads_E), devices))
    served_ED[np.arange(len(owner_E)), owner_E] = loads_E
    idle = [(load, device) for device, load in enumerate(load_D.tolist()) if load < cap and room[device]]
    heapify(idle)  # those that may help; busier devices only ever give away
    order_E = np.argsort(-loads_E, kind="stable")
    for expert in order_E[load_D[owner_E[order_E]] > cap].tolist():
        owner, count = int(owner_E[expert]), float(loads_E[expert])
        left = over = min(max(float(load_D[owner]) - cap, 0.0), count)
        while left > 0 and idle:
            load, helper = idle[0]
            piece = min(left, cap - load)
            if piece < min(FEWEST_TOKENS, left):
                break  # nobody has room for a piece that is worth its way: the owner serves it after all
            served_ED[expert, helper] += piece
            left -= piece
            room[helper] -= 1
            if room[helper] and load + piece < cap:
                heapreplace(idle, (load + piece, helper))
            else:
                heappop(idle)
        load_D[owner] -= over - left
        served_ED[expert, owner] = count - over + left
    copies_ED = served_ED > 0
    copies_ED[np.arange(len(owner_E)), owner_E] = True
    served_ED[loads_E == 0, owner_E[loads_E == 0]] = 1.0
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
