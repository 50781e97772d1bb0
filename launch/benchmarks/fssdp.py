"""One MoE layer over several ranks: experts copied to where the tokens are, against plain expert parallelism.

    ep          every entry travels to its expert's owner: an all-to-all of K rows per token, with plain torch's experts
    no_copies   our exchange, one row per token and rank, with our experts, on their owners only
    local       all experts on every rank and no communication: a lower bound for any exchange with our experts
    waits       as ours, but tokens are sent only when the copies have arrived
    ours        with copies placed for this very load, fetched, and their gradients returned, in every call

No attention surrounds the layer, so only the dispatch of tokens hides the transfer of copies. Each rank is timed by itself; the
slowest rank's median counts.
Letters: T tokens of a rank, K top-k, N = T * K, D model, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from kernels.accumulate import Sum, accumulate
from kernels.errors import UserError
from kernels.router import Routing as Routed
from launch.benchmarks.contest import DIRECTIONS, OURS, Case, Difference, Direction, Inputs, Row, Side, Work
from launch.benchmarks.experts import draw_inputs, draw_matrices, expert_amount, zipf_ranks
from launch.benchmarks.layer_parts import Predicted, compared, measured_parts, predicted
from launch.benchmarks.options import OneOrMore, Shape, TokenOptions
from launch.benchmarks.peers import torch_experts
from launch.benchmarks.ranks import on_ranks, slowest
from launch.benchmarks.timing import Call, Ceilings, Timing
from parallel.expert_arena import AddGradients, ExpertArena, ExpertShape, SumsOfRows
from parallel.flows import Plan, shares
from parallel.layer_cost import LayerCosts, Setting
from parallel.moe_layer import LocalExperts, ShardedExperts
from parallel.placement import Budget, Ints, Topology, TransportKind, even_owners, without_copies
from parallel.policies import POLICIES, of_one_layer
from parallel.profiling import measure_costs
from parallel.sparse_collectives import Parts
from parallel.topology import World
from parallel.transport import transport_kind
from parallel.two_level_exchange import check_two_levels, rows_across

Routing = Literal["even", "zipf", "hot"]
PEERS: Mapping[str, None] = dict.fromkeys(("ep", "no_copies", "local", "waits"))  # the ranks make them, in their process group
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {"model": "qwen3_30b_a3b", "tokens": "16384", "routing": "even,zipf,hot", "memory": 32},
    "cpu": {"model": "tiny", "tokens": "256", "routing": "even,zipf,hot", "memory": 4},
}


class FssdpOptions(TokenOptions):
    hidden: PositiveInt | None = None
    expert_hidden: PositiveInt | None = None
    experts: PositiveInt | None = None
    top_k: PositiveInt | None = None
    routing: OneOrMore[Routing] = Field(description="hot: Zipf's law, the hottest experts on the first rank")
    ranks: PositiveInt = Field(2, description="one on each GPU, or processes on a CPU; tokens are those of each")
    nodes: PositiveInt = Field(1, description="that the ranks act as if they were spread over")
    policy: Literal["cost", "hecate", "eplb", "laer", "faster_moe", "llep"] = Field(
        "cost", description="who gets copies in our layer; hecate takes as many of the hottest experts as fit"
    )
    memory: NonNegativeInt = Field(description="copies that a rank has room for")
    transport: Literal["auto", "messages", "two_level", "peer_memory"] = Field(
        "auto", description="of our layer: messages, by node or by rank, or memory that all ranks read; auto: as in training"
    )


@dataclass(frozen=True)
class Told:
    """One case, as the ranks are told of it."""

    model: str
    shape: Shape
    tokens: int
    routing: Routing

    @property
    def work(self) -> str:
        return f"MoE layer of {self.model}, {self.tokens:,} tokens a rank, {self.routing} routing"


@dataclass(frozen=True)
class Measured:
    times: dict[str, dict[Direction, Timing]]  # of each competitor
    errors: dict[str, dict[str, float]]
    parts: dict[str, dict[str, Timing]]  # of a plan's layer, forward and backward, each alone
    predicted: dict[str, tuple[Predicted, Predicted]]  # with the costs before and after the timings
    costs: tuple[LayerCosts, LayerCosts]
    across_bytes: tuple[int, int]  # tokens between nodes on one way, experts on their owners: a row a rank, and a row a node


def measure(options: FssdpOptions, contenders: Mapping[str, None], device: torch.device, ceilings: Ceilings) -> Iterator[Case]:
    """One case for every model, number of tokens and routing."""
    cases = [
        Told(name, shape, tokens, routing)
        for name, shape in options.shapes().items()
        for tokens in options.tokens
        for routing in options.routing
    ]
    for told in cases:
        if told.shape.experts % options.ranks:
            raise UserError(f"{told.shape.experts} experts do not divide evenly over ranks = {options.ranks}")
    if options.ranks % options.nodes:
        raise UserError(f"ranks = {options.ranks} do not spread evenly over nodes = {options.nodes}")
    if options.transport == "two_level":
        check_two_levels(Topology(options.ranks, options.ranks // options.nodes))
    for told, measured in zip(cases, on_ranks(_measure_all, options.ranks, options, cases, device.type), strict=True):
        yield _case(told, measured, options, ceilings)


def _case(told: Told, measured: Measured, options: FssdpOptions, ceilings: Ceilings) -> Case:
    amount = expert_amount(told.shape, told.tokens)
    sides = {
        direction: {
            name: Side(times[direction], amount.rate(direction, times[direction].median_ms), None, measured.errors[name])
            for name, times in measured.times.items()
        }
        for direction in DIRECTIONS
    }
    rows = []
    for direction, by_name in sides.items():
        best = by_name.pop(OURS)
        fraction = best.rate / amount.ceiling(ceilings)
        for name, side in by_name.items():
            rows.append(Row(told.work, direction, name, side, best, side.time.median_ms / best.time.median_ms, fraction))
    sizes = {"model": told.model, **vars(told.shape), "tokens": told.tokens, "routing": told.routing, "ranks": options.ranks}
    notes = [
        compared(name, measured.times[name]["forward+backward"], measured.parts[name], *both)
        for name, both in measured.predicted.items()
    ]
    notes += [f"measured {when}: {_in_words(costs)}" for when, costs in zip(("before", "after"), measured.costs, strict=True)]
    if measured.across_bytes[0]:
        by_rank, by_node = (count / 2**20 for count in measured.across_bytes)
        notes.append(
            f"tokens between {options.nodes} nodes, one way, experts on their owners: {by_rank:.3g} MiB with a row for each "
            f"rank, {by_node:.3g} MiB with a row for each node (transport=two_level), {1 - by_node / by_rank:.0%} less"
        )
    return Case(f"{told.work}, {options.ranks} ranks", sizes, amount.unit, amount.count, 1, rows, {}, notes)


def _in_words(costs: LayerCosts) -> str:
    return (
        f"an entry {1e9 * costs.entry_s:.3g} ns, an expert {1e6 * costs.expert_s:.3g} us and its sum "
        f"{1e6 * costs.sum_s:.3g}, a row {1e9 * costs.row_s:.3g} ns, exchanges {1e6 * costs.exchange_s:.3g} us, "
        f"order alone {1e6 * costs.order_s:.3g}, the link "
        f"{1e6 * costs.within.latency_s:.3g} us + {1e-9 / costs.within.byte_s:.3g} GB/s"
    )


# ---------------------------------------------------------------- on a rank


def _measure_all(world: World, options: FssdpOptions, cases: list[Told]) -> list[Measured]:
    world = replace(world, ranks_per_node=options.ranks // options.nodes)
    return [_measured(told, options, world) for told in cases]


def _measured(told: Told, options: FssdpOptions, world: World) -> Measured:
    matrices = draw_matrices(told.shape, torch.Generator(world.device).manual_seed(options.seed))  # the same on all ranks
    inputs = _inputs(told, options, world, matrices)
    loads_E = world.sum(_count(inputs.tensors["experts_TK"], told.shape.experts)).double().cpu().numpy()
    owner_E = even_owners(told.shape.experts, world.size)
    parts = tuple(tensor.detach() for tensor in matrices.values())
    bare = Plan(without_copies(owner_E, world.size))
    kind = transport_kind(options.transport, world)
    unused = arena_of(told.shape, world, parts, 0, lambda row, gradients: None, kind)
    costs_of = partial(measure_costs, unused, told.tokens, told.shape.top_k, planning=lambda costs: None)
    budget, costs = Budget(told.shape.experts, options.memory), costs_of()
    setting = Setting(world.topology, told.shape.top_k, budget, False, costs, kind)
    plan = of_one_layer(POLICIES[options.policy], loads_E, owner_E, setting)
    plans = {OURS: plan, "no_copies": bare}
    arenas = {name: _placed(told.shape, world, parts, one, kind) for name, one in plans.items()}
    works: dict[str, Work] = {
        OURS: _sharded(arenas[OURS]),
        "ep": partial(_expert_parallel, own=_Matrices(tuple(_own(part, world) for part in parts)), world=world),
        "no_copies": _sharded(arenas["no_copies"]),
        "local": partial(_local, own=_Matrices(parts)),
        "waits": _sharded(arenas[OURS], waits=True),
    }
    errors = _errors(works, inputs, world)
    times: dict[str, dict[Direction, Timing]] = {name: {} for name in works}
    for direction in DIRECTIONS:
        calls: dict[str, Call] = {name: partial(_call, work, inputs, direction) for name, work in works.items()}
        for name, timing in slowest(calls, world, options.repeats).items():
            times[name][direction] = timing
    alone = {name: measured_parts(arena, inputs, options.repeats) for name, arena in arenas.items()}
    again = replace(setting, costs=costs_of())
    both = {name: (predicted(one, loads_E, setting), predicted(one, loads_E, again)) for name, one in plans.items()}
    return Measured(times, errors, alone, both, (costs, again.costs), _across_bytes(inputs, owner_E, world))


def _inputs(told: Told, options: FssdpOptions, world: World, matrices: Mapping[str, Tensor]) -> Inputs:
    """Tokens of this rank. The popularity of experts is the same on all ranks."""
    generator = torch.Generator(world.device).manual_seed(options.seed + 1 + world.rank)
    inputs = draw_inputs(told.shape, told.tokens, "even", generator, matrices)
    tensors = {name: inputs.tensors[name] for name in ("x_TD", "experts_TK", "weights_TK")}
    if told.routing != "even":
        experts_TK = zipf_ranks(told.shape, told.tokens, generator)
        if told.routing == "zipf":
            alike = torch.Generator(world.device).manual_seed(options.seed)
            experts_TK = torch.randperm(told.shape.experts, generator=alike, device=world.device)[experts_TK]
        tensors["experts_TK"] = experts_TK
    return Inputs(tensors, inputs.pull)


def _across_bytes(inputs: Inputs, owner_E: Ints, world: World) -> tuple[int, int]:
    rank_TK = torch.from_numpy(owner_E).to(world.device)[inputs.tensors["experts_TK"]]
    rows = torch.tensor(rows_across(rank_TK, world.rank, world.topology), device=world.device)
    x_TD = inputs.tensors["x_TD"]
    by_rank, by_node = (world.sum(rows) * x_TD.shape[1] * x_TD.element_size()).tolist()
    return by_rank, by_node


def _call(work: Work, inputs: Inputs, direction: Direction, number: int) -> object:
    output = inputs.forward(work)
    return inputs.backward(output) if direction == "forward+backward" else output


def _errors(works: Mapping[str, Work], inputs: Inputs, world: World) -> dict[str, dict[str, float]]:
    """The difference from all experts in one place, of the output and the gradients of tokens and weights; the worst rank's."""
    results: dict[str, dict[str, Tensor]] = {}
    for name, work in works.items():
        output = inputs.forward(work)
        results[name] = {"output": output.detach(), **inputs.backward(output)}
    found: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        found[name] = {}
        for key, tensor in result.items():
            difference = Difference()
            difference.add(tensor, results["local"][key])
            worst = torch.tensor(difference.relative, dtype=torch.float64, device=world.device)
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            found[name][key] = worst.item()
    return found


# ---------------------------------------------------------------- competitors


class _Matrices:
    """Of a competitor, and its gradients, which add up in float32 as ours do."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.sums = tuple(torch.zeros_like(part, dtype=torch.float32) for part in parts)

    def beside(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """The tokens and the matrices; what backward brings for the matrices is added here."""
        found: tuple[Tensor, ...] = _AddHere.apply(x_TD, self)
        return found


class _AddHere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, matrices: _Matrices) -> tuple[Tensor, ...]:
        ctx.sums = matrices.sums
        return x_TD.view_as(x_TD), *(part.view_as(part) for part in matrices.parts)

    @staticmethod
    def backward(ctx: Any, d_x_TD: Tensor, *gradients: Tensor) -> tuple[Tensor, None]:
        for total, gradient in zip(ctx.sums, gradients, strict=True):
            accumulate(total, gradient)
        return d_x_TD, None


def _placed(shape: Shape, world: World, parts: Parts, plan: Plan, kind: TransportKind) -> ExpertArena:
    """With a plan's experts; gradients are added in float32 at the owners."""
    sums = _expert_shape(shape).matrices(shape.experts // world.size, torch.float32, world.device)

    def add(row: int, gradients: Parts) -> None:
        for total, gradient in zip(sums, gradients, strict=True):
            accumulate(total[row : row + gradient.shape[0]], gradient)

    def sums_of(row: int, count: int) -> tuple[Sum, Sum]:
        gate_up, down = (Sum(total[row : row + count], fresh=False) for total in sums)
        return gate_up, down

    arena = arena_of(shape, world, parts, int(plan.placement.extra_D.max()), add, kind, sums_of)
    arena.place([plan.placement], [shares(plan, world.topology, world.rank)], [plan.stays])
    arena.attention = None
    return arena


def _sharded(arena: ExpertArena, *, waits: bool = False) -> Work:
    """Our layer. Copies are fetched in every call; it may wait for them before its tokens are sent."""
    layer = ShardedExperts(0, arena)

    def work(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        arena.outdated()
        layer.prepare()
        if waits:
            arena.materialised(0)
        return layer(FinishBackward.apply(x_TD, arena), routed(experts_TK, weights_TK, arena.shape.experts))

    return work


def _expert_shape(shape: Shape) -> ExpertShape:
    return ExpertShape(1, shape.experts, shape.hidden, shape.expert_hidden)


def arena_of(
    shape: Shape,
    world: World,
    parts: Parts,
    copies: int,
    add: AddGradients,
    kind: TransportKind,
    sums: SumsOfRows | None = None,
) -> ExpertArena:
    owned = shape.experts // world.size
    arena = ExpertArena(_expert_shape(shape), owned, copies, world, parts[0].dtype, add, kind, sums=sums)
    for rows, part in zip(arena.rows, parts, strict=True):
        rows[:owned].copy_(_own(part, world))
    return arena


class FinishBackward(torch.autograd.Function):
    """Before a layer: backward comes here last and waits until the gradients of copies are home."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, arena: ExpertArena) -> Tensor:
        ctx.arena = arena
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, d_x_TD: Tensor) -> tuple[Tensor, None]:
        with ctx.arena.backward_pass():
            return d_x_TD, None


def _expert_parallel(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *, own: _Matrices, world: World) -> Tensor:
    """The usual way: entries sorted by expert, each sent to its expert's owner, results sent back and weighted here."""
    x_TD, *parts = own.beside(x_TD)
    top_k, owned = experts_TK.shape[1], parts[0].shape[0]
    entry_N = experts_TK.flatten().argsort(stable=True)
    counts_WE = _count(experts_TK, owned * world.size).view(world.size, owned)
    received_WE = torch.empty_like(counts_WE)
    dist.all_to_all_single(received_WE, counts_WE)
    send, receive = torch.stack([counts_WE.sum(dim=1), received_WE.sum(dim=1)]).tolist()
    x_ND = x_TD.repeat_interleave(top_k, dim=0)[entry_N]
    x_RD = _AllToAll.apply(x_ND, send, receive)
    here_R = torch.arange(owned, device=x_TD.device).repeat(world.size).repeat_interleave(received_WE.flatten())
    y_RD = torch_experts(x_RD, here_R.unsqueeze(1), torch.ones_like(here_R, dtype=torch.float32).unsqueeze(1), *parts)
    y_ND = _AllToAll.apply(y_RD, receive, send)
    place_N = torch.empty_like(entry_N).scatter_(0, entry_N, torch.arange(len(entry_N), device=x_TD.device))
    y_TKD = y_ND[place_N].view(*experts_TK.shape, -1)
    return (y_TKD * weights_TK.to(y_TKD.dtype)[..., None]).sum(dim=1)


def _own(part: Tensor, world: World) -> Tensor:
    share = part.shape[0] // world.size
    return part[world.rank * share : (world.rank + 1) * share].clone()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send_W: list[int], receive_W: list[int]) -> Tensor:
        ctx.send_W, ctx.receive_W = send_W, receive_W
        received = rows.new_empty(sum(receive_W), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), receive_W, send_W)
        return received

    @staticmethod
    def backward(ctx: Any, d_received: Tensor) -> tuple[Tensor, None, None]:
        d_rows = d_received.new_empty(sum(ctx.send_W), d_received.shape[1])
        dist.all_to_all_single(d_rows, d_received.contiguous(), ctx.send_W, ctx.receive_W)
        return d_rows, None, None


def _local(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *, own: _Matrices) -> Tensor:
    x_TD, *parts = own.beside(x_TD)
    return LocalExperts(*parts)(x_TD, routed(experts_TK, weights_TK, parts[0].shape[0]))


def routed(experts_TK: Tensor, weights_TK: Tensor, experts: int) -> Routed:
    return Routed(experts_TK, weights_TK, _count(experts_TK, experts))


def _count(experts_TK: Tensor, experts: int) -> Tensor:
    return torch.zeros(experts, dtype=torch.int64, device=experts_TK.device).scatter_add_(
        0, experts_TK.flatten(), torch.ones_like(experts_TK).flatten()
    )
