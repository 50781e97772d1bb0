"""MoE layers on the ranks of this machine, whole and in chunks, and what lies around them: measured beside predicted.

    peer memory    what training takes where ranks read each other's memory: whole, predicted as placements are (layer_cost.py)
    off            one message after the other, each waited for where it sets out: nothing overlaps
    degree r       r chunks forward and backward; at 1 the gradients of weights hide the last way back
    plan           degrees, and bytes of slices, that the measured parts of the layers let expect to be the fastest
    computing      attention and experts alone, forward and backward, on rows that are there already
    communication  what tokens and results, and the average of gradients, take on their ways, and nothing else; over two
                   levels, on the links of the kind that takes longer

Around each MoE layer lies nothing; or attention, with norms and a router; or these and the average of their gradients over
the ranks. That goes behind the backward pass in `off`, as one all-reduce (ZeRO's way), and else in slices under it: what is
planned, or what is complete at each layer.

Nodes of several ranks run it over two levels too. Copies are none; choices are told, so that loads are even, and the router
only weighs them. A rank's time is its own; the slowest rank's median of calls in turns counts. Letters: T tokens of a rank,
K top-k, D model, P places of the backward pass where slices set out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from kernels.router import Routing
from launch.benchmarks.contest import Inputs
from launch.benchmarks.experts import draw_inputs, draw_matrices
from launch.benchmarks.fssdp import arena_of, routed
from launch.benchmarks.options import Shape
from launch.benchmarks.ranks import slowest
from launch.benchmarks.timing import Call
from parallel.chunk_profile import LayerParts, measure
from parallel.expert_arena import ExpertArena, ExpertShape
from parallel.flows import Plan
from parallel.gradient_slices import GradientSlices
from parallel.layer_cost import Setting, layer_time
from parallel.moe_layer import ShardedExperts
from parallel.placement import Budget, TransportKind, even_owners, without_copies
from parallel.profiling import measure_costs
from parallel.schedule.execution import layer_work
from parallel.schedule.generalised import Around
from parallel.schedule.layers import DenseGradients, passes_s, plan_layers, with_slices
from parallel.schedule.pipeline import OFF, WHOLE, Degrees
from parallel.schedule.slices import PLACES_OF_LAYER
from parallel.schedule.transports import Way, choose_transport, degrees_of_all
from parallel.topology import World
from parallel.transport import transport_kind
from parallel.two_level_exchange import has_two_levels

HEAD = 64  # numbers of an attention head
WAYS = 4  # tokens and results, forward and backward
AroundName = Literal["nothing", "attention", "gradients"]


@dataclass(frozen=True)
class Told:
    """What is measured, as the ranks are told of it."""

    shape: Shape
    tokens: int  # of a rank
    length: int  # of a row of them
    layers: int
    degrees: tuple[int, ...]
    around: tuple[AroundName, ...]
    seed: int
    repeats: int | None


@dataclass(frozen=True)
class Found:
    """Milliseconds of all layers, forward and backward, by the name of the schedule; with one thing around them."""

    measured_ms: dict[str, float]
    predicted_ms: dict[str, float]
    alone_ms: dict[str, float]  # computing, and communication of each transport
    ours: str  # the plan of the transport that training would take, or else of messages
    planned: dict[str, str]
    profiles: list[str]
    unshared_ms: float  # of attention under which nothing travels

    @property
    def least_ms(self) -> float:
        """Of the layers, where nothing of them travels under some of what is computed."""
        computing, *communication = self.alone_ms.values()
        return self.unshared_ms + max(computing - self.unshared_ms, min(communication))

    @property
    def bound_ms(self) -> float:
        """Computing alone, or communication alone with the transport that needs least of it."""
        computing, *communication = self.alone_ms.values()
        return max(computing, min(communication))


class Attention(nn.Module):
    """What lies before an MoE layer: causal attention over rows of `length` tokens, norms, and the router's weights."""

    def __init__(self, shape: Shape, length: int) -> None:
        super().__init__()
        self.length = length
        self.norm, self.next_norm = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.ahead = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.behind = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)

    def forward(self, x_TD: Tensor, experts_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(what goes on beside the experts, what goes to them, float32 weights of the choices that are told)."""
        parts = self.ahead(self.norm(x_TD)).view(-1, self.length, 3, x_TD.shape[1] // HEAD, HEAD)
        query, key, value = parts.transpose(1, 3).unbind(2)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_TD = x_TD + self.behind(mixed.transpose(1, 2).reshape(x_TD.shape))
        inside_TD = self.next_norm(x_TD)
        return x_TD, inside_TD, self.router(inside_TD).gather(1, experts_TK).float().softmax(dim=1)


class Dense(nn.Module):
    """The attention of each layer. Parameters stand in the order of the layers, as in a model."""

    def __init__(self, told: Told) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(told.shape, told.length) for _ in range(told.layers))

    def average(self, world: World) -> None:
        """Gradients become those of all ranks in the mean, at once."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        message = torch.cat([gradient.view(-1) for gradient in gradients])
        dist.all_reduce(message)
        message /= world.size
        means = message.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_([gradient.view(-1) for gradient in gradients], list(means))


@dataclass(frozen=True)
class Schedule:
    """How the layers run."""

    degrees_L: list[Degrees]
    bytes_P: tuple[int, ...] | None = None  # of slices; None: gradients are averaged behind the backward pass, if at all


def measure_layers(world: World, told: Told, cases: None) -> dict[AroundName, Found]:
    """On a rank."""
    shape = told.shape
    matrices = draw_matrices(shape, torch.Generator(world.device).manual_seed(told.seed))  # the same on all ranks
    experts = tuple(tensor.detach() for tensor in matrices.values())
    generator = torch.Generator(world.device).manual_seed(told.seed + 1 + world.rank)
    stack = Stack(told, world, experts[0].dtype, draw_inputs(shape, told.tokens, "even", generator, matrices))
    kinds: list[TransportKind] = ["messages", "two_level"] if has_two_levels(world.topology) else ["messages"]
    sides = [Side(stack, kind, experts) for kind in kinds]
    if transport_kind("auto", world) == "peer_memory":
        sides.append(Side(stack, "peer_memory", experts))
    lines = [side.slices.measure().line for side in sides]
    for side in sides:
        side.run("gradients", Schedule([WHOLE] * told.layers, ()))  # the ranks see what is complete where
    gradients = {side.kind: side.slices.gradients(line) for side, line in zip(sides, lines, strict=True)}
    return {around: _found(around, stack, sides, gradients) for around in told.around}


class Stack:
    """What the layers have in common, however their tokens travel."""

    def __init__(self, told: Told, world: World, dtype: torch.dtype, inputs: Inputs) -> None:
        self.told, self.world, self.pull = told, world, inputs.pull
        torch.manual_seed(told.seed)
        self.dense = Dense(told).to(world.device, dtype)
        self.x_TD, self.weights_TK = inputs.tensors["x_TD"].detach(), inputs.tensors["weights_TK"].detach()
        self.experts_TK = inputs.tensors["experts_TK"]
        numbers = sum(parameter.numel() for parameter in self.dense.parameters())
        self._message = torch.zeros(numbers, dtype=dtype, device=world.device)

    def attend(self, tokens: int, backward: bool) -> None:
        """Of one layer; leaves no gradients."""
        count, layer = max(tokens // self.told.length, 1) * self.told.length, self.dense.layers[0]
        x_TD = self.x_TD[:count].detach().requires_grad_(backward)
        found = layer(x_TD, self.experts_TK[:count])
        if backward:
            torch.autograd.grad(found, [x_TD, *layer.parameters()], [torch.ones_like(one) for one in found])

    def attention(self, number: int = 0, *, backward: bool = True) -> object:
        """Of all layers, alone."""
        x_TD = self.x_TD.detach().requires_grad_()
        for layer in self.dense.layers:
            x_TD, inside_TD, weights_TK = layer(x_TD, self.experts_TK)
            x_TD = x_TD + inside_TD * weights_TK.sum(dim=1, keepdim=True).to(x_TD.dtype)
        if backward:
            x_TD.backward(self.pull)
        return x_TD

    def reduce(self) -> object:
        """As many numbers as there are dense gradients."""
        return dist.all_reduce(self._message)


class Side:
    """The layers over one transport."""

    def __init__(self, stack: Stack, kind: TransportKind, experts: tuple[Tensor, ...]) -> None:
        self.kind, self.stack = kind, stack
        told, world = stack.told, stack.world
        self._arena = stacked_arena(told, world, experts, kind)
        self.slices = GradientSlices(list(stack.dense.parameters()), world, PLACES_OF_LAYER * told.layers, kind)
        shape, plan = told.shape, Plan(self._arena.placements[0])
        counts_E = torch.bincount(stack.experts_TK.flatten(), minlength=shape.experts)
        loads_E = world.sum(counts_E).double().cpu().numpy()
        if kind == "peer_memory":
            unused = arena_of(shape, world, experts, 0, lambda row, gradients: None, kind)
            costs = measure_costs(unused, told.tokens, shape.top_k, planning=lambda costs: None)
            setting = Setting(world.topology, shape.top_k, Budget(shape.experts, 0), False, costs, kind)
            expected = layer_time(plan, loads_E, setting)
            self.layer_s = expected.total_s - expected.sums_s  # nobody adds up gradients of experts here
            return
        self.profile = measure(self._arena, told.tokens, shape.top_k, stack.attend)
        row_bytes = shape.hidden * experts[0].itemsize
        work = layer_work(plan, loads_E, world.topology, shape.top_k, row_bytes, kind)
        self.way = Way(self.profile.costs, [work] * told.layers)
        self._parts = LayerParts(self._arena, told.tokens, shape.top_k)

    def run(self, around: AroundName, schedule: Schedule, number: int = 0) -> object:
        """Forward and backward."""
        stack, slices = self.stack, self.slices
        stack.world.exposed.forget()  # an update would take it
        stack.dense.zero_grad()
        sliced = around == "gradients" and schedule.bytes_P is not None
        if schedule.bytes_P:
            slices.take(schedule.bytes_P)
        slices.begin(reduces=sliced)
        x_TD = y_TD = stack.x_TD.detach().requires_grad_()
        for number, degrees in enumerate(schedule.degrees_L):
            layer = ShardedExperts(number, self._arena, degrees=degrees, slices=slices)
            if around == "nothing":
                y_TD = layer(y_TD, self._routing(stack.weights_TK))
            else:
                x_TD, inside_TD, weights_TK = stack.dense.layers[number](x_TD, stack.experts_TK)
                x_TD = y_TD = x_TD + layer(inside_TD, self._routing(weights_TK))
        with self._arena.backward_pass():
            y_TD.backward(stack.pull)
        if sliced:
            slices.finish()
        elif around == "gradients":
            stack.dense.average(stack.world)
        return y_TD

    def _routing(self, weights_TK: Tensor) -> Routing:
        return routed(self.stack.experts_TK, weights_TK, self.stack.told.shape.experts)

    def computing(self, around: AroundName, number: int) -> object:
        if around != "nothing":
            self.stack.attention()
        with torch.no_grad():
            return [(self._parts.forward(), self._parts.backward()) for _ in range(self.stack.told.layers)]

    def communication(self, around: AroundName, number: int) -> object:
        sent = [self._parts.send() for _ in range(WAYS * self.stack.told.layers)]
        return sent, self.stack.reduce() if around == "gradients" else None


def stacked_arena(told: Told, world: World, experts: tuple[Tensor, ...], kind: TransportKind) -> ExpertArena:
    """Every layer has the same experts, without copies."""
    shape, owned = told.shape, told.shape.experts // world.size
    of_all = ExpertShape(told.layers, shape.experts, shape.hidden, shape.expert_hidden)
    arena = ExpertArena(of_all, owned * told.layers, 0, world, experts[0].dtype, lambda row, gradients: None, kind)
    for rows, part in zip(arena.rows, experts, strict=True):
        rows.view(told.layers, owned, *part.shape[1:]).copy_(part[world.rank * owned : (world.rank + 1) * owned])
    arena.place([without_copies(even_owners(shape.experts, world.size), world.size)] * told.layers)
    arena.attention = None
    return arena


NAMES: dict[TransportKind, str] = {"messages": "messages, ", "two_level": "two levels, ", "peer_memory": "peer memory, "}


def _found(around: AroundName, stack: Stack, sides: Sequence[Side], gradients: Mapping[TransportKind, DenseGradients]) -> Found:
    """What runs with one thing around the layers, and what was predicted of it."""
    told, sending = stack.told, [side for side in sides if side.kind != "peer_memory"]
    calls: dict[str, Call] = {}
    predicted_s: dict[str, float] = {}
    for side in sides[len(sending) :]:
        for name, schedule in _in_place(around, told.layers, gradients[side.kind]).items():
            name = f"{NAMES[side.kind]}{name}"
            calls[name] = partial(side.run, around, schedule)
            predicted_s[name] = _in_place_s(around, side, _arounds(around, sending[0]), schedule, gradients)
    names = {side.kind: NAMES[side.kind] if len(sending) > 1 else "" for side in sending}
    planned: dict[str, str] = {}
    for side in sending:
        schedules, plans = _schedules(around, side, gradients[side.kind])
        for name, schedule in schedules.items():
            name = f"{names[side.kind]}{name}"
            calls[name] = partial(side.run, around, schedule)
            predicted_s[name] = _predicted_s(around, side, schedule, gradients[side.kind])
        planned[f"{names[side.kind]}plan"] = plans
    alone: dict[str, Call] = {"computing": partial(sending[0].computing, around)}
    alone |= {f"{names[side.kind]}communication": partial(side.communication, around) for side in sending}
    attention: dict[str, Call] = {"attention": partial(stack.attention, backward=around == "attention")}
    unshared = {} if around == "nothing" else attention
    timed = slowest({**calls, **alone, **unshared}, stack.world, told.repeats, together=True)
    times = {name: timing.median_ms for name, timing in timed.items()}
    choice = choose_transport({side.kind: side.way for side in sending}, told.tokens, _arounds(around, sending[0]))
    profiles = [f"{names[side.kind]}{side.profile}" for side in sending]
    return Found(
        {name: times[name] for name in calls},
        {name: 1e3 * seconds for name, seconds in predicted_s.items()},
        {name: times[name] for name in alone},
        f"{names[choice.kind]}plan",
        planned,
        profiles + ([f"tokens would travel by {choice}"] if len(sending) > 1 else []),
        times.get("attention", 0.0),
    )


def _in_place(around: AroundName, layers: int, gradients: DenseGradients) -> dict[str, Schedule]:
    """Where ranks read each other's memory."""
    whole = [WHOLE] * layers
    if around != "gradients":
        return {"whole": Schedule(whole)}
    return {"gradients behind": Schedule(whole), "whole": Schedule(whole, gradients.when_complete_P)}


def _in_place_s(
    around: AroundName,
    side: Side,
    arounds: Sequence[Around],
    schedule: Schedule,
    gradients: Mapping[TransportKind, DenseGradients],
) -> float:
    """Attention and layers one behind the other, and what is left of the gradients: all of them in one message, if behind."""
    left_s = 0.0
    if around == "gradients" and schedule.bytes_P is None:
        left_s = gradients["messages"].left_s(())
    elif around == "gradients":
        left_s = gradients[side.kind].left_s(schedule.bytes_P or ())
    return sum(side.layer_s + one.attention_s + one.attention_back_s for one in arounds) + left_s


def _schedules(around: AroundName, side: Side, gradients: DenseGradients) -> tuple[dict[str, Schedule], str]:
    """(what runs where tokens travel as messages, in how many chunks the plan has the layers)."""
    told = side.stack.told
    complete_P = gradients.when_complete_P if around == "gradients" else None
    fixed = {f"degree {one}": Schedule([Degrees(one, one)] * told.layers, complete_P) for one in told.degrees}
    dense = gradients if around == "gradients" else None
    whole = [WHOLE] * told.layers
    plans, bytes_P = plan_layers(side.way.costs, side.way.works, _arounds(around, side), told.tokens, whole, dense)
    planned = Schedule([one.degrees for one in plans], bytes_P)
    described = degrees_of_all(plans)
    if bytes_P is not None:
        described += f", {sum(bytes_P) / gradients.total:.0%} of the gradients under the backward pass"
    return {"off": Schedule([OFF] * told.layers), **fixed, "plan": planned}, described


def _arounds(around: AroundName, side: Side) -> list[Around]:
    """But for the slices."""
    one = Around() if around == "nothing" else side.way.costs.around(side.stack.told.tokens)
    return [one] * side.stack.told.layers


def _predicted_s(around: AroundName, side: Side, schedule: Schedule, gradients: DenseGradients) -> float:
    arounds, left_s = _arounds(around, side), gradients.left_s(()) if around == "gradients" else 0.0
    if schedule.bytes_P is not None:
        arounds, left_s = with_slices(arounds, schedule.bytes_P, gradients.reduce), gradients.left_s(schedule.bytes_P)
    return passes_s(side.way.costs, side.way.works, arounds, schedule.degrees_L, left_s)
