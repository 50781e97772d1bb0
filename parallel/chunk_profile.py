"""What the parts of an MoE layer whose tokens travel as messages take on these ranks: lines through a few measured times.

Source: FSMoE, arXiv 2501.10714, section 4.1.

Collective: every rank gets the same numbers, the slowest rank's, and so plans alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from kernels.expert_passes import ArenaExperts, BackwardPass, ForwardPass
from parallel.expert_arena import ExpertArena
from parallel.peer_exchange import PeerTokens
from parallel.profiling import timed
from parallel.schedule.cost import Fit, Line, fit
from parallel.schedule.execution import ExecutionCosts
from parallel.schedule.pipeline import WHOLE
from parallel.token_exchange import Leg, exchange

PARTS = (16, 8, 4, 2, 1)  # of a micro-batch, that are timed
REPEATS = 5
BUDGET_S = 15.0
MIB, ENTRIES, TOKENS = ("MiB", 2**20), ("1,000 entries", 1000), ("1,000 tokens", 1000)
LINES = {  # the unit in which each is told
    "exchange": MIB, "copy": MIB, "forward": ENTRIES, "backward": ENTRIES, "weights": ENTRIES, "attention": TOKENS,
    "inside": MIB, "relay": MIB,
}  # fmt: skip
UNUSED = Fit(Line(0.0, 0.0), 1.0)
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
    inside: Fit  # this and the next only where tokens travel over two levels, else nothing
    relay: Fit
    announce_s: float
    tokens: int  # of a rank, at most

    @staticmethod
    def from_json(kept: dict[str, Any]) -> Profile:
        """Of what `asdict` gave."""

        def line(part: str) -> Fit:
            return Fit(Line(**kept[part]["line"]), kept[part]["r_squared"])

        lines = {name: line(name) for name in LINES}
        return Profile(**lines, announce_s=kept["announce_s"], tokens=kept["tokens"])

    @property
    def costs(self) -> ExecutionCosts:
        lines: dict[str, Line] = {name: fitted.line for name, fitted in self._fits()}
        return ExecutionCosts(**lines, announce_s=self.announce_s)

    def _fits(self) -> list[tuple[str, Fit]]:
        return [(name, getattr(self, name)) for name in LINES]

    def __str__(self) -> str:
        shown = [(name, fitted, *LINES[name]) for name, fitted in self._fits() if fitted != UNUSED]
        return "; ".join(f"{name} {_told(one, amount)} a {unit} (r^2 {one.r_squared:.4f})" for name, one, unit, amount in shown)


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
    row_bytes, inside_bytes, entries, many, *rows = times.t().tolist()
    exchange_s, copies_s, forward_s, backward_s, weights_s, attention_s, announce_s, *within = rows
    inside, relay = UNUSED, UNUSED
    if within:
        inside, relay = fit(inside_bytes, within[0]), fit(inside_bytes, [both / 2 for both in within[1]])
    profile = Profile(
        exchange=fit(row_bytes, exchange_s),
        copy=fit(row_bytes, [both / 2 for both in copies_s]),
        forward=fit(entries, forward_s),
        backward=fit(entries, backward_s),
        weights=fit(entries, weights_s),
        attention=fit(many, attention_s),
        inside=inside,
        relay=relay,
        announce_s=announce_s[-1],
        tokens=tokens,
    )
    log.info("a layer's parts, measured in %.1f s: %s", time.perf_counter() - started, profile)
    return profile


@dataclass(frozen=True)
class _Times:
    amounts: tuple[float, ...]  # bytes sent or received on the first leg, and on the second; entries, tokens
    seconds: tuple[float, ...]  # exchange, copies, forward, backward, weights, attention, announce; inside, relays


class LayerParts:
    """What a layer of so many tokens a rank with random choices does, part by part, each as often as one likes. Collective."""

    def __init__(self, arena: ExpertArena, tokens: int, top_k: int) -> None:
        levels, world, shape, found = arena.transport.tokens, arena.world, arena.shape, arena.layers[0]
        assert not isinstance(levels, PeerTokens), "nothing travels"
        generator = torch.Generator(world.device).manual_seed(world.rank)
        self._x_TD = torch.randn(tokens, shape.hidden, device=world.device, generator=generator).to(arena.dtype)
        chosen_TE = torch.rand(tokens, shape.experts, device=world.device, generator=generator)
        experts_TK = chosen_TE.topk(top_k, dim=1).indices
        weights_TK = torch.full((tokens, top_k), 1 / top_k, device=world.device)
        rank_TK = torch.from_numpy(found.placement.owner_E).to(world.device)[experts_TK].int()
        here = found.index_E, found.slots_E.shape[0]
        self._announce = partial(exchange, levels, weights_TK, experts_TK, rank_TK, *here, WHOLE)
        self._sent = self._announce()
        self._way = way = self._sent.forward
        self.entries = self._sent.order.entry_N.shape[0]
        row_bytes = shape.hidden * arena.dtype.itemsize
        self.bytes = [row_bytes * _others(leg, world.rank) for leg in way.legs]  # sent to others or received, of each leg
        gate_up_SCD, down_SDF = arena.rows
        self._experts = ArenaExperts(gate_up_SCD, down_SDF, found.slots_E)
        self._rows_SD = way.legs[0].pack(self._x_TD, 0)
        # What sets out on the last leg, which may be the first.
        self._last_RD = way.legs[0].send(self._rows_SD, 0).wait() if len(way.legs) > 1 else self._x_TD
        self._last_SD = way.legs[-1].pack(self._last_RD, 0)
        self._rows_RD = way.there(self._x_TD)
        self._place_RK, self._weights_RK = self._sent.places(way), self._sent.weights_RK[way.row_R]
        self._ahead = self.forward()
        self._behind = self.backward()

    def announce(self) -> object:
        return self._announce()

    def send(self) -> object:
        return self._way.legs[0].send(self._rows_SD, 0).wait()

    def copies(self) -> object:
        return self._way.legs[0].collect(self._way.legs[0].pack(self._x_TD, 0), 0)

    def send_inside(self) -> object:
        return self._way.legs[-1].send(self._last_SD, 0).wait()

    def send_all(self) -> object:
        """Over all legs at once, as different chunks do."""
        messages = [self._way.legs[0].send(self._rows_SD, 0)]
        if len(self._way.legs) > 1:
            messages.append(self._way.legs[-1].send(self._last_SD, 0))
        return [message.wait() for message in messages]

    def relays(self) -> object:
        return self._way.legs[-1].collect(self._way.legs[-1].pack(self._last_RD, 0), 0)

    def forward(self) -> ForwardPass:
        ahead = ForwardPass(self.entries, self._experts, self._x_TD)
        ahead.rows(self._rows_RD, self._place_RK, self._weights_RK, self._sent.order)
        return ahead

    def backward(self) -> BackwardPass:
        behind = BackwardPass(self._sent.order, self._ahead.h, self._sent.weights_RK, self._experts, self._x_TD)
        behind.rows(self._rows_RD, self._place_RK, self._sent.order)
        return behind

    def weights(self) -> object:
        return self._behind.weights(self._rows_RD, self._place_RK)


def _measure_size(arena: ExpertArena, tokens: int, top_k: int, attend: Attend, repeats: int) -> _Times:
    parts = LayerParts(arena, tokens, top_k)
    calls: list[Callable[[], object]] = [parts.send, parts.copies, parts.forward, parts.backward, parts.weights]
    calls += [lambda: attend(tokens), parts.announce]
    if len(parts.bytes) > 1:
        calls += [parts.send_inside, parts.relays]
    seconds = tuple(_typical(call, arena.world.device, repeats) for call in calls)
    return _Times((parts.bytes[0], parts.bytes[-1], parts.entries, tokens), seconds)


def _others(leg: Leg, rank: int) -> int:
    """Rows that a rank sends to other members of a level, or takes from them, whichever are more."""
    own = rank // leg.level.each % leg.level.size
    splits = leg.splits[0]
    return max(sum(rows) - rows[own] for rows in (splits.send_W, splits.receive_W))


def _typical(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median, as what is predicted is. Ranks begin together and call as often, so messages match.

    The first call does not count: on a GPU it may compile a kernel for this size, which takes a thousand times as long.
    """
    call()
    found = []
    for _ in range(repeats):
        dist.barrier()
        found.append(timed(call, device))
    return median(found)
