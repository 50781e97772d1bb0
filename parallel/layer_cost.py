"""How long one MoE layer takes under a plan: forward and backward, predicted from loads and measured speeds. Pure.

The slowest device decides, phase by phase: tokens out, experts, tokens back; backward the same with twice the products. On both
ends of their way rows are laid out, put in place and summed; gradients of weights are added up in float32, those of copies too.
Copies travel while the attention before the layer computes, their gradients while its backward pass does, and only what is left
counts. Sources: Hecate, arXiv 2502.02581, section 4.2; LAER-MoE, arXiv 2602.11686, section 4 (4 exchanges + 3 products).

Functions of flows and of what is exchanged take one layer or several, whose axis is the first then.

Letters: L layers, E experts of a layer, D devices, M messages, K top-k, H hops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Generic, TypeVar

import numpy as np

from parallel.flows import TINY, Flows, Plan, flows
from parallel.placement import Bools, Budget, Floats, Ints, Placement, Placements, Topology, TransportKind, on_owners
from parallel.routes import WHOLE, Routes, routes_of

NUMBERS = 15  # in LayerCosts.numbers


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
    planning_s: float  # on the host, for one layer behind its gate
    row_s: float  # a row beside its way, on either end and in one direction: laid out, put in place, summed; part of its plan
    exchange_s: float  # of a layer's exchanges beside their rows, forward and backward: sizes, order, the plan's start
    order_s: float  # of its tokens' choices, which a device puts in order where nothing is exchanged, too
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
    kind: TransportKind = "messages"  # by which tokens travel

    @property
    def two_level(self) -> bool:
        """Whether tokens cross to a node once, and go on inside it (two_level_exchange.py)."""
        return self.kind == "two_level"

    @property
    def in_place(self) -> bool:
        """Whether ranks read each other's memory (peer_exchange.py)."""
        return self.kind == "peer_memory"

    @property
    def alone(self) -> bool:
        """Whether nothing of a layer is exchanged where each device serves its own tokens (moe_layer.py)."""
        return self.topology.devices == 1 or (self.in_place and not self.rematerialise)


def layer_time(plan: Plan, loads_E: Floats, setting: Setting, present: Placement | None = None) -> LayerTime:
    """Predicted for copies that are planned before the layer's attention begins; or behind it, where nothing hides the way of
    those that are not among the copies `present` then."""
    there = None if present is None else Placements.of(present)
    weights = weights_times(Placements.of(plan.placement), setting, there)
    products_s, tokens_s = pass_times(flows(plan, setting.topology, loads_E), setting)
    return LayerTime(float(products_s), float(tokens_s), float(weights.waited_L[0]), float(weights.sums_L[0]))


@dataclass(frozen=True)
class WeightsTimes:
    """What of the `LayerTime` of layers does not depend on loads."""

    waited_L: Floats
    sums_L: Floats

    @property
    def total_L(self) -> Floats:
        return self.waited_L + self.sums_L


def weights_times(placements: Placements, setting: Setting, present: Placements | None) -> WeightsTimes:
    times = copy_times_of(placements, setting.topology, setting.costs)
    hidden_s = setting.costs.attention_s
    backward_L = times.return_s + times.gather_s if setting.rematerialise else times.return_s
    waited_L = times.gather_s
    if present is None:
        waited_L = np.maximum(waited_L - hidden_s, 0.0)
    elif len(present.holders[0]) > present.owner_LE.size:  # else all copies are new
        owner_LE, copies_LED = placements.owner_LE, placements.copies_LED
        new_LED = copies_LED & ~present.copies_LED | on_owners(owner_LE, copies_LED.shape[2])
        waited_L = copy_times_of(Placements(owner_LE, new_LED), setting.topology, setting.costs).gather_s
    return WeightsTimes(waited_L + np.maximum(backward_L - 2 * hidden_s, 0.0), times.sums_s)


def pass_times(found: Flows, setting: Setting) -> tuple[Floats, Floats]:
    """(seconds of products, seconds of tokens on their way and in order), forward and backward."""
    costs = setting.costs
    products_s = (found.entries_D * costs.entry_s + found.experts_D * costs.expert_s).max(axis=-1)
    tokens_s = 4 * exchange_time(found, setting) + beside_rows_s(exchanges(found, setting), costs)
    return np.asarray(3 * products_s), np.asarray(tokens_s)


def exchanges(found: Flows, setting: Setting) -> Bools:
    """Whether tokens are exchanged at all; () or (L,). An exchange in which none travels takes its time, too."""
    return np.logical_not(found.stays & setting.alone)


def beside_rows_s(exchanged: Bools, costs: LayerCosts) -> Floats:
    """What tokens cost beside their rows and their way, in layers that exchange them and in others."""
    return np.where(exchanged, costs.exchange_s, costs.order_s)


def least_pass_s(crossing_L: Floats, busiest_L: Floats, entries_L: Floats, setting: Setting) -> Floats:
    """No plan of layers with so many entries takes less for products and tokens (`pass_times`), if there is an exchange, so
    many entries go to other nodes and one device computes so many, or the mean where that is more; (L,) each."""
    topology, costs, per_node = setting.topology, setting.costs, setting.topology.devices_per_node
    mean_L = entries_L / topology.devices
    tokens_L, far = mean_L / setting.top_k, topology.devices - per_node
    taken_KL = np.array([crossing_L / topology.devices, crossing_L / topology.nodes])  # some device and some node take the mean
    to_device_L, to_node_L = rows_of(taken_KL, (far, far), tokens_L, setting.top_k)
    if setting.two_level:
        relayed_L, inside_L = to_node_L / per_node, to_device_L * (per_node - 1) / per_node
        rows_L = tokens_L + 2 * relayed_L + to_device_L
        sent = Exchanged(inside_L * costs.row_bytes, relayed_L * costs.row_bytes, rows_L)
    else:
        sent = Exchanged(np.zeros_like(mean_L), to_device_L * costs.row_bytes, tokens_L + to_device_L)
    products_L = 3 * np.maximum(busiest_L, mean_L) * costs.entry_s
    return np.asarray(products_L + 4 * _exchange_s(sent, setting) + costs.exchange_s)


def exchange_time(found: Flows, setting: Setting) -> Floats:
    """One exchange of tokens in one direction."""
    return _exchange_s(exchanged(found, setting), setting)


def _exchange_s(sent: Exchanged, setting: Setting) -> Floats:
    """Both kinds of links work at the same time; in two levels one after the other."""
    costs = setting.costs
    within_s, across_s = _travel(sent.within_bytes, costs.within), _travel(sent.across_bytes, costs.across)
    ways_s = within_s + across_s if setting.two_level else np.maximum(within_s, across_s)
    return np.asarray(ways_s + sent.rows * costs.row_s)


@dataclass(frozen=True)
class Exchanged:
    """In one exchange of tokens; numbers, or (L,) of several layers."""

    within_bytes: Floats  # the most that a device gives to or takes from others of its node
    across_bytes: Floats  # and other nodes
    rows: Floats  # the most that a device lays out of its own tokens and puts in place of those that come, from itself too


def exchanged(found: Flows, setting: Setting) -> Exchanged:
    """A token's row goes to a device once, whatever number of its choices that device serves; in two levels to a node once.
    Nothing is laid out where nothing is exchanged (`exchanges`)."""
    topology, top_k, costs = setting.topology, setting.top_k, setting.costs
    near, tokens_1 = topology.devices_per_node - 1, found.entries_D.sum(axis=-1, keepdims=True) / top_k / topology.devices
    far = topology.devices - near - 1
    own_D = found.entries_D - found.within_in_D - found.across_in_D
    if setting.two_level:
        return _in_two_levels(found, own_D, tokens_1, setting)
    kinds_KD = np.array([found.within_in_D, found.across_in_D, own_D])
    rows_KD = rows_of(kinds_KD, (near, far, 1), tokens_1, top_k)
    within_bytes, across_bytes = costs.row_bytes * _most(
        rows_KD[:2], kinds_KD[:2], np.array([found.within_out_D, found.across_out_D])
    )
    rows = tokens_1[..., 0] + rows_KD.sum(axis=0).max(axis=-1)
    return Exchanged(within_bytes, across_bytes, rows * exchanges(found, setting))


def _in_two_levels(found: Flows, own_D: Floats, tokens_1: Floats, setting: Setting) -> Exchanged:
    """Rows for a node come to its devices alike, each from those at its place in other nodes; every device passes on what came
    to it, and its own tokens' rows, to those that serve them."""
    topology, top_k, costs, size = setting.topology, setting.top_k, setting.costs, setting.topology.devices_per_node
    near, far = size - 1, topology.devices - size
    on_nodes = (*own_D.shape[:-1], topology.nodes, size)
    to_node_D = found.across_in_D.reshape(on_nodes).sum(axis=-1).repeat(size, axis=-1)
    stays_D = tokens_1 * top_k - found.across_out_D
    kinds_KD = np.array([found.within_in_D, found.across_in_D, own_D, to_node_D, stays_D])
    within_D, across_D, here_D, relayed_D, stays_D = rows_of(kinds_KD, (near, far, 1, far, 1), tokens_1, top_k)
    relayed_D = relayed_D / size
    elsewhere = near / size  # of what others send to a node's device so much comes through other devices there
    in_D = found.within_in_D + found.across_in_D * elsewhere
    out_D = found.within_out_D + (to_node_D - found.across_in_D) / size
    within_bytes, across_bytes = costs.row_bytes * _most(
        np.array([within_D + across_D * elsewhere, relayed_D]),
        np.array([in_D, found.across_in_D]),
        np.array([out_D, found.across_out_D]),
    )
    rows = tokens_1[..., 0] + (2 * (relayed_D + stays_D) + within_D + across_D + here_D).max(axis=-1)
    return Exchanged(within_bytes, across_bytes, rows * exchanges(found, setting))


def rows_of(in_KD: Floats, sources: tuple[int, ...], tokens: Floats, top_k: int) -> Floats:
    """The rows that come to each device with so many entries from other numbers of `sources`, devices that have `tokens` each.

    With a part q of a device's entries going somewhere, and K choices that do not know of each other, 1 - (1 - q)^K of its
    tokens go there.
    """
    most_K1 = np.multiply.outer(sources, tokens)
    part_KD = np.minimum(in_KD / np.maximum(most_K1 * top_k, TINY), 1.0)
    return np.asarray(most_K1 * (1 - (1 - part_KD) ** top_k))


def _most(rows_D: Floats, in_D: Floats, out_D: Floats) -> Floats:
    """The largest number of rows that a device takes or gives; it gives as many rows an entry as all do."""
    gives = out_D.max(axis=-1) * rows_D.sum(axis=-1) / np.maximum(in_D.sum(axis=-1), TINY)
    return np.asarray(np.maximum(rows_D.max(axis=-1), gives))


def _travel(sent_bytes: Floats, link: Link) -> Floats:
    return np.asarray((sent_bytes > 0) * link.latency_s + sent_bytes * link.byte_s)


Seconds = TypeVar("Seconds", float, Floats)


@dataclass(frozen=True)
class CopyTimes(Generic[Seconds]):
    """Of the copies of a layer and of their gradients, or (L,) of several layers. A device begins a hop when it and those with
    whom it deals in it are through with those before, and takes as long as what it sends or takes needs."""

    across_s: Seconds  # copies between nodes
    back_across_s: Seconds  # their gradients between nodes
    within_s: Seconds  # either of them within nodes
    sums_s: Seconds  # of gradients, those of the owners too

    @property
    def gather_s(self) -> Seconds:
        """SparseAllGather."""
        return self.across_s + self.within_s

    @property
    def return_s(self) -> Seconds:
        """SparseReduceScatter, without its sums."""
        return self.back_across_s + self.within_s


def copy_times(placement: Placement, topology: Topology, costs: LayerCosts) -> CopyTimes[float]:
    found = copy_times_of(Placements.of(placement), topology, costs)
    return CopyTimes(*(float(part_L[0]) for part_L in vars(found).values()))


def copy_times_of(placements: Placements, topology: Topology, costs: LayerCosts) -> CopyTimes[Floats]:
    (layers, experts), devices = placements.owner_LE.shape, topology.devices
    at_LE = placements.owner_LE + devices * np.arange(layers)[:, None]
    owned_LD = np.bincount(at_LE.ravel(), minlength=layers * devices).reshape(layers, devices)
    if len(placements.holders[0]) == layers * experts:  # there are no copies
        nothing = np.zeros(layers)
        return CopyTimes(nothing, nothing, nothing, owned_LD.max(axis=1) * costs.sum_s)
    found = routes_of(placements, topology)
    layer_M = found.expert_M // experts
    # How many experts a device sends in each hop, and takes; halves are counted as such.
    shape, amount_M = (layers, found.across + 1, devices), np.where(found.half_M == WHOLE, 1.0, 0.5)
    at_M = (layer_M * shape[1] + found.hop_M) * devices
    sent_LHD, taken_LHD = (
        np.bincount(at_M + side_M, amount_M, math.prod(shape)).reshape(shape) for side_M in (found.source_M, found.target_M)
    )
    amount_LHD = np.maximum(sent_LHD, taken_LHD)
    crossing_L, inside_L = _longest(found, layer_M, amount_LHD), amount_LHD[:, -1].max(axis=1)
    hops_L = (amount_LHD[:, :-1].any(axis=2) * np.arange(1, found.across + 1)).max(axis=1, initial=0)
    hops_s = hops_L * costs.across.latency_s
    return CopyTimes(
        across_s=hops_s + crossing_L * costs.expert_bytes * costs.across.byte_s,
        back_across_s=hops_s + crossing_L * costs.sum_bytes * costs.across.byte_s,  # the same way back
        within_s=_travel(inside_L * costs.expert_bytes, costs.within),
        sums_s=(owned_LD + sent_LHD.sum(axis=1)).max(axis=1) * costs.sum_s,  # who sent a copy adds what comes back
    )


def _longest(found: Routes, layer_M: Ints, amount_LHD: Floats) -> Floats:
    """How many experts of a layer one after the other go between nodes until all are there, (L,)."""
    layers, _, devices = amount_LHD.shape
    if not found.across:
        return np.zeros(layers)
    ready_D, first = np.zeros(layers * devices), 0
    order_M = np.argsort(found.hop_M, kind="stable")
    source_M, target_M = ((layer_M * devices + side_M)[order_M] for side_M in (found.source_M, found.target_M))
    for hop, last in enumerate(np.bincount(found.hop_M, minlength=found.across + 1).cumsum()[:-1].tolist()):
        begin_M = np.maximum(ready_D[source_M[first:last]], ready_D[target_M[first:last]])
        np.maximum.at(ready_D, source_M[first:last], begin_M)
        np.maximum.at(ready_D, target_M[first:last], begin_M)
        ready_D += amount_LHD[:, hop].ravel()
        first = last
    return np.asarray(ready_D.reshape(layers, devices).max(axis=1))


def hidden_copies(costs: LayerCosts, nodes: int) -> int:
    """How many experts of a layer can be copied while attention computes (Hecate's t): forward, and backward as much twice."""
    link = costs.across if nodes > 1 else costs.within
    return int(max(costs.attention_s - link.latency_s, 0.0) / (costs.expert_bytes * link.byte_s))
