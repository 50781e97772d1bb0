"""Tokens to the ranks that hold their experts, and the experts' results back.

A token goes to a rank once, whatever its K: with the choices that the rank will serve, and with their combine weights, so that
its results are summed there and return as one row (the deduplication of DeepSeek-V3, arXiv 2412.19437, section 3.2.2, here by
rank). All ranks call everything here together.

Letters: T tokens of this rank, K top-k, S rows sent, R rows received, D model, E experts, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.expert_order import ExpertOrder, expert_order
from kernels.rows import combine_rows, spread_rows
from parallel.placement import Floats
from parallel.topology import World


def boundaries(shares_ED: Floats, rank: int) -> tuple[Floats, Floats]:
    """For kernels/destinations.py: where each device's part of an expert's entries ends, and where this rank starts to count.

    Args:
        shares_ED: the shares of this rank's entries of each expert that go to each device; rows sum to one.

    Returns:
        (E * D,) ascending: e + the sum of shares up to a device; (E,) in [0, 1): a phase that differs between ranks and
        experts, so that single entries, which have no parts, do not all go to the same copy.
    """
    experts = shares_ED.shape[0]
    ends_ED: Floats = shares_ED.cumsum(axis=1)
    ends_ED /= ends_ED[:, -1:].copy()  # the last share ends at exactly 1
    golden = 0.6180339887498949  # its multiples spread evenly over [0, 1) (Weyl)
    phase_E = np.asarray(((rank + 1) * golden + np.arange(experts) * golden * golden) % 1.0, dtype=np.float64)
    flat: Floats = (np.arange(experts)[:, None] + ends_ED).ravel()
    return flat, phase_E


@dataclass(frozen=True)
class Received:
    """Rows that came to this rank, sorted by the rank that they came from."""

    x_RD: Tensor
    weights_RK: Tensor  # float32; combine weights of the choices served here, elsewhere anything
    order: ExpertOrder  # of the choices served here, by their place among this rank's experts


class Exchange(Protocol):
    """The way back of what was dispatched."""

    def collect(self, y_RD: Tensor) -> Tensor:
        """Rows of results back to where their tokens came from, and their sum for each token in float32: (R, D) -> (T, D)."""


@dataclass(frozen=True)
class MessageExchange:
    """Which row goes where. The way back, and backward, walk it in the other direction."""

    world: World
    place_N: Tensor  # int32, (T * K,): the sent row of an entry, if it is its token's first for that rank; else -1
    row_TK: Tensor  # int64: the sent row that carries an entry; -1 of one that is absent
    entry_S: Tensor  # int32: the first entry of each sent row; rows are sorted by rank, then by token
    rank_S: Tensor  # int64: where each row goes
    send_W: list[int]  # rows to each rank
    receive_W: list[int]  # rows from each rank
    entries: int  # choices that this rank will serve, over all received rows

    def collect(self, y_RD: Tensor) -> Tensor:
        y_TD: Tensor = _Collect.apply(y_RD, self, self.row_TK.shape[1])
        return y_TD


def dispatch(
    world: World, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, rank_TK: Tensor, index_E: Tensor, num_here: int
) -> tuple[Received, MessageExchange]:
    """Tokens, with the choices that each rank serves, to their ranks. Differentiable in tokens and weights.

    Args:
        rank_TK: int32; who serves each choice (kernels/destinations.py), -1 of one that is absent.
        index_E: int32; which of the `num_here` experts on this rank an expert is.
    """
    rank_TK = rank_TK.long()
    exchange = _plan(rank_TK, world)
    token_S = exchange.entry_S.long() // max(experts_TK.shape[1], 1)
    here_SK = rank_TK[token_S] == exchange.rank_S.unsqueeze(1)
    experts_SK = torch.where(here_SK, experts_TK[token_S], -1).int()
    experts_RK = _all_to_all(world, experts_SK, exchange.send_W, exchange.receive_W)
    x_RD, weights_RK = _Dispatch.apply(x_TD, weights_TK.float(), token_S, here_SK, exchange)
    slots_RK = torch.where(experts_RK >= 0, index_E[experts_RK.long()], -1)
    return Received(x_RD, weights_RK, expert_order(slots_RK, num_here, num_entries=exchange.entries)), exchange


def _plan(rank_TK: Tensor, world: World) -> MessageExchange:
    """From the rank of each entry. One message of two numbers to every rank, and the one wait for the device of a layer."""
    tokens, top_k = rank_TK.shape
    same_TKK = rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)
    first_TK = same_TKK.int().argmax(dim=2)  # the first choice with the same rank
    present_TK = rank_TK >= 0
    leads_TK = present_TK & (first_TK == torch.arange(top_k, device=rank_TK.device))
    counts_W2 = torch.zeros(world.size, 2, dtype=torch.int64, device=rank_TK.device)
    flat_N = rank_TK.flatten()
    counts_W2[:, 0].scatter_add_(0, flat_N.clamp(min=0), leads_TK.flatten().long())
    counts_W2[:, 1].scatter_add_(0, flat_N.clamp(min=0), present_TK.flatten().long())
    received_W2 = torch.empty_like(counts_W2)
    with world.exposed:
        dist.all_to_all_single(received_W2, counts_W2)
    send_W, receive_W, entries_W = torch.stack([counts_W2[:, 0], received_W2[:, 0], received_W2[:, 1]]).tolist()
    leaders_TK = torch.where(leads_TK, rank_TK, -1)
    order = expert_order(leaders_TK, world.size, num_entries=sum(send_W))
    row_TK = order.place_N.view(tokens, top_k).long().gather(1, first_TK)
    rank_S = flat_N[order.entry_N.long()]
    return MessageExchange(world, order.place_N, row_TK, order.entry_N, rank_S, send_W, receive_W, entries=sum(entries_W))


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, token_S: Tensor, here_SK: Tensor, exchange: MessageExchange
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.top_k = exchange, weights_TK.shape[1]
        ctx.save_for_backward(here_SK)
        weights_RK = _all_to_all(exchange.world, weights_TK[token_S] * here_SK, exchange.send_W, exchange.receive_W)
        return _send_rows(x_TD, exchange, ctx.top_k), weights_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x_RD: Tensor, d_weights_RK: Tensor) -> tuple[Tensor | None, ...]:
        exchange: MessageExchange = ctx.exchange
        (here_SK,) = ctx.saved_tensors
        d_weights_SK = _all_to_all(exchange.world, d_weights_RK, exchange.receive_W, exchange.send_W) * here_SK
        columns_TK = torch.arange(ctx.top_k, device=d_weights_SK.device).expand_as(exchange.row_TK)
        d_weights_SK = torch.cat([d_weights_SK, d_weights_SK.new_zeros(1, ctx.top_k)])  # what a row of -1 finds
        d_weights_TK = d_weights_SK[exchange.row_TK, columns_TK]
        return _return_rows(d_x_RD, exchange, ctx.top_k), d_weights_TK, None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, exchange: MessageExchange, top_k: int) -> Tensor:
        ctx.exchange, ctx.top_k = exchange, top_k
        return _return_rows(y_RD, exchange, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor, None, None]:
        return _send_rows(d_y_TD, ctx.exchange, ctx.top_k), None, None


def _send_rows(x_TD: Tensor, exchange: MessageExchange, top_k: int) -> Tensor:
    rows_SD = x_TD.new_empty(sum(exchange.send_W), x_TD.shape[1])
    spread_rows(x_TD.contiguous(), exchange.place_N, top_k, rows_SD)
    return _all_to_all(exchange.world, rows_SD, exchange.send_W, exchange.receive_W)


def _return_rows(rows_RD: Tensor, exchange: MessageExchange, top_k: int) -> Tensor:
    rows_SD = _all_to_all(exchange.world, rows_RD, exchange.receive_W, exchange.send_W)
    return combine_rows(rows_SD, exchange.place_N, top_k)


def _all_to_all(world: World, rows: Tensor, send_W: list[int], receive_W: list[int]) -> Tensor:
    received = rows.new_empty(sum(receive_W), *rows.shape[1:])
    rows = rows.contiguous()
    with world.exposed:
        dist.all_to_all_single(received, rows, receive_W, send_W)
    return received
