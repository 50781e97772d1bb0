"""How fast this machine is: products of experts, exchanges of tokens, messages within and between nodes, sums of gradients; and
its free memory. Measured, not guessed.

Every function here is collective and gives every rank the same numbers: the slowest rank's. The conditions are those of a step.
GPUs begin together when their hosts have started the work. First calls, which may compile a kernel, never count. Products,
exchanges and sums take turns, as in a layer, since a GPU that only multiplies lowers its clock. Rows have as many choices as in
a layer: with one choice each there would be several times as many to read and to write.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.accumulate import accumulate
from kernels.destinations import destinations
from kernels.expert_mlp import expert_mlp
from kernels.expert_order import expert_order
from parallel.expert_arena import ExpertArena
from parallel.flows import Plan, flows
from parallel.layer_cost import LayerCosts, Link, Setting, exchange_time, exchanged
from parallel.peer_exchange import PeerTokens
from parallel.placement import Budget, without_copies
from parallel.schedule.pipeline import WHOLE
from parallel.token_exchange import boundaries, exchange
from parallel.topology import World
from parallel.ways import Levels

FLOAT32 = 4
WARM_UPS, REPEATS = 2, 5
TURNS = {"cpu": 5, "cuda": 25}  # of the parts of a layer
SMALL = 2**14  # bytes of the two transfers that latency and bandwidth come from
LARGE = {"cpu": 2**22, "cuda": 2**26}
HEAD_START_CYCLES = 10**7  # about five milliseconds; the host takes two to start an exchange, forward and backward
MOST_ENTRIES = {"cpu": 2**16, "cuda": 2**17}  # in the products that are timed
MOST_TOKENS = 2**14  # in the exchanges that are timed
MOST_EXPERTS = 8  # in the sums that are timed
SHARE_FOR_COPIES = 0.5  # of the memory that was never used so far


@torch.no_grad()
def measure_costs(arena: ExpertArena, tokens: int, top_k: int, planning: Callable[[LayerCosts], object]) -> LayerCosts:
    """The costs of a layer for a rank with this many tokens; takes about three seconds.

    `planning` plans a layer as it will be planned after its gate, with the costs that it is given.
    """
    world, shape = arena.world, arena.shape
    assert arena.attention is not None, "the attention is timed in the updates before"
    within, across = _links(arena)
    expert_parameters = 3 * shape.hidden * shape.expert_hidden
    measured = LayerCosts(
        entry_s=0.0,
        expert_s=0.0,
        row_bytes=arena.row_bytes,
        expert_bytes=expert_parameters * arena.dtype.itemsize,
        sum_bytes=expert_parameters * FLOAT32,
        within=within,
        across=across,
        attention_s=arena.attention.take_mean(),
        planning_s=0.0,
        row_s=0.0,
        exchange_s=0.0,
        order_s=0.0,
        sum_s=0.0,
    )
    measured = _with_parts(measured, arena, tokens, top_k)
    measured = replace(measured, planning_s=median(_on_host(lambda: planning(measured)) for _ in range(REPEATS)))
    slowest = torch.tensor(measured.numbers, dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return LayerCosts.from_numbers(slowest.tolist())


def copies_that_fit(arena: ExpertArena, layers: int) -> int:
    """How many copies a layer every rank has room for, if copies of this many layers are kept at once."""
    world = arena.world
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)  # the allocator holds what was ever needed; this is beyond it
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // world.ranks_per_node
    fitting = torch.tensor(int(free * SHARE_FOR_COPIES) // (arena.expert_bytes * layers), device=world.device)
    dist.all_reduce(fitting, dist.ReduceOp.MIN)
    return min(int(fitting), arena.shape.experts)


def _with_parts(costs: LayerCosts, arena: ExpertArena, tokens: int, top_k: int) -> LayerCosts:
    """With what products, exchanges and sums take. Choices are even."""
    world, topology, experts = arena.world, arena.world.topology, arena.shape.experts
    entries = min(max(tokens * top_k, 256), MOST_ENTRIES[world.device.type])
    products = [_Products(arena, entries // 4, top_k), _Products(arena, entries, top_k)]
    asked, tokens = tokens, min(max(tokens, 64), MOST_TOKENS)
    owners = Plan(without_copies(np.arange(experts) % topology.devices, topology.devices))
    sizes = tokens // 2, tokens  # with much fewer a GPU would wait for its host
    exchanges = [_exchange(arena, owners, size, top_k) for size in sizes]
    seconds = _in_turns([*products, *exchanges, _sums(arena), _order(arena, tokens, top_k)], world)

    beside_s, entry_s = line(products[0].entries, seconds[0], products[1].entries, seconds[1])
    setting = Setting(topology, top_k, Budget(0, 0), False, costs, arena.kind)

    def left(size: int, both_s: float) -> tuple[float, float]:
        """(rows in one direction, seconds forth and back, forward and backward, that the model's time on links leaves)"""
        found = flows(owners, topology, np.full(experts, size * top_k * topology.devices / experts))
        return float(exchanged(found, setting).rows), max(both_s - 4 * float(exchange_time(found, setting)), 0.0)

    exchange_s, row_s = line(*left(sizes[0], seconds[2]), *left(sizes[1], seconds[3]))
    return replace(
        costs,
        entry_s=entry_s / 3,
        expert_s=beside_s / 3 / products[1].experts,
        row_s=row_s / 4,
        exchange_s=exchange_s,
        order_s=seconds[5] * max(asked / tokens, 1.0),
        sum_s=seconds[4] / min(arena.owned, MOST_EXPERTS),
    )


class _Products:
    """Those of a layer on this rank, forward and backward, for about this many entries, in rows as they come from all ranks."""

    def __init__(self, arena: ExpertArena, entries: int, top_k: int) -> None:
        world, shape = arena.world, arena.shape
        self.experts = min(max(shape.experts // world.size, 1), arena.owned)
        self._arena, choices = arena, min(top_k, self.experts)
        options: Any = {"device": world.device, "generator": torch.Generator(world.device).manual_seed(world.rank)}
        # One choice of a row that comes is here, and any other one if this rank is the one of all that serves it.
        here_R = 1 + (torch.rand(entries, choices - 1, **options) < 1 / world.size).sum(dim=1)
        here_R = here_R[here_R.cumsum(0) <= entries]
        self.entries, rows = int(here_R.sum()), len(here_R)
        slots_RK = torch.rand(rows, self.experts, **options).topk(choices).indices
        slots_RK = slots_RK.masked_fill(torch.arange(choices, device=world.device) >= here_R[:, None], -1)
        self._order = expert_order(slots_RK, self.experts, num_entries=self.entries)
        self._slots_E = torch.arange(self.experts, dtype=torch.int32, device=world.device)
        x_RD, self._pull_RD = (torch.randn(rows, shape.hidden, **options).to(arena.dtype) for _ in range(2))
        self._inputs = x_RD.requires_grad_(), torch.full(slots_RK.shape, 1 / top_k, device=world.device).requires_grad_()

    @torch.enable_grad()
    def __call__(self) -> object:
        (x_RD, weights_RK), rows = self._inputs, self._arena.rows
        y_RD = expert_mlp(x_RD, self._order, weights_RK, *rows, slots_E=self._slots_E, gradients=lambda up, down: None)
        return torch.autograd.grad(y_RD, self._inputs, self._pull_RD)


def _exchange(arena: ExpertArena, plan: Plan, tokens: int, top_k: int) -> Callable[[], object]:
    """Tokens with random choices to the ranks of their experts and back, and their gradients. Collective."""
    world = arena.world
    generator = torch.Generator(world.device).manual_seed(world.rank)
    x_TD = torch.randn(tokens, arena.shape.hidden, device=world.device, generator=generator).to(arena.dtype)
    weights_TK = torch.full((tokens, top_k), 1 / top_k, device=world.device)
    experts_TK = _choices(arena, tokens, top_k)
    ends_ED, phase_E = (torch.from_numpy(part).to(world.device) for part in boundaries(plan.weights_ED, world.rank))
    here_E = torch.from_numpy(plan.placement.owner_E == world.rank)
    here = torch.where(here_E, here_E.cumsum(0) - 1, -1).int().to(world.device), int(here_E.sum())
    destination = partial(destinations, experts_TK, None, ends_ED, phase_E)
    return exchange_call(arena, x_TD, weights_TK, experts_TK, destination, here)


def _choices(arena: ExpertArena, tokens: int, top_k: int) -> Tensor:
    """Random ones, (T, K), others on each rank."""
    world = arena.world
    generator = torch.Generator(world.device).manual_seed(world.rank)
    return torch.rand(tokens, arena.shape.experts, device=world.device, generator=generator).topk(top_k).indices


def _order(arena: ExpertArena, tokens: int, top_k: int) -> Callable[[], object]:
    """What is left of an exchange where all experts are here, and all tokens stay."""
    return partial(expert_order, _choices(arena, tokens, top_k), arena.shape.experts)


def exchange_call(
    arena: ExpertArena,
    x_TD: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    destination: Callable[[], Tensor],
    here: tuple[Tensor, int],
) -> Callable[[], object]:
    """The exchange of a layer alone, forward and backward: results are the tokens that came.

    Args:
        destination: says who serves each choice, (T, K) int32; its time counts.
        here: which of this rank's experts each expert is (int32, -1 of those elsewhere), and how many there are.
    """
    x_TD, weights_TK = (part.detach() for part in (x_TD, weights_TK))

    def whole(tokens: PeerTokens) -> object:
        """What the experts write where all ranks read it is theirs; here it is what lies there."""
        rank_TK = destination()
        _, back = tokens.dispatch(x_TD, weights_TK, experts_TK, rank_TK, *here)
        for way in ("forward", "backward"):
            if way == "backward":
                back.pull(x_TD)
            back.summed(results := back.results())
        return back.picked(results)

    def as_messages(levels: Levels) -> object:
        rank_TK = destination()
        sent = exchange(levels, weights_TK, experts_TK, rank_TK, *here, WHOLE)
        for way in (sent.forward, sent.backward):
            way.back(way.there(x_TD))
        return sent.collect_weights(sent.pass_weights_on(sent.return_weights(sent.weights_RK[sent.backward.row_R])))

    ends = arena.transport.tokens
    return partial(whole, ends) if isinstance(ends, PeerTokens) else partial(as_messages, ends)


def _sums(arena: ExpertArena) -> Callable[[], None]:
    """Adds gradients of some experts in float32."""
    experts = min(arena.owned, MOST_EXPERTS)
    totals = arena.shape.matrices(experts, torch.float32, arena.world.device)
    for total in totals:
        total.zero_()

    def add() -> None:
        for total, rows in zip(totals, arena.rows, strict=True):
            accumulate(total, rows[:experts])

    return add


def _links(arena: ExpertArena) -> tuple[Link, Link]:
    """Between neighbours on a node, and from each rank of a node to the same one of the next; all ranks at once."""
    world = arena.world
    per_node, nodes = world.topology.devices_per_node, world.topology.nodes
    node, local = divmod(world.rank, per_node)
    near = far = None
    if per_node > 1:
        first = node * per_node
        near = _link(arena, first + (local + 1) % per_node, first + (local - 1) % per_node)
    if nodes > 1:
        far = _link(arena, (world.rank + per_node) % world.size, (world.rank - per_node) % world.size)
    found = near or far
    assert found is not None, "a single rank has no links"
    return near or found, far or found


def _link(arena: ExpertArena, target: int, source: int) -> Link:
    def seconds(size: int) -> float:
        return _seconds(arena.transport.probe(size, target, source), arena.world)

    large = LARGE[arena.world.device.type]
    return Link(*line(SMALL, seconds(SMALL), large, seconds(large)))


def line(few: float, few_s: float, many: float, many_s: float) -> tuple[float, float]:
    """(seconds whatever the amount, seconds of one more) of work that was timed for two amounts.

    At least half of the time of the larger amount is taken to be that of the amount itself: a disturbance while the smaller one
    was timed must not make it free.
    """
    each_s = max((many_s - few_s) / (many - few), many_s / many / 2)
    return max(few_s - few * each_s, 0.0), each_s


def _seconds(call: Callable[[], object], world: World) -> float:
    """The median of some calls, as what is predicted is, after two for warming up. Ranks call as often, so messages match."""
    return median([timed(call, world) for _ in range(WARM_UPS + REPEATS)][WARM_UPS:])


def _in_turns(calls: Sequence[Callable[[], object]], world: World) -> list[float]:
    """The medians of several pieces of work, on the rank that takes longest. Collective."""
    turns = TURNS[world.device.type]
    taken = [[timed(call, world) for call in calls] for _ in range(WARM_UPS + turns)][WARM_UPS:]
    seconds = torch.tensor([median(one) for one in zip(*taken, strict=True)], dtype=torch.float64, device=world.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return [float(one) for one in seconds.tolist()]


def timed(call: Callable[[], object], world: World) -> float:
    """Seconds of one call, which all ranks begin at the same time."""
    if world.device.type == "cuda":
        return _on_gpu(call, world)
    world.barrier()
    return _on_host(call)


def _on_host(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _on_gpu(call: Callable[[], object], world: World) -> float:
    """As in training, where the host is ahead: what it takes to start kernels does not count, nor do other ranks' delays."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    meeting = torch.zeros(1, device=world.device)
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    if world.size > 1:
        dist.all_reduce(meeting)  # GPUs wait for each other in it, hosts go on
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
