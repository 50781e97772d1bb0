"""What the parts of an MoE layer take on these ranks: lines through a few measured times.

Source: FSMoE, arXiv 2501.10714, section 4.1.

Collective: every rank gets the same numbers, the slowest rank's, and so plans alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from kernels.expert_passes import ArenaExperts, BackwardPass, ForwardPass
from parallel.expert_arena import ExpertArena
from parallel.profiling import timed
from parallel.schedule.cost import Fit, Line, fit
from parallel.schedule.execution import ExecutionCosts
from parallel.schedule.pipeline import WHOLE
from parallel.token_exchange import Exchange, exchange
from parallel.topology import World

PARTS = (16, 8, 4, 2, 1)  # of a micro-batch, that are timed
REPEATS = 5
BUDGET_S = 15.0
log = logging.getLogger("tessera")
Attend = Callable[[int], object]  # computes, forward, what lies before a layer for so many tokens


@dataclass(frozen=True)
class Profile:
    """Lines and how well they fit: the share of the variance of the times that each explains."""

    exchange: Fit
    copy: Fit
    forward: Fit
    backward: Fit
    weights: Fit
    attention: Fit
    announce_s: float
    tokens: int  # of a rank, at most

    @staticmethod
    def from_json(kept: dict[str, Any]) -> Profile:
        """Of what `asdict` gave."""

        def line(part: str) -> Fit:
            return Fit(Line(**kept[part]["line"]), kept[part]["r_squared"])

        computed = (line("forward"), line("backward"), line("weights"), line("attention"))
        return Profile(line("exchange"), line("copy"), *computed, kept["announce_s"], kept["tokens"])

    @property
    def costs(self) -> ExecutionCosts:
        return ExecutionCosts(
            exchange=self.exchange.line,
            copy=self.copy.line,
            forward=self.forward.line,
            backward=self.backward.line,
            weights=self.weights.line,
            attention=self.attention.line,
            announce_s=self.announce_s,
        )

    def __str__(self) -> str:
        lines = (
            ("exchange", self.exchange, "MiB", 2**20),
            ("copy", self.copy, "MiB", 2**20),
            ("forward", self.forward, "1,000 entries", 1000),
            ("backward", self.backward, "1,000 entries", 1000),
            ("weights", self.weights, "1,000 entries", 1000),
            ("attention", self.attention, "1,000 tokens", 1000),
        )
        return "; ".join(f"{name} {_told(one, amount)} a {unit} (r^2 {one.r_squared:.4f})" for name, one, unit, amount in lines)


def _told(one: Fit, amount: float) -> str:
    return f"{1e3 * one.line.alpha_s:.3g} ms + {1e3 * amount * one.line.beta_s:.3g} ms"


@torch.no_grad()
def measure(arena: ExpertArena, tokens: int, top_k: int, attend: Attend) -> Profile:
    """Of micro-batches of up to `tokens` tokens a rank, with random choices. Takes at most about 20 s."""
    started = time.perf_counter()
    sizes = sorted({-(-tokens // part) for part in PARTS if tokens >= part})
    sizes = sizes if len(sizes) > 1 else [max(tokens, 1), 2 * max(tokens, 1)]
    once = sum(_measure_size(arena, sizes[-1], top_k, attend, repeats=1).seconds)
    slowest = torch.tensor(once, dtype=torch.float64, device=arena.world.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    # All ranks repeat as often; the sizes together take about twice what the largest does, and as much to be set up.
    repeats = max(1, min(REPEATS, int(BUDGET_S / (3 * max(slowest.item(), 1e-6)))))
    found = [_measure_size(arena, size, top_k, attend, repeats) for size in sizes]
    times = torch.tensor([[*one.amounts, *one.seconds] for one in found], dtype=torch.float64, device=arena.world.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    row_bytes, entries, many, exchange_s, copies_s, *computed, announce_s = times.t().tolist()
    forward_s, backward_s, weights_s, attention_s = computed
    profile = Profile(
        exchange=fit(row_bytes, exchange_s),
        copy=fit(row_bytes, [both / 2 for both in copies_s]),
        forward=fit(entries, forward_s),
        backward=fit(entries, backward_s),
        weights=fit(entries, weights_s),
        attention=fit(many, attention_s),
        announce_s=announce_s[-1],
        tokens=tokens,
    )
    log.info("a layer's parts, measured in %.1f s: %s", time.perf_counter() - started, profile)
    return profile


@dataclass(frozen=True)
class _Times:
    amounts: tuple[float, float, float]  # bytes sent or received, entries, tokens
    seconds: tuple[float, ...]  # exchange, both copies, forward, backward, weights, attention, announce


def _measure_size(arena: ExpertArena, tokens: int, top_k: int, attend: Attend, repeats: int) -> _Times:
    world, shape, found = arena.world, arena.shape, arena.layers[0]
    generator = torch.Generator(world.device).manual_seed(world.rank)
    x_TD = torch.randn(tokens, shape.hidden, device=world.device, generator=generator).to(arena.dtype)
    chosen_TE = torch.rand(tokens, shape.experts, device=world.device, generator=generator)
    experts_TK = chosen_TE.topk(top_k, dim=1).indices
    weights_TK = torch.full((tokens, top_k), 1 / top_k, device=world.device)
    owner_E = torch.from_numpy(found.placement.owner_E).to(world.device)
    index_E, here = found.index_E, found.slots_E.shape[0]

    def announce() -> Exchange:
        return exchange(world, weights_TK, experts_TK, owner_E[experts_TK].int(), index_E, here, WHOLE)

    sent = announce()
    way, splits = sent.forward, sent.splits
    gate_up_SCD, down_SDF = arena.rows
    experts = ArenaExperts(gate_up_SCD, down_SDF, found.slots_E)
    rows_SD = way.pack(x_TD, 0)
    rows_RD, place_RK, weights_RK = way.send(rows_SD, 0).wait(), sent.places(way), sent.weights_RK[way.row_R]
    entries = sent.order.entry_N.shape[0]

    def forward() -> ForwardPass:
        ahead = ForwardPass(entries, experts, x_TD)
        ahead.rows(rows_RD, place_RK, weights_RK, sent.order)
        return ahead

    ahead = forward()

    def back() -> BackwardPass:
        computing = BackwardPass(sent.order, ahead.h, sent.weights_RK, experts, x_TD)
        computing.rows(rows_RD, place_RK, sent.order)
        return computing

    behind = back()
    calls: list[Callable[[], object]] = [
        lambda: way.send(rows_SD, 0).wait(),
        lambda: way.collect(way.pack(x_TD, 0), 0),
        forward,
        back,
        lambda: behind.weights(rows_RD, place_RK),
        lambda: attend(tokens),
        announce,
    ]
    seconds = tuple(_typical(call, world, repeats) for call in calls)
    others = [max(sum(rows) - rows[world.rank], 0) for rows in (splits.send_W, splits.receive_W)]
    return _Times((max(others) * shape.hidden * arena.dtype.itemsize, entries, tokens), seconds)


def _typical(call: Callable[[], object], world: World, repeats: int) -> float:
    """The median, as what is predicted is. Ranks begin together and call as often, so messages match.

    The first call does not count: on a GPU it may compile a kernel for this size, which takes a thousand times as long.
    """
    call()
    return median(timed(call, world) for _ in range(repeats))
