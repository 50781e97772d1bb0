"""How fast this machine is: products of experts, exchanges of tokens, messages within and between nodes, sums of gradients; and
its free memory. Measured, not guessed.

Every function here is collective and gives every rank the same numbers: the slowest rank's. What is timed is what a step finds:
GPUs begin together when their hosts have started the work, products run until clocks have settled under their load, and a first
call, which may compile a kernel, never counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

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
from parallel.token_exchange import Levels, boundaries, exchange
from parallel.topology import World

FLOAT32 = 4
WARM_UPS, REPEATS = 2, 5
SMALL = 2**14  # bytes of the two transfers that latency and bandwidth come from
LARGE = {"cpu": 2**22, "cuda": 2**26}
HEAD_START_CYCLES = 2 * 10**6  # about a millisecond, in which the host starts what is timed
SETTLED_S = 0.2  # of products, after which a GPU has the clock that it keeps under them
SETTLED_TURNS = 25  # that count then: what an expert costs is a small difference of two of them
MOST_CALLS = 1000
MOST_ENTRIES = 2**14  # in the products that are timed
MOST_TOKENS = 2**14  # in the exchanges that are timed
MOST_EXPERTS = 8  # in the products and sums that are timed
SHARE_FOR_COPIES = 0.5  # of the memory that was never used so far


@torch.no_grad()
def measure_costs(arena: ExpertArena, tokens: int, top_k: int, planning: Callable[[LayerCosts], object]) -> LayerCosts:
    """The costs of a layer for a rank with so many tokens; takes about two seconds.

    `planning` plans a layer as it will be planned, with the costs that it is given.
    """
    world, shape = arena.world, arena.shape
    assert arena.attention is not None, "the attention is timed in the updates before"
    entry_s, expert_s = _product_costs(arena, min(max(tokens * top_k // 4, 64), MOST_ENTRIES))
    within, across = _links(arena)
    expert_parameters = 3 * shape.hidden * shape.expert_hidden
    measured = LayerCosts(
        entry_s=entry_s,
        expert_s=expert_s,
        row_bytes=arena.row_bytes,
        expert_bytes=expert_parameters * arena.dtype.itemsize,
        sum_bytes=expert_parameters * FLOAT32,
        within=within,
        across=across,
        attention_s=arena.attention.take_mean(),
        planning_s=0.0,
        row_s=0.0,
        exchange_s=0.0,
        sum_s=_sum_cost(arena),
    )
    row_s, exchange_s = _exchange_costs(arena, measured, min(max(tokens, 64), MOST_TOKENS), top_k)
    measured = replace(measured, row_s=row_s, exchange_s=exchange_s)
    measured = replace(measured, planning_s=median(_on_host(lambda: planning(measured)) for _ in range(REPEATS)))
    slowest = torch.tensor(measured.numbers, dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return LayerCosts.from_numbers(slowest.tolist())


def copies_that_fit(arena: ExpertArena, layers: int) -> int:
    """How many copies a layer every rank has room for, if copies of so many layers are kept at once."""
    world = arena.world
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)  # the allocator holds what was ever needed; this is beyond it
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // world.ranks_per_node
    fitting = torch.tensor(int(free * SHARE_FOR_COPIES) // (arena.expert_bytes * layers), device=world.device)
    dist.all_reduce(fitting, dist.ReduceOp.MIN)
    return min(int(fitting), arena.shape.experts)


def _product_costs(arena: ExpertArena, entries: int) -> tuple[float, float]:
    """(seconds of one entry, seconds of an expert beside its entries), forward."""
    device, experts = arena.world.device, min(arena.owned, MOST_EXPERTS)
    slots_E = torch.arange(experts, dtype=torch.int32, device=device)

    def product(count: int, used: int) -> Callable[[], Tensor]:
        x_TD = torch.randn(count, arena.shape.hidden, device=device).to(arena.dtype)
        weights_TK = torch.ones(count, 1, device=device)
        order = expert_order((torch.arange(count, device=device) % used).unsqueeze(1), experts)
        return lambda: expert_mlp(x_TD, order, weights_TK, *arena.rows, slots_E=slots_E, gradients=None)

    products = [product(entries, experts), product(4 * entries, experts), product(entries, 1)]
    few, many, single = _steady_seconds(products, arena.world)
    _, entry_s = line(entries, few, 4 * entries, many)
    together = few - single if experts > 1 else few - entries * entry_s
    return entry_s, max(together, 0.0) / max(experts - 1, 1)


def _exchange_costs(arena: ExpertArena, costs: LayerCosts, tokens: int, top_k: int) -> tuple[float, float]:
    """(seconds of a row on a device, seconds of an exchange beside its rows): what is left of the time of real exchanges, forth
    and back, forward and backward, when the model's time on links has been taken off. Choices are even."""
    topology = arena.world.topology
    plan = Plan(without_copies(np.arange(arena.shape.experts) % topology.devices, topology.devices))
    setting = Setting(topology, top_k, Budget(0, 0), False, costs, arena.two_level)

    def left(tokens: int) -> tuple[float, float]:
        """(rows in one direction, seconds)"""
        loads_E = np.full(arena.shape.experts, tokens * top_k * topology.devices / arena.shape.experts)
        found = flows(plan, topology, loads_E)
        both_s = _seconds(_exchange(arena, plan, tokens, top_k), arena.world)
        return exchanged(found, setting).rows, max(both_s - 4 * exchange_time(found, setting), 0.0)

    exchange_s, row_s = line(*left(tokens // 2), *left(tokens))  # with much fewer a GPU would wait for its host
    return row_s / 4, exchange_s


def _exchange(arena: ExpertArena, plan: Plan, tokens: int, top_k: int) -> Callable[[], object]:
    """Tokens with random choices to the ranks of their experts and back, and their gradients. Collective."""
    world, experts = arena.world, arena.shape.experts
    generator = torch.Generator(world.device).manual_seed(world.rank)
    x_TD = torch.randn(tokens, arena.shape.hidden, device=world.device, generator=generator).to(arena.dtype)
    weights_TK = torch.full((tokens, top_k), 1 / top_k, device=world.device)
    experts_TK = torch.rand(tokens, experts, device=world.device, generator=generator).topk(top_k).indices
    ends_ED, phase_E = (torch.from_numpy(part).to(world.device) for part in boundaries(plan.weights_ED, world.rank))
    here_E = torch.from_numpy(plan.placement.owner_E == world.rank)
    here = torch.where(here_E, here_E.cumsum(0) - 1, -1).int().to(world.device), int(here_E.sum())
    destination = partial(destinations, experts_TK, None, ends_ED, phase_E)
    return exchange_call(arena, x_TD, weights_TK, experts_TK, destination, here)


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
    x_TD, weights_TK = (part.detach().requires_grad_() for part in (x_TD, weights_TK))

    @torch.enable_grad()
    def whole(tokens: PeerTokens) -> object:
        rank_TK = destination()
        received, back = tokens.dispatch(x_TD, weights_TK, experts_TK, rank_TK, *here)
        return torch.autograd.grad(back.collect(received.x_RD), (x_TD, weights_TK), x_TD.detach())

    def as_messages(levels: Levels) -> object:
        rank_TK = destination()
        sent = exchange(levels, weights_TK, experts_TK, rank_TK, *here, WHOLE)
        for way in (sent.forward, sent.backward):
            way.back(way.there(x_TD))
        return sent.collect_weights(sent.pass_weights_on(sent.return_weights(sent.weights_RK[sent.backward.row_R])))

    ends = arena.transport.tokens
    return partial(whole, ends) if isinstance(ends, PeerTokens) else partial(as_messages, ends)


def _sum_cost(arena: ExpertArena) -> float:
    """Seconds in which the gradient of one expert is added in float32; of no expert where this rank has none."""
    experts = min(arena.owned, MOST_EXPERTS)
    totals = arena.shape.matrices(experts, torch.float32, arena.world.device)
    for total in totals:
        total.zero_()

    def add() -> None:
        for total, rows in zip(totals, arena.rows, strict=True):
            accumulate(total, rows[:experts])

    return _seconds(add, arena.world) / max(experts, 1)


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


def _steady_seconds(calls: Sequence[Callable[[], object]], world: World) -> list[float]:
    """Of each of several pieces of work, in turns, all at one clock: that which a GPU keeps once it has worked
    for a while."""
    once = [_seconds(call, world) for call in calls]
    if world.device.type == "cpu":
        return once
    turns = min(int(SETTLED_S / max(sum(once), 1e-6)), MOST_CALLS) + SETTLED_TURNS
    spans = [
        [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls] for _ in range(turns)
    ]
    for turn in spans:
        for call, (start, end) in zip(calls, turn, strict=True):
            start.record()
            call()
            end.record()
    torch.cuda.synchronize()
    counted = spans[-SETTLED_TURNS:]
    return [median(turn[index][0].elapsed_time(turn[index][1]) / 1e3 for turn in counted) for index in range(len(calls))]


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
