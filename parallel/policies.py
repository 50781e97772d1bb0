"""Who gets copies: Tessera's own policy, which weighs tokens against weights by their costs, and those of other systems.

All have one form: from a layer's loads and owners to a `Plan`, deterministic, within the same room for copies, with owners
where they are. So they can be exchanged in a run (`parallel.policy`) and compared on the same loads (`launch.bench placement`).
What else sets those systems apart, when they plan and how weights travel, is in launch/benchmarks/placement.py.

Letters: E experts of a layer, D devices, N nodes, G devices of a node.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heapreplace
from typing import Protocol

import numpy as np

from parallel.flows import Plan, flows, imbalance
from parallel.layer_cost import Setting, WeightsTime, exchange_time, least_pass_s, pass_times, weights_time
from parallel.placement import Bools, Floats, Ints, Placement, Topology, on_owners, without_copies
from parallel.planning import LESS, hottest, materialise

REPLICA_PARTS = (1 / 9, 1 / 3, 1.0)  # of the mean load of a device: what one replica of an expert may have at most
FLATTENED = 0.75  # the power of loads in proportion to which experts get replicas
HALVINGS = 20  # of the largest load per replica; more of them change no plan
LEVELLING_ROUNDS = 2  # in which holders that are busier than the mean give away what need not come to them
EVEN_ENOUGH = 1.1  # the busiest device over the mean, from which on that is not tried
HEADROOM = 1.05  # LLEP: how much more than the mean a device may have
FEWEST_TOKENS = 1024  # LLEP: fewer than these are not worth a product elsewhere
NO_WEIGHTS = WeightsTime(0.0, 0.0)


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
    best, entries, best_least_s = bare, float(loads_E.sum()), 0.0
    for extra_E in _numbers_of_copies(loads_E, topology, memory):
        least_s = least_pass_s(fewest_crossing(extra_E, loads_E, topology), 0.0, entries, setting)
        if least_s >= best.total_s * LESS:
            continue  # wherever they lay
        if best is not bare and least_s - best_least_s >= _saved_s(best, int(extra_E.sum()), setting, present):
            break  # what more tokens on their way take is more than fewer copies save
        placement = Placement(owner_E, pack(extra_E, loads_E, owner_E, topology, memory))
        found = _timed(Plan(placement), loads_E, setting, weights_time(placement, setting, present))
        if found.total_s < best.total_s * LESS:
            best, best_least_s = found, least_s
        elif best is not bare:
            break  # from here on there are too few
        if found.weights.waited_s == 0:
            break  # nothing waits for copies, so fewer of them gain next to nothing
    best = _levelled(best, loads_E, setting)
    return _with_fewest(best, loads_E, setting, present) or best.plan


def _saved_s(best: _Timed, copies: int, setting: Setting, present: Placement | None) -> float:
    """What so many copies, fewer than the best plan's, are waited for less, if they take as much less time on their way."""
    hidden_s = setting.costs.attention_s if present is None else 0.0
    part = copies / int(best.plan.placement.extra_D.sum())
    return min(best.weights.waited_s, (best.weights.waited_s + hidden_s) * (1 - part))


def _with_fewest(best: _Timed, loads_E: Floats, setting: Setting, present: Placement | None) -> Plan | None:
    """Copies each of which serves all that it can, where `best` is uneven or waits for its copies, and they take less time."""
    if best.weights.waited_s == 0 and imbalance(best.load_D) < EVEN_ENOUGH:
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


def _numbers_of_copies(loads_E: Floats, topology: Topology, memory: int) -> Iterator[Ints]:
    """Of each expert, (E,): all room used; then fewer and fewer."""
    devices, seats = topology.devices, topology.devices * memory
    # In proportion to loads the largest load per replica is least, to their square root the sum of them all (Cohen and Shenker,
    # SIGCOMM 2002), to the power of p / (p + 1) their p-norm. In between, cold experts have copies nearer to tokens, and sooner
    # those that are about to become hot.
    before_E = even_replicas(loads_E**FLATTENED, seats, devices - 1)
    yield before_E
    mean = float(loads_E.sum()) / devices
    for part in REPLICA_PARTS:
        extra_E = np.ceil(loads_E / (part * mean)).astype(np.int64).clip(1, devices) - 1
        if 0 < extra_E.sum() < before_E.sum():
            yield extra_E
            before_E = extra_E


def fewest_crossing(extra_E: Ints, loads_E: Floats, topology: Topology) -> float:
    """At least so many entries go to other nodes, with so many copies of each expert beside the owner's; so many if they lie on
    as many nodes as can be, and the nearest serve."""
    return float(loads_E @ (1 - np.minimum(extra_E + 1, topology.nodes) / topology.nodes))


def even_replicas(weights_E: Floats, seats: int, most: int) -> Ints:
    """How many copies beside the owner's each expert gets, at most `most`, so that the largest weight per replica is least.

    That is what adding one copy after the other to the largest weight per replica arrives at (EPLB; LAER-MoE; in apportionment
    the method of Adams): bisection of that weight until it tells any two experts apart, then one copy each for as many as are
    left.
    """
    extra_E = np.zeros(len(weights_E), dtype=np.int64)
    total, wanted = float(weights_E.sum()), seats + len(weights_E)
    if total == 0 or seats == 0:
        return extra_E

    def replicas(weight: float) -> Floats:
        return np.maximum(np.minimum(np.ceil(weights_E / weight), most + 1), 1)

    low, high = total / wanted, total / seats  # at `low` there are too many replicas, at `high` there are not
    if replicas(low).sum() <= wanted:
        low = 0.0  # some have as many as they may, so that others can get more
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        left = wanted - replicas(middle).sum()
        low, high = (low, middle) if left >= 0 else (middle, high)
        if left == 0:
            break
    extra_E = replicas(high).astype(np.int64) - 1
    if left := seats - int(extra_E.sum()):
        open_E = np.flatnonzero((extra_E < most) & (weights_E > 0))
        extra_E[open_E[np.argsort(-weights_E[open_E] / (extra_E[open_E] + 1), kind="stable")[:left]]] += 1
    return extra_E


def pack(extra_E: Ints, loads_E: Floats, owner_E: Ints, topology: Topology, memory: int) -> Bools:
    """Gives each expert its copies, those with most load per replica first; returns where experts then are, (E, D).

    Each goes to a node with fewest of its expert, to the one whose least loaded device has least, and there to that device.
    """
    devices = topology.devices
    copies_ED, per_replica_E = on_owners(owner_E, devices), loads_E / (extra_E + 1)
    order_E = np.argsort(-per_replica_E, kind="stable")
    full_E = extra_E[order_E] == devices - 1
    full_E &= full_E.cumsum() <= memory
    everywhere_E, order_E = order_E[full_E], order_E[~full_E & (extra_E[order_E] > 0)]
    copies_ED[everywhere_E] = True
    own_E = per_replica_E.copy()
    own_E[everywhere_E] = 0.0
    load_D = np.bincount(owner_E, weights=own_E, minlength=devices) + per_replica_E[everywhere_E].sum()
    room_D = memory - len(everywhere_E) + np.bincount(owner_E[everywhere_E], minlength=devices)
    room = _Room(load_D, room_D, topology)
    wanted = zip(extra_E[order_E].tolist(), owner_E[order_E].tolist(), per_replica_E[order_E].tolist(), strict=True)
    takers = [room.take(*one) for one in wanted]
    copies_ED[order_E.repeat([len(found) for found in takers]), [device for found in takers for device in found]] = True
    return copies_ED


class _Room:
    """The devices that have room for copies, as (load, device) in ascending order.

    Plain lists: arrays would be slower than the few thousand steps that a layer takes.
    """

    def __init__(self, load_D: Floats, room_D: Ints, topology: Topology) -> None:
        per_node, load, room = topology.devices_per_node, load_D.tolist(), room_D.tolist()
        self.per_node, self.left = per_node, room
        self.lines = [  # one a node
            sorted((load[device], device) for device in range(first, first + per_node) if room[device])
            for first in range(0, topology.devices, per_node)
        ]
        self.first = sorted(line[0] for line in self.lines if line)  # of each line

    def take(self, copies: int, owner: int, load: float) -> list[int]:
        """The devices that get copies of one expert, with so much load each; fewer where room runs out.

        One of each node but the owner's, then a second, and one of that node, and so on, the least loaded first.
        """
        lines, first, home = self.lines, self.first, owner // self.per_node
        if copies > len(first) - bool(lines[home]):
            return self._take_everywhere(copies, owner, load)
        taken = first[:copies]
        if lines[home] and lines[home][0] in taken:  # its turn comes with the next expert
            own = lines[home][0]
            taken = first[: copies + 1]
            taken.remove(own)
            first[: copies + 1] = [own]
        else:
            del first[:copies]
        for before, device in taken:
            line = lines[device // self.per_node]
            del line[0]
            self._charge(line, device, before + load)
            if line:
                insort(first, line[0])
        return [device for _, device in taken]

    def _charge(self, line: list[tuple[float, int]], device: int, load: float) -> None:
        """A copy lies on a device, which has so much load then; `line` is that of its node, without it."""
        self.left[device] -= 1
        if self.left[device]:
            insort(line, (load, device))

    def _take_everywhere(self, copies: int, owner: int, load: float) -> list[int]:
        """More copies than nodes beside the owner's."""
        lines, home = self.lines, owner // self.per_node
        taken = [line[0] for node, line in enumerate(lines) if line and node != home]
        others = [(0.0, owner), *(entry for entry in lines[home][: copies + 1] if entry[1] != owner)]
        seen = [*lines[:home], others, *lines[home + 1 :]]
        for place in range(1, self.per_node):
            taken += sorted(line[place] for line in seen if len(line) > place)[: copies - len(taken)]
            if len(taken) == copies:
                break
        for before, device in taken:
            line = lines[device // self.per_node]
            line.remove((before, device))
            self._charge(line, device, before + load)
        self.first = sorted(line[0] for line in lines if line)
        return [device for _, device in taken]


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
