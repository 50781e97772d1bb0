"""How long the parts of an MoE layer take on these ranks if tokens travel as messages: lines through a few measured times.

Source: FSMoE, arXiv 2501.10714, section 4.1.

A layer is measured as it runs, in sequence: parts that are timed alone find their memory in the caches and take up to a fifth
less. Collective: every rank gets the same numbers, the slowest rank's, and so makes the same plan.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from kernels.expert_passes import ArenaExperts, BackwardPass, ForwardPass
from parallel.chunked_experts import Chunked, Direction, begins, chunked_experts, unmarked
from parallel.cuts import backward_cut, forward_cut, stay_apart
from parallel.expert_arena import ExpertArena
from parallel.peer_exchange import PeerTokens
from parallel.profiling import HEAD_START_CYCLES, timed
from parallel.schedule.cost import Fit, Line, fit
from parallel.schedule.execution import ExecutionCosts, LayerWork, layer_seconds
from parallel.schedule.pipeline import OFF, WHOLE, Degrees
from parallel.stopwatch import Mark, Marks
from parallel.token_exchange import Exchange, exchange
from parallel.topology import World
from parallel.ways import Leg

CHUNKS = (1, 2, 4, 8)  # in which a layer runs to see what it takes beside its parts
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
Attend = Callable[[int, bool], object]  # computes what lies before a layer for this many tokens, forward, or backward as well


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
    attention_back: float  # this and the next ones as of ExecutionCosts
    announce_s: float
    chunk_s: float
    times: tuple[tuple[int, float], ...]
    tokens: int  # of a rank, at most

    @staticmethod
    def from_json(kept: dict[str, Any]) -> Profile:
        """Of what `asdict` gave."""

        def line(part: str) -> Fit:
            return Fit(Line(**{key: float(s) for key, s in kept[part]["line"].items()}), float(kept[part]["r_squared"]))

        lines: dict[str, Any] = {name: line(name) for name in LINES}
        times = tuple((degree, factor) for degree, factor in kept["times"])
        numbers: dict[str, Any] = {name: float(kept[name]) for name in ("attention_back", "announce_s", "chunk_s")}
        return Profile(**lines, **numbers, times=times, tokens=kept["tokens"])

    @property
    def costs(self) -> ExecutionCosts:
        lines: dict[str, Any] = {name: fitted.line for name, fitted in self._fits()}
        numbers: dict[str, Any] = {
            "attention_back": self.attention_back,
            "announce_s": self.announce_s,
            "chunk_s": self.chunk_s,
        }
        return ExecutionCosts(**lines, **numbers, times=self.times)

    def _fits(self) -> list[tuple[str, Fit]]:
        return [(name, getattr(self, name)) for name in LINES]

    def __str__(self) -> str:
        shown = [(name, fitted, *LINES[name]) for name, fitted in self._fits() if fitted != UNUSED]
        lines = [f"{name} {_told(one, amount)} a {unit} (r^2 {one.r_squared:.4f})" for name, one, unit, amount in shown]
        times = [f"{factor:.2f} {f'in {degree}' if degree else 'in sequence'}" for degree, factor in self.times]
        lines += [
            f"attention {self.attention_back:.3g} times as long backward",
            f"a chunk more {1e3 * self.chunk_s:.3g} ms",
            f"times as long in this many chunks: {', '.join(times)}",
        ]
        return "; ".join(lines)


def _told(one: Fit, amount: float) -> str:
    return f"{1e3 * one.line.alpha_s:.3g} ms + {1e3 * amount * one.line.beta_s:.3g} ms"


def measure(arena: ExpertArena, tokens: int, top_k: int, attend: Attend, *, among: int = 1) -> Profile:
    """Of micro-batches of up to `tokens` tokens a rank, with random choices. Takes at most about 20 s, of which it has one part
    `among` that many ways of tokens."""
    started = time.perf_counter()
    sizes = sorted({-(-tokens // part) for part in PARTS if tokens >= part})
    sizes = sizes if len(sizes) > 1 else [max(tokens, 1), 2 * max(tokens, 1)]
    once = _measure_size(arena, sizes[-1], top_k, attend, repeats=1).seconds
    slowest = torch.tensor(once, dtype=torch.float64, device=arena.world.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    # All ranks repeat as often; the sizes together take about twice what the largest does, and as much to be set up; and the
    # largest runs in five ways.
    repeats = max(1, min(REPEATS, int(BUDGET_S / (6 * among * max(slowest.item(), 1e-6)))))
    found = [_measure_size(arena, size, top_k, attend, repeats) for size in sizes]
    profile = _fitted([_slowest(one, arena.world.device) for one in found], tokens)
    profile = _with_chunks(profile, arena, sizes[-1], top_k, repeats)
    log.info("a layer's parts, measured in %.1f s: %s", time.perf_counter() - started, profile)
    return profile


@dataclass(frozen=True)
class _Times:
    """Of a layer of some size in which nothing overlaps: seconds of a pass in the mean, or of what there is once."""

    row_bytes: float  # sent to others or received on the first leg
    inside_bytes: float  # and on the last
    entries: float
    tokens: float
    exchange: float  # waited for; so is what is sent inside
    inside: float
    copy: float
    relay: float
    forward: float
    backward: float
    weights: float
    attention: float
    attention_back: float
    announce: float

    @property
    def seconds(self) -> float:
        """Of both passes, with what comes before them."""
        once = self.forward + self.backward + self.weights + self.attention + self.attention_back + self.announce
        return 2 * (2 * (self.exchange + self.inside + self.copy + self.relay)) + once


WAITS = ("exchange", "inside")


def _slowest(one: _Times, device: torch.device) -> _Times:
    """Of all ranks. Who waits least for a message came last, and saw how long it takes."""
    signs = [-1.0 if part.name in WAITS else 1.0 for part in fields(_Times)]
    times = torch.tensor([sign * number for sign, number in zip(signs, astuple(one), strict=True)], dtype=torch.float64)
    times = times.to(device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return _Times(*(sign * number for sign, number in zip(signs, times.tolist(), strict=True)))


def _fitted(found: Sequence[_Times], tokens: int) -> Profile:
    def line(amount: str, part: str) -> Fit:
        return fit([getattr(one, amount) for one in found], [getattr(one, part) for one in found])

    two = any(one.relay for one in found)
    return Profile(
        exchange=line("row_bytes", "exchange"),
        copy=line("row_bytes", "copy"),
        forward=line("entries", "forward"),
        backward=line("entries", "backward"),
        weights=line("entries", "weights"),
        attention=line("tokens", "attention"),
        inside=line("inside_bytes", "inside") if two else UNUSED,
        relay=line("inside_bytes", "relay") if two else UNUSED,
        attention_back=found[-1].attention_back / found[-1].attention,
        announce_s=found[-1].announce,
        chunk_s=0.0,
        times=(),
        tokens=tokens,
    )


def _with_chunks(profile: Profile, arena: ExpertArena, tokens: int, top_k: int, repeats: int) -> Profile:
    """With what a layer takes beside its parts, in some numbers of chunks and in sequence: at least what a chunk costs, which a
    timeline shows, and the rest."""
    parts = LayerParts(arena, tokens, top_k)
    ways = [OFF, *(Degrees(chunks, chunks) for chunks in CHUNKS if chunks <= tokens)]
    turns = [[timed(partial(parts.in_chunks, way), arena.world) for way in ways] for _ in range(repeats + 1)][1:]
    two_level = len(parts.bytes) > 1
    apart = stay_apart(arena.world.size, two_level=two_level)
    amounts = [parts.bytes[0], parts.entries, parts.bytes[1] if two_level else 0, parts.staying if apart else 0]
    most = torch.tensor([*map(median, zip(*turns, strict=True)), *amounts], dtype=torch.float64, device=arena.world.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    *seconds, row_bytes, entries, inside_bytes, staying = most.tolist()
    work = LayerWork(row_bytes, entries, inside_bytes, staying)
    more = [taken - layer_seconds(profile.costs, work, way) for taken, way in zip(seconds, ways, strict=True)]
    cuts = [(forward_cut(way.forward, apart=apart), backward_cut(way.backward, apart=apart)) for way in ways[1:]]
    chunks = [len(ahead) + len(back) - 2 for ahead, back in cuts]
    if len(chunks) > 1:
        least = min((more[place] - more[1]) / count for place, count in enumerate(chunks, start=1) if count)
        profile = replace(profile, chunk_s=max(least, 0.0))
    times = [taken / layer_seconds(profile.costs, work, way) for taken, way in zip(seconds, ways, strict=True)]
    return replace(profile, times=tuple(zip([0, *(way.forward for way in ways[1:])], times, strict=True)))


def _ready(direction: Direction) -> None:
    """There are no copies to wait for."""


def _gradients(*gradients: torch.Tensor) -> None:
    """Nobody takes them."""


def _no_slice() -> None:
    """Nothing else travels."""


class LayerParts:
    """A layer of this many tokens a rank with random choices, in sequence or part by part, as often as one likes.
    Collective."""

    def __init__(self, arena: ExpertArena, tokens: int, top_k: int) -> None:
        levels, world, shape, found = arena.transport.tokens, arena.world, arena.shape, arena.layers[0]
        assert not isinstance(levels, PeerTokens), "nothing travels"
        generator = torch.Generator(world.device).manual_seed(world.rank)
        self._world = world
        self._x_TD = torch.randn(tokens, shape.hidden, device=world.device, generator=generator).to(arena.dtype)
        chosen_TE = torch.rand(tokens, shape.experts, device=world.device, generator=generator)
        experts_TK = chosen_TE.topk(top_k, dim=1).indices
        self._weights_TK = torch.full((tokens, top_k), 1 / top_k, device=world.device)
        rank_TK = torch.from_numpy(found.placement.owner_E).to(world.device)[experts_TK].int()
        here = found.index_E, found.slots_E.shape[0]
        self._exchange = partial(exchange, levels, self._weights_TK, experts_TK, rank_TK, *here)
        self._sent = self.announce()
        self._way = way = self._sent.forward
        self.entries = self._sent.order.entry_N.shape[0]
        self.staying = int((rank_TK == world.rank).sum())
        self.bytes = [arena.row_bytes * _others(leg) for leg in way.legs]  # sent to others or received, of each leg
        gate_up_SCD, down_SDF = arena.rows
        self._experts = ArenaExperts(gate_up_SCD, down_SDF, found.slots_E)
        self._setting_out = [self._x_TD]  # on each leg
        for leg in way.legs[:-1]:
            self._setting_out.append(leg.send(leg.pack(self._setting_out[-1], 0), 0).wait())
        self._messages = [leg.pack(rows, 0) for leg, rows in zip(way.legs, self._setting_out, strict=True)]
        self._rows_RD = way.there(self._x_TD)
        self._place_RK, self._weights_RK = self._sent.places(way), self._sent.weights_RK[way.row_R]
        self._ahead = self.forward()

    def announce(self) -> Exchange:
        return self._exchange(WHOLE)

    def in_sequence(self, mark: Callable[[str], None]) -> None:
        """Both passes, as ShardedExperts has them, except for what it does with the gradients."""
        self._passes(Chunked(self._sent, self._experts, _ready, _gradients, _no_slice, mark, in_sequence=True))

    def in_chunks(self, degrees: Degrees) -> None:
        """The same, overlapping, with what tells each rank what will come: on a GPU the host waits for it, and has to start
        every chunk after it; and there is more of it with more chunks."""
        sent = self._exchange(degrees)
        self._passes(Chunked(sent, self._experts, _ready, _gradients, _no_slice, unmarked, degrees.in_sequence))

    @torch.enable_grad()
    def _passes(self, run: Chunked) -> None:
        y_TD = chunked_experts(self._x_TD, self._weights_TK.detach().requires_grad_(), run)()
        y_TD.backward(self._x_TD)

    def send(self) -> object:
        """Over all legs at once, as different chunks do."""
        messages = [leg.send(rows_SD, 0) for leg, rows_SD in zip(self._way.legs, self._messages, strict=True)]
        return [message.wait() for message in messages]

    def forward(self) -> ForwardPass:
        ahead = ForwardPass(self.entries, self._experts, self._x_TD)
        ahead.rows(self._rows_RD, self._place_RK, self._weights_RK, self._sent.order)
        return ahead

    def backward(self) -> object:
        behind = BackwardPass(self._sent.order, self._ahead.h, self._sent.weights_RK, self._experts)
        behind.rows(self._rows_RD, self._place_RK, self._sent.order)
        return behind.weights(self._rows_RD, self._place_RK)


def _measure_size(arena: ExpertArena, tokens: int, top_k: int, attend: Attend, repeats: int) -> _Times:
    """The median, as what is predicted is. Ranks begin together and call as often, so messages match.

    The first turn does not count: on a GPU it may compile a kernel for this size, which takes a thousand times as long.
    """
    parts = LayerParts(arena, tokens, top_k)
    turns = [_turn(parts, partial(attend, tokens), arena.world) for _ in range(repeats + 1)][1:]
    typical = {name: median(turn[name] for turn in turns) for name in turns[0]}
    return _Times(row_bytes=parts.bytes[0], inside_bytes=parts.bytes[-1], entries=parts.entries, tokens=tokens, **typical)


def _turn(parts: LayerParts, attend: Callable[[bool], object], world: World) -> dict[str, float]:
    """Seconds of each part of `_Times`."""
    with torch.no_grad():
        once = {"announce": timed(parts.announce, world), "attention": timed(partial(attend, False), world)}
    once["attention_back"] = max(timed(partial(attend, True), world) - once["attention"], 0.0)
    world.barrier()
    marks = Marks(world.device)
    if world.device.type == "cuda":
        torch.cuda._sleep(HEAD_START_CYCLES)  # the host is ahead, as in training
    parts.in_sequence(marks)
    seconds = _by_word(marks.take())

    def mean(*words: str) -> float:
        return sum(seconds[direction, word] for direction in ("forward", "backward") for word in words) / 4

    return {
        "exchange": mean("dispatch", "combine"),
        "inside": mean("gather", "scatter"),
        "copy": mean("pack", "collect"),
        "relay": mean("relay", "sum"),
        "forward": seconds["forward", "experts"],
        "backward": seconds["backward", "experts"],
        "weights": seconds["backward", "weights"],
        **once,
    }


def _by_word(marks: Sequence[Mark]) -> dict[tuple[str, str], float]:
    """By direction and the first word of the name."""
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    direction = ""
    for before, mark in pairwise(marks):
        if before.name in (begins("forward"), begins("backward")):
            direction = before.name.split()[0]
        found[direction, mark.name.split()[0]] += mark.at_s - before.at_s
    return found


def _others(leg: Leg) -> int:
    """Rows that a rank sends to other members of a level, or takes from them, whichever are more."""
    splits = leg.splits[0]
    return max(sum(rows) - rows[leg.level.here] for rows in (splits.send_W, splits.receive_W))
