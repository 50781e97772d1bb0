"""One MoE layer of a rank that reads others' tokens and results in their memory: dispatch, experts and combine, without chunks.

Each row comes once, and products gather it for all its entries; each sum of a token's entries is written where other ranks read
it. So nothing passes the memory of a device only to lie elsewhere, except for the tokens and the gradients of results, which
are made elsewhere and laid out.

Letters: T tokens of this rank, K top-k, R rows received, N entries, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.expert_mlp import Sums, WeightGradients
from kernels.expert_passes import ArenaExperts, BackwardPass, ForwardPass
from parallel.chunked_experts import Direction
from parallel.peer_exchange import PeerExchange


@dataclass(frozen=True)
class InPlace:
    """What a pass needs beside tokens and weights."""

    exchange: PeerExchange
    experts: ArenaExperts
    ready: Callable[[Direction], None]  # tokens are under way; once it returns the experts are there for this pass
    gradients: WeightGradients  # takes them, once in a backward pass
    sums: Sums
    first_rows: Callable[[], None]  # the rows of a backward pass are there: what else travels now delays them no more
    again: bool = False  # for a backward pass: results are known, and not given back


def experts_in_place(x_TD: Tensor, weights_TK: Tensor, x_RD: Tensor, run: InPlace) -> Tensor:
    """y_TD, as kernels/expert_mlp.py has it, or zeros if computed `again`; `weights_TK` is float32. Collective; so is its
    backward pass, which comes whatever needs a gradient."""
    anchor = x_TD.new_empty(0).requires_grad_()
    y_TD: Tensor = _Layer.apply(x_TD, weights_TK, anchor, x_RD, run)
    return y_TD


class _Layer(torch.autograd.Function):
    """No tensor of autograd's lies in a block, which the exchange after the next overwrites."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, anchor: Tensor, x_RD: Tensor, run: InPlace) -> Tensor:
        """Tokens and weights have been dispatched; through here goes who gets their gradients."""
        exchange = run.exchange
        run.ready("forward")
        computing = ForwardPass(exchange.order.entry_N.shape[0], run.experts, x_RD)
        ctx.run = run
        ctx.save_for_backward(x_RD, computing.h)
        if run.again:
            computing.hidden_of_whole(x_RD, exchange.weights_RK.shape[1], exchange.order)
            return torch.zeros_like(x_TD)
        results = exchange.results()
        computing.whole(x_RD, exchange.weights_RK, exchange.order, results.own_RD)
        return exchange.summed(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        run: InPlace = ctx.run
        exchange, order = run.exchange, run.exchange.order
        x_RD, h = ctx.saved_tensors
        dy_RD = exchange.pull(d_y_TD)
        run.first_rows()
        run.ready("backward")
        computing = BackwardPass(order, h, exchange.weights_RK, run.experts, run.sums, dy_RD)
        dots_PN = computing.hidden(order)
        d_down_EDF = computing.down()
        results = exchange.results()
        computing.tokens(exchange.place_RK, dots_PN, order, (results.own_RD, results.own_RK))
        run.gradients(computing.gate_up(x_RD), d_down_EDF)
        return exchange.summed(results), exchange.picked(results), None, None, None
