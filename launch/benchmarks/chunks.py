"""An MoE layer with attention on the ranks of this machine, its tokens as messages, in chunks: measured beside predicted.

    degree 1    whole: dispatch, experts, combine, one after the other; the gradients of weights hide the last way back
    degree r    r chunks forward and backward
    bound       what no degree can beat: the experts alone or the messages alone, as measured, and the attention
    plan        degrees that the measured parts of the layer let expect to be the fastest

Copies are none, loads even. A rank's time is its own; the slowest rank's median counts. Letters: T tokens of a rank, D model.
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
from parallel.chunk_profile import Profile, measure
from parallel.expert_arena import ExpertArena
from parallel.flows import Plan
from parallel.moe_layer import ShardedExperts
from parallel.placement import even_owners, without_copies
from parallel.schedule.execution import LayerWork, backward_tasks, bound_s, forward_tasks, layer_work, plan_layer
from parallel.schedule.pipeline import Degrees
from parallel.schedule.timeline import simulate
from parallel.topology import World

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
    bound_ms: float
    planned: Degrees
    profile: str


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
    parts = tuple(tensor.detach() for tensor in matrices.values())
    arena = arena_of(shape, world, parts, 0, lambda row, gradients: None, "messages")
    plan = Plan(without_copies(even_owners(shape.experts, world.size), world.size))
    arena.place([plan.placement])
    arena.attention = None
    attention = Attention(shape.hidden, told.length).to(world.device, parts[0].dtype)
    generator = torch.Generator(world.device).manual_seed(told.seed + 1 + world.rank)
    inputs = draw_inputs(shape, told.tokens, "even", generator, matrices)
    counts_E = torch.bincount(inputs.tensors["experts_TK"].flatten(), minlength=shape.experts)
    loads_E = world.sum(counts_E).double().cpu().numpy()

    def attend(tokens: int) -> Tensor:
        rows = inputs.tensors["x_TD"][: max(tokens // told.length, 1) * told.length].detach()
        y_TD: Tensor = attention(rows)
        return y_TD

    profile = measure(arena, told.tokens, shape.top_k, attend)
    row_bytes = shape.hidden * parts[0].itemsize
    work = layer_work(plan, loads_E, world.topology, shape.top_k, row_bytes)
    chosen = plan_layer(profile.costs, work, told.tokens)
    degrees = {f"degree {degree}": Degrees(degree, degree) for degree in told.degrees} | {"plan": chosen.degrees}
    calls: dict[str, Call] = {name: partial(_call, arena, attention, inputs, one) for name, one in degrees.items()}
    calls["attention"] = lambda number: _attention(attention, inputs)
    times = {name: timing.median_ms for name, timing in slowest(calls, world, told.repeats, together=True).items()}
    attention_ms = times.pop("attention")
    fixed_ms = attention_ms + 1e3 * profile.announce_s
    return Found(
        times,
        {name: fixed_ms + 1e3 * predicted_s(profile, work, one) for name, one in degrees.items()},
        attention_ms + 1e3 * bound_s(profile.costs, work),
        chosen.degrees,
        str(profile),
    )


def predicted_s(profile: Profile, work: LayerWork, degrees: Degrees) -> float:
    """Of both passes of the layer."""
    ahead = simulate(forward_tasks(profile.costs, work, degrees.forward))
    back = simulate(backward_tasks(profile.costs, work, degrees.backward))
    return ahead.seconds + back.seconds


def _call(arena: ExpertArena, attention: Attention, inputs: Inputs, degrees: Degrees, number: int) -> object:
    layer = ShardedExperts(0, arena, degrees=degrees)
    x_TD = inputs.tensors["x_TD"].detach().requires_grad_()
    routing = routed(inputs.tensors["experts_TK"], inputs.tensors["weights_TK"], arena.shape.experts)
    y_TD = layer(FinishBackward.apply(attention(x_TD), arena), routing)
    y_TD.backward(inputs.pull)
    return y_TD


def _attention(attention: Attention, inputs: Inputs) -> object:
    x_TD = inputs.tensors["x_TD"].detach().requires_grad_()
    y_TD = attention(x_TD)
    y_TD.backward(inputs.pull)
    return y_TD
