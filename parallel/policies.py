"""Who gets copies: Tessera's own policy, which weighs tokens against weights by their costs, and those of other systems.

All have one form: from the loads and owners of layers to a `Plan` of each, deterministic, within the same room for copies, with
owners where they are. So they can be exchanged in a run (`parallel.policy`) and compared on the same loads (`launch.bench
placement`).
What else sets those systems apart, when they plan and how weights travel, is in launch/benchmarks/placement.py.

Letters: L layers, C choices, E experts of a layer, D devices, N nodes, G devices of a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Protocol

import numpy as np

from parallel.copy_numbers import expected_times, numbers_of_copies
from parallel.flows import Flows, Plan, flows, flows_of, imbalance
from parallel.layer_cost import Setting, exchange_time, least_pass_s, pass_times, weights_times
from parallel.packing import even_replicas, pack
from parallel.placement import Bools, Floats, Ints, Placement, Placements, Topology, without_copies
from parallel.planning import LESS, hottest, materialise

AHEAD = 0.97  # of the first choice's expected time counts where loads are those of steps before: others suit them alone
LEVELLING_ROUNDS = 2  # in which holders that are busier than the mean give away what need not come to them
EVEN_ENOUGH = 1.1  # the busiest device over the mean, from which on that is not tried
HEADROOM = 1.05  # LLEP: how much more than the mean a device may have
FEWEST_TOKENS = 1024  # LLEP: fewer than these are not worth a product elsewhere
CELLS_AT_ONCE = 2**20  # of (L, E, D): how many layers are planned together


@dataclass(frozen=True)
class Search:
    """How far `by_cost` goes through the numbers of copies, those with the least expected time first."""

    seats: float  # copies that all devices together have room for, up to which this holds
    choices: int  # that are packed and timed at most
    copies: int  # that may be packed beside those of the first
    within: float  # of the best plan's time: what is expected to take more is not looked at


# A plan shall take 1 ms of the host's time for 64 devices with room for 4 copies, and 20 for 1,024. Ahead of a step all layers
# are planned together, which makes small ones cheap; a single one, behind its gate, is waited for.
SEARCHES = Search(64, 6, 640, 1.1), Search(320, 3, 64, LESS), Search(np.inf, 4, 4096, LESS)
BEHIND_THE_GATE = Search(64, 3, 320, 1.1), *SEARCHES[1:]


class Policy(Protocol):
    def __call__(self, loads_LE: Floats, owner_LE: Ints, setting: Setting) -> list[Plan]: ...


class LayerPolicy(Protocol):
    def __call__(self, loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan: ...


def layer_by_layer(policy: LayerPolicy) -> Policy:
    def planned(loads_LE: Floats, owner_LE: Ints, setting: Setting) -> list[Plan]:
        return [policy(loads_E, owner_E, setting) for loads_E, owner_E in zip(loads_LE, owner_LE, strict=True)]

    return planned


def of_one_layer(policy: Policy, loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    (plan,) = policy(loads_E[None], owner_E[None], setting)
    return plan


def plain(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """Plain expert parallelism: no copies."""
    return Plan(without_copies(owner_E, setting.topology.devices))


def hecate(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """Hecate, arXiv 2502.02581, algorithm 1: the hottest experts, as many as travel under the attention."""
    return Plan(materialise(loads_E, owner_E, setting.topology, setting.budget))


# ---------------------------------------------------------------- Tessera


def by_cost(loads_LE: Floats, owner_LE: Ints, setting: Setting) -> list[Plan]:
    """The plans with the least predicted time: no copies, as many as there is room for, or fewer (copy_numbers.py).

    There is time to look at a few choices only, so those come first that are expected to take least. Where load stays uneven or
    copies cost much, experts that others serve in their owner's place (`llep`) are weighed too. The time is never above that
    without copies. Layers do not know of each other; many small ones take little more time than one, since nearly all of that
    goes into calls of numpy.
    """
    (layers, experts), devices = loads_LE.shape, setting.topology.devices
    plans, at_once = list[Plan](), max(CELLS_AT_ONCE // (experts * devices), 1)
    for first in range(0, layers, at_once):
        loads_PE, owner_PE = loads_LE[first : first + at_once], owner_LE[first : first + at_once]
        bare = [plain(loads_E, owner_E, setting) for loads_E, owner_E in zip(loads_PE, owner_PE, strict=True)]
        placements = Placements.of(*(plan.placement for plan in bare))
        found, weights = flows_of(placements, setting.topology, loads_PE), weights_times(placements, setting, None)
        best = _Timed(bare, found.entries_D, _passing(found, setting), weights.total_L)
        plans += _cheapest(best, loads_PE, setting, present=None)
    return plans


def calibrated(plan: Plan, loads_E: Floats, setting: Setting) -> Plan:
    """A plan for the loads that came, once the gate has decided; the one that there is unless another's gain pays for the wait.

    Nothing is planned where even a perfect balance would gain less time than planning takes. Source: Hecate, section 4.2, which
    adds copies; here the room of copies that turned out useless may be used too.
    """
    present, weight_LED = Placements.of(plan.placement), None if plan.weight_ED is None else plan.weight_ED[None]
    there = flows_of(present, setting.topology, loads_E[None], weight_LED, nearest_first=plan.nearest_first)
    passing_L = _passing(there, setting)
    if passing_L.item() * (1 - 1 / imbalance(there.entries_D)) <= setting.costs.planning_s:
        return plan
    best = _Timed([plan], there.entries_D, passing_L, weights_times(present, setting, present).total_L)
    (found,) = _cheapest(best, loads_E[None], setting, present)
    return found


@dataclass
class _Timed:
    """The best plans so far, the entries that each device computes under them, and their predicted times."""

    plans: list[Plan]
    load_LD: Floats
    passing_L: Floats
    weights_L: Floats

    @property
    def total_L(self) -> Floats:
        return self.passing_L + self.weights_L

    def take(self, layers: Ints, plans: list[Plan], load_PD: Floats, passing_P: Floats, weights_P: Floats) -> None:
        """Plans of some of the layers in the place of those so far."""
        for layer, plan in zip(layers.tolist(), plans, strict=True):
            self.plans[layer] = plan
        self.load_LD[layers], self.passing_L[layers], self.weights_L[layers] = load_PD, passing_P, weights_P


def _passing(found: Flows, setting: Setting) -> Floats:
    products_L, tokens_L = pass_times(found, setting)
    return products_L + tokens_L


def _uneven(load_LD: Floats) -> Bools:
    """Which of these layers, that all have load, are."""
    return np.asarray(load_LD.max(axis=1) / (load_LD.sum(axis=1) / load_LD.shape[1]) >= EVEN_ENOUGH)


def _cheapest(best: _Timed, loads_LE: Floats, setting: Setting, present: Placements | None) -> list[Plan]:
    """In place of the plans of `best`, where others take less time."""
    some = np.flatnonzero(loads_LE.any(axis=1))
    if setting.budget.memory == 0 or setting.topology.devices == 1 or not len(some):
        return best.plans
    owner_LE = np.array([plan.placement.owner_E for plan in best.plans])
    _search(best, some, loads_LE, owner_LE, setting, present)
    _level(best, some, loads_LE, setting)
    _take_fewest(best, some, loads_LE, owner_LE, setting, present)
    return best.plans


def _search(best: _Timed, some: Ints, loads_LE: Floats, owner_LE: Ints, setting: Setting, present: Placements | None) -> None:
    """Takes the choices of numbers of copies in the order of the time that they are expected to take."""
    topology, memory = setting.topology, setting.budget.memory
    extra_PCE, there_PC = numbers_of_copies(loads_LE[some], setting)
    expected_PC = expected_times(extra_PCE, loads_LE[some], owner_LE[some], setting, present and present[some])
    if present is None:
        expected_PC[:, 0] *= AHEAD
    expected_PC[~there_PC] = np.inf
    searches = SEARCHES if present is None else BEHIND_THE_GATE
    search = next(one for one in searches if topology.devices * memory <= one.seats)
    turns = [_Turns(*one, search) for one in zip(expected_PC, extra_PCE.sum(axis=2), strict=True)]
    while True:
        limit_P = (best.total_L[some] * search.within).tolist()
        found = [(place, one.next(limit)) for place, (one, limit) in enumerate(zip(turns, limit_P, strict=True))]
        chosen = [(place, choice) for place, choice in found if choice is not None]
        if not chosen:
            return
        place_P, choice_P = np.array(chosen).T
        at_P = some[place_P]
        copies_PED = pack(extra_PCE[place_P, choice_P], loads_LE[at_P], owner_LE[at_P], topology, memory)
        placements = Placements(owner_LE[at_P], copies_PED)
        _take_better(best, at_P, placements, None, loads_LE, setting, present)


class _Turns:
    """Which choice of a layer's is packed next; see `Search`."""

    def __init__(self, expected_C: Floats, copies_C: Ints, search: Search) -> None:
        order_C = np.argsort(expected_C, kind="stable")
        self._left = [*zip(order_C.tolist(), expected_C[order_C].tolist(), copies_C[order_C].tolist(), strict=True)]
        self._left.reverse()
        self._search, self._looked_at, self._packed = search, 0, 0

    def next(self, limit_s: float) -> int | None:
        """None from where on more is expected than `limit_s`."""
        while self._left:
            choice, expected_s, copies = self._left.pop()
            if expected_s >= limit_s or self._looked_at == self._search.choices:
                self._left = []
            elif not self._looked_at or self._packed + copies <= self._search.copies:
                self._packed += copies if self._looked_at else 0
                self._looked_at += 1
                return choice
        return None


def _take_better(
    best: _Timed,
    at_P: Ints,
    placements: Placements,
    weight_PED: Floats | None,
    loads_LE: Floats,
    setting: Setting,
    present: Placements | None,
    *,
    nearest_first: bool = True,
) -> None:
    """Takes plans of the layers `at_P` that take less time. Times of weights are looked at last."""
    found = flows_of(placements, setting.topology, loads_LE[at_P], weight_PED, nearest_first=nearest_first)
    passing_P, limit_P = _passing(found, setting), best.total_L[at_P] * LESS
    better = np.flatnonzero(passing_P < limit_P)
    if not len(better):
        return
    weights_P = weights_times(placements[better], setting, present and present[at_P[better]]).total_L
    cheaper = passing_P[better] + weights_P < limit_P[better]
    better, weights_P = better[cheaper], weights_P[cheaper]
    plans = [
        Plan(
            Placement(placements.owner_LE[place], placements.copies_LED[place]),
            None if weight_PED is None else weight_PED[place],
            nearest_first,
        )
        for place in better.tolist()
    ]
    best.take(at_P[better], plans, found.entries_D[better], passing_P[better], weights_P)


def _level(best: _Timed, some: Ints, loads_LE: Floats, setting: Setting) -> None:
    """The same copies; holders that are busier than the mean give away what need not come to them."""
    at_P = some[_uneven(best.load_LD[some]) & [best.plans[layer].nearest_first for layer in some.tolist()]]
    if not len(at_P):
        return
    plans = [best.plans[layer] for layer in at_P.tolist()]
    placements, weight_PED = Placements.of(*(plan.placement for plan in plans)), np.array([plan.weights_ED for plan in plans])
    for _ in range(LEVELLING_ROUNDS):
        load_PD = best.load_LD[at_P]
        weight_PED *= np.minimum(load_PD.mean(axis=1, keepdims=True) / np.maximum(load_PD, 1.0), 4.0)[:, None]
        found = flows_of(placements, setting.topology, loads_LE[at_P], weight_PED)
        passing_P, weights_P = _passing(found, setting), best.weights_L[at_P]  # the weights' way is the same
        better = np.flatnonzero(passing_P + weights_P < best.total_L[at_P] * LESS)
        levelled = [Plan(best.plans[at_P[place]].placement, weight_PED[place]) for place in better.tolist()]
        best.take(at_P[better], levelled, found.entries_D[better], passing_P[better], weights_P[better])
        better = better[_uneven(found.entries_D[better])]
        if not len(better):
            return
        at_P, placements, weight_PED = at_P[better], placements[better], weight_PED[better]


def _take_fewest(
    best: _Timed, some: Ints, loads_LE: Floats, owner_LE: Ints, setting: Setting, present: Placements | None
) -> None:
    """Copies each of which serves all that it can, where `best` is uneven or waits for its copies, and they take less time."""
    topology, devices = setting.topology, setting.topology.devices
    waits_P = best.weights_L[some] >= (1 - LESS) * best.total_L[some]
    at_P = some[waits_P | _uneven(best.load_LD[some])]
    entries_P = loads_LE[at_P].sum(axis=1)
    owned_P = [np.bincount(owner_LE[layer], weights=loads_LE[layer]).max() for layer in at_P.tolist()]
    busiest_P = np.minimum(np.array(owned_P), HEADROOM * entries_P / devices)
    crossing_P = entries_P * (1 - topology.devices_per_node / devices)  # to whoever serves, wherever
    at_P = at_P[least_pass_s(crossing_P, busiest_P, entries_P, setting) < best.total_L[at_P] * LESS]
    if not len(at_P):
        return
    plans = [llep(loads_LE[layer], owner_LE[layer], setting) for layer in at_P.tolist()]
    placements, weight_PED = Placements.of(*(plan.placement for plan in plans)), np.array([plan.weights_ED for plan in plans])
    _take_better(best, at_P, placements, weight_PED, loads_LE, setting, present, nearest_first=False)


# ---------------------------------------------------------------- other systems


def eplb(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """DeepSeek's EPLB (github.com/deepseek-ai/EPLB), global: all room for copies is filled, the largest load per replica first;
    each goes to the least loaded device; replicas serve equal parts. Owners stay, which EPLB would pack anew too."""
    topology, memory = setting.topology, setting.budget.memory
    extra_LE = even_replicas(loads_E[None], topology.devices * memory, topology.devices - 1)
    (copies_ED,) = pack(extra_LE, loads_E[None], owner_E[None], Topology(topology.devices, 1), memory)  # nodes do not matter
    return Plan(Placement(owner_E, copies_ED), nearest_first=False)


def laer(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """LAER-MoE, arXiv 2602.11686: copies by load, or equally many of each expert, whichever has the lower 4 exchanges and 3
    products; each goes to a node with fewest of its expert, there to the least loaded device."""
    topology, memory = setting.topology, setting.budget.memory
    both_LE, owner_LE = np.stack([loads_E, loads_E]), np.stack([owner_E, owner_E])
    extra_LE = even_replicas(np.stack([loads_E, np.ones_like(loads_E)]), topology.devices * memory, topology.devices - 1)
    copies_LED = pack(extra_LE, both_LE, owner_LE, topology, memory)
    passing_L = _passing(flows_of(Placements(owner_LE, copies_LED), topology, both_LE), setting)
    return Plan(Placement(owner_E, copies_LED[int(passing_L.argmin())]))


def faster_moe(loads_E: Floats, owner_E: Ints, setting: Setting) -> Plan:
    """FasterMoE's shadowing (PPoPP 2022, section 4.2): the hottest experts go everywhere, one by one while the time without
    their tokens at their owners and with their weights on the way, there and back, is shorter than before."""
    topology, costs = setting.topology, setting.costs
    link = costs.across if topology.nodes > 1 else costs.within

    def seconds(plan: Plan, shadows: int) -> float:
        found = flows(plan, topology, loads_E)
        passing = 3 * float(found.entries_D.max()) * costs.entry_s
        exchanged = 4 * float(exchange_time(found, setting))
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
    "hecate": layer_by_layer(hecate),
    "eplb": layer_by_layer(eplb),
    "laer": layer_by_layer(laer),
    "faster_moe": layer_by_layer(faster_moe),
    "llep": layer_by_layer(llep),
    "plain": layer_by_layer(plain),
}
