"""How long one MoE layer takes under a plan: forward and backward, predicted from loads and measured speeds. Pure.

The slowest device decides, phase by phase: tokens out, experts, tokens back; backward the same with twice the products. On both
ends of their way rows are laid out, put in place and summed; gradients of weights are added up in float32, those of copies too.
Copies travel while the attention before the layer computes, their gradients while its backward pass does, and only what is left
counts. Sources: Hecate, arXiv 2502.02581, section 4.2; LAER-MoE, arXiv 2602.11686, section 4 (4 exchanges + 3 products).

Letters: E experts of a layer, D devices, M messages, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from parallel.flows import Flows, Plan, flows
from parallel.placement import Budget, Floats, Ints, Placement, Topology, missing
from parallel.routes import WHOLE, Routes, routes

NUMBERS = 14  # in LayerCosts.numbers
TINY = 1e-300  # divides nothing by something


@dataclass(frozen=True)
class Link:
    """What a device sends in one direction, and at the same time receives, takes latency_s + bytes * byte_s."""

    latency_s: float
    byte_s: float


@dataclass(frozen=True)
class LayerCosts:
    """Measured or published speeds, for one layer of one model."""

    entry_s: float  # one token through one expert, forward, or a third of forward and backward
    expert_s: float  # and what an expert with tokens costs beside them: its weights are read, its last tile is not full
    row_bytes: float  # of a token on its way
    expert_bytes: float  # of a copy on its way
    sum_bytes: float  # of an expert's gradient between nodes, in float32
    within: Link  # between devices of a node
    across: Link  # between nodes, for each device
    attention_s: float  # forward, of what lies before the layer
    planning_s: float  # on the host, for one layer
    row_s: float  # a row beside its way, on either end and in one direction: laid out, put in place, summed; part of its plan
    exchange_s: float  # what the exchanges of a layer cost beside their rows, forward and backward: the sizes, the plan's start
    sum_s: float  # one expert's gradient, added in float32

    @property
    def numbers(self) -> list[float]:
        """For a checkpoint; `from_numbers` makes the same of them."""
        return [number for part in astuple(self) for number in (part if isinstance(part, tuple) else (part,))]

    @staticmethod
    def from_numbers(numbers: Sequence[float]) -> LayerCosts:
        entry, expert, row, weights, total, latency, byte, far_latency, far_byte, *others = numbers
        within, across = Link(latency, byte), Link(far_latency, far_byte)
        return LayerCosts(entry, expert, row, weights, total, within, across, *others)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a forward and a backward pass."""

    products_s: float
    tokens_s: float
    weights_s: float  # waited for copies and for the return of their gradients
    sums_s: float  # of gradients of weights

    @property
    def total_s(self) -> float:
        return self.products_s + self.tokens_s + self.weights_s + self.sums_s


@dataclass(frozen=True)
class Setting:
    """What is known beside loads and owners when a layer's copies are planned."""

    topology: Topology
    top_k: int
    budget: Budget
    rematerialise: bool  # copies are fetched again for the backward pass
    costs: LayerCosts
    two_level: bool = False  # tokens cross to a node once, and go on inside it (two_level_exchange.py)


def layer_time(plan: Plan, loads_E: Floats, setting: Setting, present: Placement | None = None) -> LayerTime:
    """Predicted for copies that are planned before the layer's attention begins; or behind it, where nothing hides the way of
    those that are not among the copies `present` then."""
    weights = weights_time(plan.placement, setting, present)
    return LayerTime(*pass_times(flows(plan, setting.topology, loads_E), setting), weights.waited_s, weights.sums_s)


@dataclass(frozen=True)
class WeightsTime:
    """What of a `LayerTime` does not depend on loads."""

    waited_s: float
    sums_s: float

    @property
    def total_s(self) -> float:
        return self.waited_s + self.sums_s


def weights_time(placement: Placement, setting: Setting, present: Placement | None) -> WeightsTime:
    times = copy_times(placement, setting.topology, setting.costs)
    hidden_s = setting.costs.attention_s
    backward_s = times.return_s + times.gather_s if setting.rematerialise else times.return_s
    if present is None:
        waited_s = max(times.gather_s - hidden_s, 0.0)
    else:
        waited_s = copy_times(missing(placement, present), setting.topology, setting.costs).gather_s
    return WeightsTime(waited_s + max(backward_s - 2 * hidden_s, 0.0), times.sums_s)


def pass_times(found: Flows, setting: Setting) -> tuple[float, float]:
    """(seconds of products, seconds of tokens on their way), forward and backward."""
    costs = setting.costs
    products_s = float((found.entries_D * costs.entry_s + found.experts_D * costs.expert_s).max())
    return 3 * products_s, 4 * exchange_time(found, setting) + costs.exchange_s


def least_pass_s(crossing: float, busiest: float, entries: float, setting: Setting) -> float:
    """No plan of a layer with so many entries takes less for products and tokens (`pass_times`), if so many of them go to other
    nodes and one device computes so many, or the mean where that is more."""
    topology, costs, per_node = setting.topology, setting.costs, setting.topology.devices_per_node
    mean = entries / topology.devices
    tokens, far = mean / setting.top_k, topology.devices - per_node
    taken = np.array([crossing / topology.devices, crossing / topology.nodes])  # some device and some node take the mean
    to_device, to_node = rows_of(taken[:, None], (far, far), tokens, setting.top_k)[:, 0].tolist()
    if setting.two_level:
        relayed, inside = to_node / per_node, to_device * (per_node - 1) / per_node
        sent = Exchanged(inside * costs.row_bytes, relayed * costs.row_bytes, tokens + 2 * relayed + to_device)
    else:
        sent = Exchanged(0.0, to_device * costs.row_bytes, tokens + to_device)
    return 3 * max(busiest, mean) * costs.entry_s + 4 * _exchange_s(sent, setting) + costs.exchange_s


def exchange_time(found: Flows, setting: Setting) -> float:
    """One exchange of tokens in one direction."""
    return _exchange_s(exchanged(found, setting), setting)


def _exchange_s(sent: Exchanged, setting: Setting) -> float:
    """Both kinds of links work at the same time; in two levels one after the other."""
    costs = setting.costs
    within_s, across_s = _travel(sent.within_bytes, costs.within), _travel(sent.across_bytes, costs.across)
    return (within_s + across_s if setting.two_level else max(within_s, across_s)) + sent.rows * costs.row_s


@dataclass(frozen=True)
class Exchanged:
    """In one exchange of tokens."""

    within_bytes: float  # the most that a device gives to or takes from others of its node
    across_bytes: float  # and other nodes
    rows: float  # the most that a device lays out of its own tokens and puts in place of those that come, from itself too


def exchanged(found: Flows, setting: Setting) -> Exchanged:
    """A token's row goes to a device once, whatever number of its choices that device serves; in two levels to a node once."""
    topology, top_k, costs = setting.topology, setting.top_k, setting.costs
    near, tokens = topology.devices_per_node - 1, float(found.entries_D.sum()) / top_k / topology.devices
    far = topology.devices - near - 1
    own_D = found.entries_D - found.within_in_D - found.across_in_D
    if setting.two_level:
        return _in_two_levels(found, own_D, tokens, setting)
    within_D, across_D, here_D = rows_of(np.array([found.within_in_D, found.across_in_D, own_D]), (near, far, 1), tokens, top_k)
    return Exchanged(
        _most(within_D, found.within_in_D, found.within_out_D) * costs.row_bytes,
        _most(across_D, found.across_in_D, found.across_out_D) * costs.row_bytes,
        tokens + float((within_D + across_D + here_D).max()),
    )


def _in_two_levels(found: Flows, own_D: Floats, tokens: float, setting: Setting) -> Exchanged:
    """Rows for a node come to its devices alike, each from those at its place in other nodes; every device passes on what came
    to it, and its own tokens' rows, to those that serve them."""
    topology, top_k, costs, size = setting.topology, setting.top_k, setting.costs, setting.topology.devices_per_node
    near, far = size - 1, topology.devices - size
    to_node_D = np.repeat(found.across_in_D.reshape(topology.nodes, size).sum(axis=1), size)
    stays_D = tokens * top_k - found.across_out_D
    kinds_KD = np.array([found.within_in_D, found.across_in_D, own_D, to_node_D, stays_D])
    within_D, across_D, here_D, relayed_D, stays_D = rows_of(kinds_KD, (near, far, 1, far, 1), tokens, top_k)
    relayed_D = relayed_D / size
    elsewhere = near / size  # of what others send to a node's device so much comes through other devices there
    in_D = found.within_in_D + found.across_in_D * elsewhere
    out_D = found.within_out_D + (to_node_D - found.across_in_D) / size
    return Exchanged(
        _most(within_D + across_D * elsewhere, in_D, out_D) * costs.row_bytes,
        _most(relayed_D, found.across_in_D, found.across_out_D) * costs.row_bytes,
        tokens + float((2 * (relayed_D + stays_D) + within_D + across_D + here_D).max()),
    )


def rows_of(in_KD: Floats, sources: tuple[int, ...], tokens: float, top_k: int) -> Floats:
    """The rows that come to each device with so many entries from other numbers of `sources`, devices that have `tokens` each.

    With a part q of a device's entries going somewhere, and K choices that do not know of each other, 1 - (1 - q)^K of its
    tokens go there.
    """
    most_K1 = np.array(sources)[:, None] * tokens
    part_KD = np.minimum(in_KD / np.maximum(most_K1 * top_k, TINY), 1.0)
    return np.asarray(most_K1 * (1 - (1 - part_KD) ** top_k))


def _most(rows_D: Floats, in_D: Floats, out_D: Floats) -> float:
    """The largest number of rows that a device takes or gives; it gives as many rows an entry as all do."""
    total = float(in_D.sum())
    return max(float(rows_D.max()), float(out_D.max()) * float(rows_D.sum()) / total) if total else 0.0


def _travel(sent_bytes: float, link: Link) -> float:
    return link.latency_s + sent_bytes * link.byte_s if sent_bytes else 0.0


@dataclass(frozen=True)
class CopyTimes:
    """Seconds of the copies of a layer and of their gradients. A device begins a hop when it and those with whom it deals in it
    are through with those before, and takes as long as what it sends or takes needs."""

    across_s: float  # copies between nodes
    back_across_s: float  # their gradients between nodes
    within_s: float  # either of them within nodes
    sums_s: float  # of gradients, those of the owners too

    @property
    def gather_s(self) -> float:
        """SparseAllGather."""
        return self.across_s + self.within_s

    @property
    def return_s(self) -> float:
        """SparseReduceScatter, without its sums."""
        return self.back_across_s + self.within_s


def copy_times(placement: Placement, topology: Topology, costs: LayerCosts) -> CopyTimes:
    owned_D = np.bincount(placement.owner_E, minlength=topology.devices)
    if len(placement.holders[0]) == len(placement.owner_E):
        return CopyTimes(0.0, 0.0, 0.0, float(owned_D.max()) * costs.sum_s)  # there are no copies
    found = routes(placement, topology)
    sent_HD, taken_HD = (_experts(found, side_M, topology.devices) for side_M in (found.source_M, found.target_M))
    amount_HD = np.maximum(sent_HD, taken_HD)
    crossing, inside = _longest(found, amount_HD), float(amount_HD[-1].max())
    hops_s = found.across * costs.across.latency_s
    return CopyTimes(
        across_s=hops_s + crossing * costs.expert_bytes * costs.across.byte_s,
        back_across_s=hops_s + crossing * costs.sum_bytes * costs.across.byte_s,  # the same way back
        within_s=_travel(inside * costs.expert_bytes, costs.within),
        sums_s=float((owned_D + sent_HD.sum(axis=0)).max()) * costs.sum_s,  # who sent a copy adds what comes back
    )


def _longest(found: Routes, amount_HD: Floats) -> float:
    """How many experts one after the other go between nodes until all are there."""
    ready_D, first = np.zeros(amount_HD.shape[1]), 0
    order_M = np.argsort(found.hop_M, kind="stable")
    source_M, target_M = found.source_M[order_M], found.target_M[order_M]
    for hop, last in enumerate(np.bincount(found.hop_M, minlength=found.across + 1).cumsum()[:-1].tolist()):
        begin_M = np.maximum(ready_D[source_M[first:last]], ready_D[target_M[first:last]])
        np.maximum.at(ready_D, source_M[first:last], begin_M)
        np.maximum.at(ready_D, target_M[first:last], begin_M)
        ready_D += amount_HD[hop]
        first = last
    return float(ready_D.max())


def _experts(found: Routes, side_M: Ints, devices: int) -> Floats:
    """(hops, D): how many experts a device sends in each hop, or takes; halves are counted as such."""
    amount_M = np.where(found.half_M == WHOLE, 1.0, 0.5)
    counts = np.bincount(found.hop_M * devices + side_M, weights=amount_M, minlength=(found.across + 1) * devices)
    return np.asarray(counts.reshape(-1, devices))


def hidden_copies(costs: LayerCosts, nodes: int) -> int:
    """How many experts of a layer can be copied while attention computes (Hecate's t): forward, and backward as much twice."""
    link = costs.across if nodes > 1 else costs.within
    return int(max(costs.attention_s - link.latency_s, 0.0) / (costs.expert_bytes * link.byte_s))
