"""One MoE layer of a rank whose tokens travel as messages: dispatch, experts and combine of each chunk while others travel.

Source: FSMoE, arXiv 2501.10714, section 4: all dispatches go first, back to back; each chunk is computed when it is there, and
its results set out at once. Backward has chunks of its own number, and leaves the gradients of the weights to the end, where
the last chunks are on their way back. Messages have streams of their own on a GPU (NCCL's) and threads on a CPU (gloo's).

Letters: T tokens of this rank, K top-k, R rows received, P of a chunk, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.expert_mlp import WeightGradients
from kernels.expert_passes import ArenaExperts, BackwardPass, ForwardPass
from parallel.token_exchange import Exchange, InFlight, Way


@dataclass(frozen=True)
class Chunked:
    """What a pass needs beside tokens and weights."""

    exchange: Exchange
    experts: ArenaExperts
    before_backward: Callable[[], None]  # the experts have to be there once it returns
    gradients: WeightGradients  # takes them, once in a backward pass


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
        arriving = _sent(way, x_TD.contiguous())
        computing = ForwardPass(exchange.order.entry_N.shape[0], run.experts, x_TD)
        rows: list[Tensor] = []
        returning: list[InFlight] = []
        for chunk, part in enumerate(exchange.forward_parts):
            here = way.arrived(chunk)
            rows.append(arriving[chunk].wait())
            y_PD = computing.rows(rows[chunk], place_RK[here], weights_RK[here], part)
            returning.append(way.give_back(y_PD, chunk))
        ctx.run = run
        ctx.save_for_backward(torch.cat(rows) if len(rows) > 1 else rows[0], computing.h, place_RK)
        return _collected(way, returning)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        run: Chunked = ctx.run
        exchange, way = run.exchange, run.exchange.backward
        arrived_RD, h, arrived_RK = ctx.saved_tensors
        arriving = _sent(way, d_y_TD.contiguous())
        run.before_backward()
        place_RK = exchange.places(way)
        computing = BackwardPass(exchange.order, h, exchange.weights_RK, run.experts, d_y_TD)
        d_weights: list[Tensor] = []
        returning: list[InFlight] = []
        for chunk, part in enumerate(exchange.backward_parts):
            d_x_PD, d_weights_PK = computing.rows(arriving[chunk].wait(), place_RK[way.arrived(chunk)], part)
            returning.append(way.give_back(d_x_PD, chunk))
            d_weights.append(d_weights_PK)
        returning_weights = exchange.return_weights(torch.cat(d_weights))
        run.gradients(*computing.weights(arrived_RD, arrived_RK))
        return _collected(way, returning), exchange.collect_weights(returning_weights), None, None


def _sent(way: Way, x_TD: Tensor) -> list[InFlight]:
    return [way.send(way.pack(x_TD, chunk), chunk) for chunk in range(len(way))]


def _collected(way: Way, returning: list[InFlight]) -> Tensor:
    return torch.cat([way.collect(back.wait(), chunk) for chunk, back in enumerate(returning)])
