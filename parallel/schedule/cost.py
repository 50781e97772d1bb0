"""What the parts of an MoE layer cost: lines through measured times, and the amount of work of a layer.

Source: FSMoE, arXiv 2501.10714, section 4.1: an operation takes t = alpha + n * beta, one r-th of it alpha + n/r * beta.

Letters: D devices, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel.cuts import stay_apart
from parallel.flows import Plan, flows
from parallel.layer_cost import LayerCosts, Link, Setting, beside_rows_s, exchanged, exchanges
from parallel.placement import Floats

BACKWARD_PRODUCTS = 2  # products of a backward pass for each of the forward pass: gradients of the rows and of the weights


@dataclass(frozen=True)
class Line:
    """t = alpha_s + amount * beta_s; nothing takes no time."""

    alpha_s: float
    beta_s: float

    def seconds(self, amount: float) -> float:
        return self.alpha_s + amount * self.beta_s if amount else 0.0


@dataclass(frozen=True)
class Fit:
    line: Line
    r_squared: float  # share of the variance of the times that the line explains; 1 is all


def fit(amounts: Sequence[float], seconds: Sequence[float]) -> Fit:
    """The line with the least squared error of which neither part is negative.

    Raises:
        ValueError: fewer than two different amounts, or a number that is negative or not finite.
    """
    x, y = np.asarray(amounts, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if x.shape != y.shape or len(np.unique(x)) < 2:
        raise ValueError(f"a line needs times of two amounts or more, got {len(x)} amounts and {len(y)} times")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x >= 0).all() and (y >= 0).all()):
        raise ValueError("amounts and times must be finite and not negative")
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    start = float(y.mean() - slope * x.mean())
    if start < 0:
        slope, start = float((x * y).sum() / (x * x).sum()), 0.0  # the best line through the origin
    elif slope < 0:
        slope, start = 0.0, float(y.mean())
    left, spread = float(((y - start - slope * x) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    return Fit(Line(start, slope), 1 - left / spread if spread > 0 else 1.0)


@dataclass(frozen=True)
class Chunk:
    """Seconds that each stage of one chunk of an MoE layer takes. Tokens travel as long back as forth."""

    expert_s: float  # with what the device does beside the products
    across_s: float = 0.0  # tokens between nodes
    within_s: float = 0.0  # tokens between devices of a node, at the same time
    gather_s: float = 0.0  # tokens to all devices that serve them, or hold a part of their expert, once they are on its node
    scatter_s: float = 0.0  # and the sums of their results


# ---------------------------------------------------------------- experts cut over the devices of a node, as FSMoE has them


@dataclass(frozen=True)
class EspCosts:
    """Of FSMoE's layout, where an expert is cut over all devices of a node. Amounts are numbers, not bytes."""

    exchange: Line  # all-to-all between nodes
    gather: Line  # within a node
    scatter: Line
    reduce: Line  # all-reduce of dense gradients between nodes
    product: Line  # one matrix product; amounts are multiplications


@dataclass(frozen=True)
class EspWorkload:
    """Amounts of one MoE layer on one device (section 4.1)."""

    exchange: float
    gather: float  # and as much in the scatter
    product: float  # of one matrix product
    products: int


def esp_workload(
    tokens: int, hidden: int, expert_hidden: int, top_k: int, capacity: float, devices_per_node: int, products: int
) -> EspWorkload:
    """`tokens` are those of a node, which all its devices hold; `capacity` is the factor f on an even load."""
    rows = top_k * capacity * tokens
    return EspWorkload(
        exchange=rows * hidden / devices_per_node,
        gather=rows * hidden,
        product=rows * hidden * expert_hidden / devices_per_node,
        products=products,
    )


def esp_chunk(costs: EspCosts, work: EspWorkload, degree: int, *, backward: bool) -> Chunk:
    gather = work.gather if work.gather > work.exchange else 0.0  # a node of one device holds whole experts
    products = work.products * (BACKWARD_PRODUCTS if backward else 1)
    return Chunk(
        expert_s=products * costs.product.seconds(work.product / degree),
        across_s=costs.exchange.seconds(work.exchange / degree),
        gather_s=costs.gather.seconds(gather / degree),
        scatter_s=costs.scatter.seconds(gather / degree),
    )


# ---------------------------------------------------------------- whole experts and their copies, as Tessera has them


@dataclass(frozen=True)
class ShardedWorkload:
    """Of the busiest device in each respect. A token's row goes to a device once, whatever number of its choices it serves."""

    within_bytes: float  # tokens in one direction, to other devices of the node
    across_bytes: float  # and to other nodes
    rows_s: float  # on the device, of one exchange in one direction
    beside_rows_s: float  # layer_cost.beside_rows_s
    product_s: float  # of all entries, forward
    weights_s: float  # of all experts that have entries, beside them, forward
    two_level: bool  # tokens go to other nodes first, then on inside
    staying: float  # share of the device's entries that its own tokens have, where they are apart (parallel/cuts.py)
    exchanged: float  # 1; 0 where nothing is exchanged (layer_cost.exchanges); of a mean, in how many of its layers it is


def sharded_workload(plan: Plan, loads_E: Floats, setting: Setting) -> ShardedWorkload:
    """Of one MoE layer under a plan and the entries of each expert on all devices."""
    found, costs = flows(plan, setting.topology, loads_E), setting.costs
    sent = exchanged(found, setting)
    busiest = int((found.entries_D * costs.entry_s + found.experts_D * costs.expert_s).argmax())
    apart = stay_apart(setting.topology.devices, two_level=setting.two_level)
    return ShardedWorkload(
        within_bytes=float(sent.within_bytes),
        across_bytes=float(sent.across_bytes),
        rows_s=float(sent.rows) * costs.row_s,
        beside_rows_s=float(beside_rows_s(exchanges(found, setting), costs)),
        product_s=float(found.entries_D[busiest]) * costs.entry_s,
        weights_s=float(found.experts_D[busiest]) * costs.expert_s,
        two_level=setting.two_level,
        staying=float(found.staying_D[busiest] / max(found.entries_D[busiest], 1.0)) if apart else 0.0,
        exchanged=float(exchanges(found, setting)),
    )


def sharded_chunk(costs: LayerCosts, work: ShardedWorkload, degree: int, *, backward: bool) -> Chunk:
    """Every chunk reads the weights of all experts again, fills as many last tiles, and plans an exchange of its own."""
    products, planned_s = (BACKWARD_PRODUCTS, 0.0) if backward else (1, work.beside_rows_s)
    device_s = products * (work.product_s / degree + work.weights_s)
    expert_s = device_s + 2 * work.rows_s / degree + planned_s
    across_s = _line(costs.across).seconds(work.across_bytes / degree)
    within_s = _line(costs.within).seconds(work.within_bytes / degree)
    if work.two_level:
        return Chunk(expert_s, across_s, gather_s=within_s, scatter_s=within_s)
    return Chunk(expert_s, across_s, within_s)


def _line(link: Link) -> Line:
    return Line(link.latency_s, link.byte_s)
