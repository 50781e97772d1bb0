"""One MoE layer of a rank whose tokens travel as messages: dispatch, experts and combine of each chunk while others travel.

Source: FSMoE, arXiv 2501.10714, section 4: all dispatches go first, back to back; each chunk is computed when it is there, and
its results set out at once. Backward has chunks of its own number, and leaves the gradients of the weights to the end, where
the last chunks are on their way back. Messages have streams of their own on a GPU (NCCL's) and threads on a CPU (gloo's).

Letters: T tokens of this rank, K top-k, R rows received, P of a chunk, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.expert_mlp import WeightGradients
from kernels.expert_passes import ArenaExperts, BackwardPass, ForwardPass
from parallel.token_exchange import Exchange, InFlight, Way

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Chunked:
    """What a pass needs beside tokens and weights."""

    exchange: Exchange
    experts: ArenaExperts
    await_experts: Callable[[], None]  # once it returns they are there, for a pass
    gradients: WeightGradients  # takes them, once in a backward pass
    mark: Callable[[str], None]  # is told the name of each part when the device is done with it, or with waiting for it


def begins(direction: Direction) -> str:
    """The first mark of a pass."""
    return f"{direction} begins"


def chunked_experts(x_TD: Tensor, weights_TK: Tensor, run: Chunked) -> Tensor:
    """y_TD, as kernels/expert_mlp.py has it. Collective; so is its backward pass, which comes whatever needs a gradient."""
    anchor = x_TD.new_empty(0).requires_grad_()
    y_TD: Tensor = _Layer.apply(x_TD, weights_TK, anchor, run)
    return y_TD


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, anchor: Tensor, run: Chunked) -> Tensor:
        exchange, way = run.exchange, run.exchange.forward
        place_RK, weights_RK = exchange.places(way), exchange.weights_RK[way.row_R]
        run.mark(begins("forward"))
        arriving = _sent(way, x_TD.contiguous())
        run.await_experts()
        run.mark("pack")
        computing = ForwardPass(exchange.order.entry_N.shape[0], run.experts, x_TD)
        rows: list[Tensor] = []
        returning: list[InFlight] = []
        for chunk, part in enumerate(exchange.forward_parts):
            here = way.arrived(chunk)
            rows.append(arriving[chunk].wait())
            run.mark(f"dispatch {chunk + 1}")
            y_PD = computing.rows(rows[chunk], place_RK[here], weights_RK[here], part)
            returning.append(way.give_back(y_PD, chunk))
            run.mark(f"experts {chunk + 1}")
        ctx.run = run
        ctx.save_for_backward(torch.cat(rows) if len(rows) > 1 else rows[0], computing.h, place_RK)
        return _collected(way, returning, run)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        run: Chunked = ctx.run
        exchange, way = run.exchange, run.exchange.backward
        arrived_RD, h, arrived_RK = ctx.saved_tensors
        run.mark(begins("backward"))
        arriving = _sent(way, d_y_TD.contiguous())
        run.await_experts()
        run.mark("pack")
        place_RK = exchange.places(way)
        computing = BackwardPass(exchange.order, h, exchange.weights_RK, run.experts, d_y_TD)
        d_weights: list[Tensor] = []
        returning: list[InFlight] = []
        for chunk, part in enumerate(exchange.backward_parts):
            d_y_PD = arriving[chunk].wait()
            run.mark(f"dispatch {chunk + 1}")
            d_x_PD, d_weights_PK = computing.rows(d_y_PD, place_RK[way.arrived(chunk)], part)
            returning.append(way.give_back(d_x_PD, chunk))
            d_weights.append(d_weights_PK)
            run.mark(f"experts {chunk + 1}")
        returning_weights = exchange.return_weights(torch.cat(d_weights))
        gradients = computing.weights(arrived_RD, arrived_RK)
        run.mark("weights")
        run.gradients(*gradients)
        run.mark("gradients")
        return _collected(way, returning, run), exchange.collect_weights(returning_weights), None, None


def _sent(way: Way, x_TD: Tensor) -> list[InFlight]:
    return [way.send(way.pack(x_TD, chunk), chunk) for chunk in range(len(way))]


def _collected(way: Way, returning: list[InFlight], run: Chunked) -> Tensor:
    found: list[Tensor] = []
    for chunk, back in enumerate(returning):
        rows_SD = back.wait()
        run.mark(f"combine {chunk + 1}")
        found.append(way.collect(rows_SD, chunk))
        run.mark(f"collect {chunk + 1}")
    return torch.cat(found)
