"""How long one MoE layer takes under a plan: forward and backward, predicted from loads and measured speeds. Pure.

The slowest device decides, phase by phase: tokens out, experts, tokens back; backward the same with twice the products.
Copies travel while the attention before the layer computes, their gradients while its backward pass does, and only what is left
counts. Sources: Hecate, arXiv 2502.02581, section 4.2; LAER-MoE, arXiv 2602.11686, section 4 (4 exchanges + 3 products).

Letters: E experts of a layer, D devices, M messages, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from parallel.flows import Flows, Plan, flows
from parallel.placement import Budget, Floats, Placement, Topology, missing
from parallel.routes import Routes, routes

NUMBERS = 11  # in LayerCosts.numbers


@dataclass(frozen=True)
class Link:
    """What a device sends in one direction, and at the same time receives, takes latency_s + bytes * byte_s."""

    latency_s: float
    byte_s: float


@dataclass(frozen=True)
class LayerCosts:
    """Measured or published speeds, for one layer of one model."""

    entry_s: float  # one token through one expert, forward
    expert_s: float  # what an expert with tokens costs beside them, forward: its weights are read, its last tile is not full
    row_bytes: float  # of a token on its way
    expert_bytes: float  # of a copy on its way
    sum_bytes: float  # of an expert's gradient between nodes, in float32
    within: Link  # between devices of a node
    across: Link  # between nodes, for each device
    attention_s: float  # forward, of what lies before the layer
    planning_s: float  # on the host, for one layer

    @property
    def numbers(self) -> list[float]:
        """For a checkpoint; `from_numbers` makes the same of them."""
        return [number for part in astuple(self) for number in (part if isinstance(part, tuple) else (part,))]

    @staticmethod
    def from_numbers(numbers: Sequence[float]) -> LayerCosts:
        entry, expert, row, weights, total, latency, byte, far_latency, far_byte, attention, planning = numbers
        within, across = Link(latency, byte), Link(far_latency, far_byte)
        return LayerCosts(entry, expert, row, weights, total, within, across, attention, planning)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a forward and a backward pass."""

    products_s: float
    tokens_s: float
    weights_s: float  # waited for copies and for the return of their gradients

    @property
    def total_s(self) -> float:
        return self.products_s + self.tokens_s + self.weights_s


@dataclass(frozen=True)
class Setting:
    """What is known beside loads and owners when a layer's copies are planned."""

    topology: Topology
    top_k: int
    budget: Budget
    rematerialise: bool  # copies are fetched again for the backward pass
    costs: LayerCosts


def layer_time(plan: Plan, loads_E: Floats, setting: Setting, present: Placement | None = None) -> LayerTime:
    """Predicted for copies that are planned before the layer's attention begins; or behind it, where nothing hides the way of
    those that are not among the copies `present` then."""
    weights_s = weights_time(plan.placement, setting, present)
    return LayerTime(*pass_times(flows(plan, setting.topology, loads_E), setting), weights_s)


def weights_time(placement: Placement, setting: Setting, present: Placement | None) -> float:
    """`LayerTime.weights_s`, which does not depend on loads."""
    gather_s, return_s = copy_times(placement, setting.topology, setting.costs)
    hidden_s = setting.costs.attention_s
    backward_s = return_s + gather_s if setting.rematerialise else return_s
    if present is None:
        waited_s = max(gather_s - hidden_s, 0.0)
    else:
        waited_s, _ = copy_times(missing(placement, present), setting.topology, setting.costs)
    return waited_s + max(backward_s - 2 * hidden_s, 0.0)


def pass_times(found: Flows, setting: Setting) -> tuple[float, float]:
    """(seconds of products, seconds of tokens on their way), forward and backward."""
    products_s = float((found.entries_D * setting.costs.entry_s + found.experts_D * setting.costs.expert_s).max())
    return 3 * products_s, 4 * exchange_time(found, setting)


def exchange_time(found: Flows, setting: Setting) -> float:
    """One exchange of tokens; both kinds of links work at the same time."""
    within_bytes, across_bytes = exchanged_bytes(found, setting)
    return max(_travel(within_bytes, setting.costs.within), _travel(across_bytes, setting.costs.across))


def exchanged_bytes(found: Flows, setting: Setting) -> tuple[float, float]:
    """(within nodes, between nodes): the most that a device gives or takes in one exchange of tokens. A token's row goes to a
    device once, whatever number of its choices that device serves."""
    topology, top_k, costs = setting.topology, setting.top_k, setting.costs
    near, tokens = topology.devices_per_node - 1, float(found.entries_D.sum()) / top_k / topology.devices
    within = _most_rows(found.within_in_D, found.within_out_D, near, tokens, top_k)
    across = _most_rows(found.across_in_D, found.across_out_D, topology.devices - near - 1, tokens, top_k)
    return within * costs.row_bytes, across * costs.row_bytes


def _most_rows(in_D: Floats, out_D: Floats, sources: int, tokens: float, top_k: int) -> float:
    """The largest number of rows that a device takes or gives, for `sources` devices with `tokens` each on the other side.

    With a part q of a device's entries going somewhere, and K choices that do not know of each other, 1 - (1 - q)^K of its
    tokens go there.
    """
    total = float(in_D.sum())
    if total == 0:
        return 0.0
    rows_D = sources * tokens * (1 - (1 - np.minimum(in_D / (sources * tokens * top_k), 1.0)) ** top_k)
    return max(float(rows_D.max()), float(out_D.max()) * float(rows_D.sum()) / total)


def _travel(sent_bytes: float, link: Link) -> float:
    return link.latency_s + sent_bytes * link.byte_s if sent_bytes else 0.0


def copy_times(placement: Placement, topology: Topology, costs: LayerCosts) -> tuple[float, float]:
    """(SparseAllGather, SparseReduceScatter) in seconds: hop by hop, the device with most to send or to take decides."""
    gather_s, return_s, within_s = hop_times(placement, topology, costs)
    return gather_s + within_s, return_s + within_s


def hop_times(placement: Placement, topology: Topology, costs: LayerCosts) -> tuple[float, float, float]:
    """(copies between nodes, their gradients between nodes, either of them within nodes) in seconds."""
    if len(placement.holders[0]) == len(placement.owner_E):
        return 0.0, 0.0, 0.0  # there are none
    found = routes(placement, topology)
    *crossing, inside = _most_messages(found, topology.devices)
    within_s = _travel(inside * costs.expert_bytes, costs.within)
    gather_s = sum(_travel(most * costs.expert_bytes, costs.across) for most in crossing)
    return_s = sum(_travel(most * costs.sum_bytes, costs.across) for most in crossing)
    return gather_s, return_s, within_s


def _most_messages(found: Routes, devices: int) -> list[int]:
    """That a device sends or receives, of each hop."""
    counts = [
        np.bincount(found.hop_M * devices + side_M, minlength=(found.across + 1) * devices)
        for side_M in (found.source_M, found.target_M)
    ]
    most: list[int] = np.maximum(*counts).reshape(-1, devices).max(axis=1).tolist()
    return most


def hidden_copies(costs: LayerCosts, nodes: int) -> int:
    """How many experts of a layer can be copied while attention computes (Hecate's t): forward, and backward as much twice."""
    link = costs.across if nodes > 1 else costs.within
    return int(max(costs.attention_s - link.latency_s, 0.0) / (costs.expert_bytes * link.byte_s))
