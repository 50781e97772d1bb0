"""The parts of an MoE layer of several ranks, each measured alone: products, exchange of tokens, transfer of weights, sums.

The parts are those of the model of time (parallel/layer_cost.py), with the routing and plan of the whole layer, so this shows
which of them a prediction gets wrong. A part alone does not wait for other ranks' products, so the sum of the parts may be less
than the layer's time, or more if the layer hides some.

Letters: T tokens of a rank, V of all ranks, K top-k, R rows served here, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.accumulate import accumulate
from kernels.destinations import destinations
from kernels.expert_mlp import expert_mlp
from kernels.expert_order import expert_order
from launch.benchmarks.contest import Inputs
from launch.benchmarks.ranks import slowest
from launch.benchmarks.timing import Call, Timing
from parallel.expert_arena import ExpertArena, LayerExperts
from parallel.flows import Plan, flows
from parallel.layer_cost import LayerTime, Setting, beside_rows_s, exchanged, exchanges, layer_time
from parallel.placement import Floats
from parallel.profiling import exchange_call
from parallel.sparse_collectives import Parts


@dataclass(frozen=True)
class Predicted:
    """Seconds of a forward and a backward pass."""

    parts: LayerTime
    rows_s: float  # of the tokens' time: laid out, put in place, summed
    beside_s: float  # and what they cost beside rows and links


def predicted(plan: Plan, loads_E: Floats, setting: Setting) -> Predicted:
    found, costs = flows(plan, setting.topology, loads_E), setting.costs
    rows_s = 4 * float(exchanged(found, setting).rows) * costs.row_s
    return Predicted(layer_time(plan, loads_E, setting), rows_s, float(beside_rows_s(exchanges(found, setting), costs)))


@torch.no_grad()
def measured_parts(arena: ExpertArena, inputs: Inputs, repeats: int | None) -> dict[str, Timing]:
    """Of the arena's first layer, forward and backward, by the names of the fields of `LayerTime`; the slowest rank's.
    Collective; copies have to be here."""
    found = arena.layers[0]
    x_TD, experts_TK, weights_TK = (inputs.tensors[name].detach() for name in ("x_TD", "experts_TK", "weights_TK"))

    def destination() -> Tensor:
        split = expert_order(experts_TK, arena.shape.experts) if found.split else None
        return destinations(experts_TK, split, found.ends_ED, found.phase_E)

    here = found.index_E, found.slots_E.shape[0]
    if arena.alone(0):  # nothing travels, but choices are put in order all the same
        exchange: Callable[[], object] = partial(expert_order, experts_TK, arena.shape.experts)
    else:
        exchange = exchange_call(arena, x_TD, weights_TK.float(), experts_TK, destination, here)
    gradients = arena.shape.matrices(found.slots_E.shape[0], arena.dtype, arena.world.device)
    for part in gradients:
        part.zero_()
    calls: dict[str, Call] = {
        "products_s": _products(arena, found, experts_TK, destination()),
        "tokens_s": _tokens(exchange),
        "weights_s": partial(_weights, arena, gradients),
        "sums_s": _sums(arena, found, gradients),
    }
    return slowest(calls, arena.world, repeats, together=True)


def _tokens(exchange: Callable[[], object]) -> Call:
    return lambda number: exchange()


def _products(arena: ExpertArena, found: LayerExperts, experts_TK: Tensor, rank_TK: Tensor) -> Call:
    """With rows in order and results summed, for all tokens that this rank serves."""
    world, size = arena.world, found.slots_E.shape[0]
    experts_VK, rank_VK = (torch.cat(_of_all_ranks(part.int(), world.size)) for part in (experts_TK, rank_TK))
    here_VK = rank_VK == world.rank
    served_V = here_VK.any(dim=1)
    slots_RK = torch.where(here_VK, found.index_E[experts_VK.long()], -1)[served_V]
    order = expert_order(slots_RK, size, num_entries=int(here_VK.sum()))
    x_RD = torch.randn(slots_RK.shape[0], arena.shape.hidden, device=world.device).to(arena.dtype).requires_grad_()
    weights_RK = torch.full(slots_RK.shape, 1 / slots_RK.shape[1], device=world.device).requires_grad_()
    pull_RD = torch.randn_like(x_RD)

    @torch.enable_grad()
    def call(number: int) -> object:
        y_RD = expert_mlp(x_RD, order, weights_RK, *arena.rows, slots_E=found.slots_E, gradients=lambda up, down: None)
        return torch.autograd.grad(y_RD, (x_RD, weights_RK), pull_RD)

    return call


def _of_all_ranks(part: Tensor, ranks: int) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(ranks)]
    dist.all_gather(parts, part.contiguous())
    return parts


def _weights(arena: ExpertArena, gradients: tuple[Tensor, ...], number: int) -> object:
    """Copies here, and gradients of copies to their owners."""
    arena.outdated()
    return _returned(arena.materialised(0), gradients)


def _returned(found: LayerExperts, gradients: tuple[Tensor, ...]) -> list[tuple[int, Parts]]:
    """Collective."""
    return found.movement.reduce(gradients, {expert: place for place, expert in enumerate(found.slots)}).finish()


def _sums(arena: ExpertArena, found: LayerExperts, gradients: tuple[Tensor, ...]) -> Call:
    """Of own gradients, and of those of copies elsewhere."""
    totals = arena.shape.matrices(max(found.owned, 1), torch.float32, arena.world.device)
    for total in totals:
        total.zero_()
    arrived = _returned(found, gradients)
    arriving = [slice(place := found.slots[expert] - found.first_own, place + len(parts[0])) for expert, parts in arrived]

    def call(number: int) -> None:
        for total, part in zip(totals, gradients, strict=True):
            accumulate(total[: found.owned], part[: found.owned])
            for places in arriving:
                accumulate(total[places], part[places])

    return call


def compared(name: str, layer: Timing, parts: Mapping[str, Timing], before: Predicted, behind: Predicted) -> str:
    """A line for people. Costs are measured twice, because others may disturb a machine: where the two differ much, neither
    says anything."""
    found_ms = layer.median_ms
    totals = [1e3 * one.parts.total_s for one in (before, behind)]
    errors = " and ".join(f"{total_ms:.3g} ({total_ms / found_ms - 1:+.0%})" for total_ms in totals)
    each = ", ".join(
        f"{field.name.removesuffix('_s')} {parts[field.name].median_ms:.3g} ({1e3 * vars(before.parts)[field.name]:.3g})"
        for field in fields(LayerTime)
    )
    links_s = before.parts.tokens_s - before.rows_s - before.beside_s
    ways = f"links {1e3 * links_s:.3g}, rows {1e3 * before.rows_s:.3g}, beside them {1e3 * before.beside_s:.3g}"
    left_ms = found_ms - sum(part.median_ms for part in parts.values())
    return (
        f"{name}: {found_ms:.3g} ms forward+backward, predicted {errors}; its parts alone (predicted): {each}, of the tokens' "
        f"({ways}); left {left_ms:.3g}"
    )
