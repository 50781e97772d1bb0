"""An MoE layer with attention on the ranks of this machine, whole and in chunks: measured beside predicted.

    peer memory    what training takes where ranks read each other's memory: whole
    off            one message after the other, each waited for where it sets out: nothing overlaps
    degree r       r chunks forward and backward; at 1 the gradients of weights hide the last way back
    plan           degrees that the measured parts of the layer let expect to be the fastest
    computing      attention and experts alone, forward and backward, on rows that are there already
    communication  what tokens and results take on their ways, and nothing else; over two levels, on the links of the kind
                   that takes longer

Nodes of several ranks run it over two levels too. Copies are none, loads even. A rank's time is its own; the slowest rank's
median of calls in turns counts. Letters: T tokens of a rank, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from launch.benchmarks.contest import Inputs
from launch.benchmarks.experts import draw_inputs, draw_matrices
from launch.benchmarks.fssdp import FinishBackward, arena_of, routed
from launch.benchmarks.options import Shape
from launch.benchmarks.ranks import slowest
from launch.benchmarks.timing import Call
from parallel.chunk_profile import LayerParts, measure
from parallel.expert_arena import ExpertArena
from parallel.flows import Plan
from parallel.moe_layer import ShardedExperts
from parallel.peer_exchange import PeerTokens
from parallel.placement import even_owners, without_copies
from parallel.schedule.execution import layer_seconds, layer_work, plan_layer
from parallel.schedule.generalised import ALONE
from parallel.schedule.pipeline import OFF, WHOLE, Degrees
from parallel.schedule.transports import Way, choose_transport
from parallel.topology import World
from parallel.transport import TransportKind, transport_kind
from parallel.two_level_exchange import has_two_levels

HEAD = 64  # numbers of an attention head


@dataclass(frozen=True)
class Layer:
    """What is measured, as the ranks are told of it."""

    shape: Shape
    tokens: int  # of a rank
    length: int  # of a row of them
    degrees: tuple[int, ...]
    seed: int
    repeats: int | None


@dataclass(frozen=True)
class Found:
    """Milliseconds, forward and backward, by the name of the schedule."""

    measured_ms: dict[str, float]
    predicted_ms: dict[str, float]
    alone_ms: dict[str, float]  # computing, and communication of each transport
    ours: str  # the plan of the transport that training would take, or else of messages
    planned: dict[str, Degrees]
    profiles: list[str]
    attention_ms: float  # forward and backward

    @property
    def least_ms(self) -> float:
        """Of the layer with its attention, under which nothing of it travels: experts, or messages, hide all but themselves."""
        computing, *communication = self.alone_ms.values()
        return self.attention_ms + max(computing - self.attention_ms, min(communication))

    @property
    def bound_ms(self) -> float:
        """Computing alone, or communication alone with the transport that needs least of it."""
        computing, *communication = self.alone_ms.values()
        return max(computing, min(communication))


class Attention(nn.Module):
    """Causal, over rows of `length` tokens."""

    def __init__(self, hidden: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.ahead, self.behind = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        query, key, value = self.ahead(x_TD).view(-1, self.length, 3, x_TD.shape[1] // HEAD, HEAD).transpose(1, 3).unbind(2)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        y_TD: Tensor = self.behind(mixed.transpose(1, 2).reshape(x_TD.shape))
        return x_TD + y_TD


def measure_layer(world: World, told: Layer, cases: None) -> Found:
    """On a rank."""
    shape = told.shape
    matrices = draw_matrices(shape, torch.Generator(world.device).manual_seed(told.seed))  # the same on all ranks
    experts = tuple(tensor.detach() for tensor in matrices.values())
    attention = Attention(shape.hidden, told.length).to(world.device, experts[0].dtype)
    generator = torch.Generator(world.device).manual_seed(told.seed + 1 + world.rank)
    inputs = draw_inputs(shape, told.tokens, "even", generator, matrices)
    chosen = transport_kind("auto", world)
    kinds: list[TransportKind] = ["messages", "two_level"] if has_two_levels(world.topology) else ["messages"]
    found = [_Sides(told, world, kind, experts, attention, inputs, NAMES[kind] if len(kinds) > 1 else "") for kind in kinds]
    calls: dict[str, Call] = {}
    if chosen == "peer_memory":
        whole = _arena(told, world, experts, chosen)
        calls[f"{NAMES[chosen]}whole"] = partial(_call, whole, attention, inputs, WHOLE)
    for one in found:
        calls |= one.calls
    alone: dict[str, Call] = {"computing": found[0].computing}
    alone |= {f"{one.name}communication": one.communication for one in found}
    timed = slowest({**calls, **alone, "attention": partial(_attention, attention, inputs)}, world, told.repeats, together=True)
    times = {name: timing.median_ms for name, timing in timed.items()}
    choice = choose_transport({one.kind: one.way for one in found}, told.tokens, [ALONE])
    ours = next(one for one in found if one.kind == choice.kind)
    return Found(
        {name: times[name] for name in calls},
        {name: times["attention"] + 1e3 * seconds for one in found for name, seconds in one.predicted_s.items()},
        {name: times[name] for name in alone},
        f"{ours.name}plan",
        {f"{one.name}plan": one.planned for one in found},
        [f"{one.name}{one.profile}" for one in found] + ([f"tokens would travel by {choice}"] if len(found) > 1 else []),
        times["attention"],
    )


NAMES: dict[TransportKind, str] = {"messages": "messages, ", "two_level": "two levels, ", "peer_memory": "peer memory, "}


class _Sides:
    """The layer over one transport of messages: what runs, and what is predicted of it."""

    def __init__(
        self,
        told: Layer,
        world: World,
        kind: TransportKind,
        experts: tuple[Tensor, ...],
        attention: Attention,
        inputs: Inputs,
        name: str,
    ) -> None:
        self.name, self.kind = name, kind
        self._attention, self._inputs = attention, inputs
        arena = _arena(told, world, experts, kind)
        self.profile = measure(arena, told.tokens, told.shape.top_k, self._attend)
        costs, levels = self.profile.costs, arena.transport.tokens
        assert not isinstance(levels, PeerTokens), f"{kind} sends no messages"
        counts_E = torch.bincount(inputs.tensors["experts_TK"].flatten(), minlength=told.shape.experts)
        loads_E = world.sum(counts_E).double().cpu().numpy()
        plan = Plan(arena.placements[0])
        row_bytes = told.shape.hidden * experts[0].itemsize
        work = layer_work(plan, loads_E, world.topology, told.shape.top_k, row_bytes, levels=len(levels))
        self.planned = plan_layer(costs, work, told.tokens).degrees
        degrees = {"off": OFF, **{f"degree {one}": Degrees(one, one) for one in told.degrees}, "plan": self.planned}
        self.calls: dict[str, Call] = {
            f"{name}{schedule}": partial(_call, arena, attention, inputs, one) for schedule, one in degrees.items()
        }
        self.predicted_s = {f"{name}{schedule}": layer_seconds(costs, work, one) for schedule, one in degrees.items()}
        self.way = Way(costs, [work])
        self._parts = LayerParts(arena, told.tokens, told.shape.top_k)

    def _attend(self, tokens: int) -> object:
        length = self._attention.length
        rows = self._inputs.tensors["x_TD"][: max(tokens // length, 1) * length].detach()
        return self._attention(rows)

    def computing(self, number: int) -> object:
        _attention(self._attention, self._inputs)
        with torch.no_grad():
            return self._parts.forward(), self._parts.backward()

    def communication(self, number: int) -> object:
        return [self._parts.send() for _ in range(WAYS)]


WAYS = 4  # tokens and results, forward and backward


def _arena(told: Layer, world: World, experts: tuple[Tensor, ...], kind: TransportKind) -> ExpertArena:
    arena = arena_of(told.shape, world, experts, 0, lambda row, gradients: None, kind)
    arena.place([without_copies(even_owners(told.shape.experts, world.size), world.size)])
    arena.attention = None
    return arena


def _call(arena: ExpertArena, attention: Attention, inputs: Inputs, degrees: Degrees, number: int) -> object:
    layer = ShardedExperts(0, arena, degrees=degrees)
    x_TD = inputs.tensors["x_TD"].detach().requires_grad_()
    routing = routed(inputs.tensors["experts_TK"], inputs.tensors["weights_TK"], arena.shape.experts)
    y_TD = layer(FinishBackward.apply(attention(x_TD), arena), routing)
    y_TD.backward(inputs.pull)
    return y_TD


def _attention(attention: Attention, inputs: Inputs, number: int = 0) -> object:
    x_TD = inputs.tensors["x_TD"].detach().requires_grad_()
    y_TD = attention(x_TD)
    y_TD.backward(inputs.pull)
    return y_TD
