"""The token exchange without messages: ranks read each other's tokens, choices and results in place.

Every rank lays out its tokens with what the gate decided. Behind one barrier each reads all choices, works out alike which rows
go where (kernels/peer_routing.py), and pulls the rows that it serves; results lie open in the same way, and each token's are
summed where it came from. Rows and the sums of a token are those of token_exchange.py, bit for bit.

Letters: T tokens of this rank, C of each rank that there is room for, W ranks, V = W * C, K top-k, R rows received, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.expert_order import ExpertOrder, cut, expert_order
from kernels.peer_routing import plan_rows
from kernels.peer_rows import pick_numbers, pull_rows, sum_rows
from kernels.peers import LANE_BYTES, PeerChoices, PeerRows
from parallel.host_device import to_host
from parallel.peer_memory import PeerMemory
from parallel.topology import World

FIRST_TOKENS = 16  # room before the first call tells how many come
SPARE = 16  # room for a sixteenth more rows than there were, because they vary


@dataclass(frozen=True)
class Room:
    """Two blocks of each rank that take turns, so one barrier serves a way."""

    blocks: list[PeerMemory]
    tokens: int  # C
    rows: int  # R at most
    top_k: int

    def choices(self, block: PeerMemory) -> PeerChoices:
        return PeerChoices(block.of_rank, block.pointers_W, self.tokens, self.top_k)


@dataclass(frozen=True)
class Received:
    """Rows that came to this rank, sorted by the rank that they came from."""

    x_RD: Tensor
    weights_RK: Tensor  # float32; combine weights of the choices served here, elsewhere anything
    order: ExpertOrder  # of the choices served here, by their place among this rank's experts


class PeerTokens:
    """One rank's end. All ranks call `dispatch` together, and what it returns likewise."""

    def __init__(self, world: World, hidden: int, dtype: torch.dtype) -> None:
        self.world, self.hidden, self.dtype = world, hidden, dtype
        self._room = self._made(FIRST_TOKENS, FIRST_TOKENS, top_k=1)

    def _made(self, tokens: int, rows: int, top_k: int) -> Room:
        """Of the same size on all ranks, for either way."""
        row_bytes = self.hidden * self.dtype.itemsize
        there = _behind_choices(PeerChoices((), torch.empty(0), tokens, top_k)) + tokens * row_bytes
        back = _padded(rows * row_bytes) + rows * top_k * torch.float32.itemsize
        return Room([PeerMemory(self.world, max(there, back)) for _ in range(2)], tokens, rows, top_k)

    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, rank_TK: Tensor, index_E: Tensor, num_here: int
    ) -> tuple[Received, PeerExchange]:
        """Tokens, with the choices that each rank serves, to their ranks. Differentiable in tokens and weights.

        One wait for the device, in which the sizes come.

        Args:
            rank_TK: int32; who serves each choice (kernels/destinations.py), -1 of one that is absent.
            index_E: int32; which of the `num_here` experts on this rank an expert is.
        """
        (tokens, top_k), rank = experts_TK.shape, self.world.rank
        if top_k != self._room.top_k:  # on all ranks
            self._room = self._made(self._room.tokens, self._room.rows, top_k)
        while True:
            room, block = self._room, self.turn()
            if room.choices(block).lay_out(rank, rank_TK, experts_TK, weights_TK.detach()):
                self._tokens_in(block).of_rank(rank)[:tokens].copy_(x_TD.detach())
            with self.world.exposed:
                block.barrier()
            # All of this has room for more than comes, so that the device is at work while the host waits for the sizes.
            plan = plan_rows(room.choices(block), index_E, rank)
            numbers = to_host(plan.numbers)
            x_RD = x_TD.new_empty(min(room.rows, plan.row_WV.shape[1]), self.hidden)
            with self.world.exposed:
                pull_rows(self._tokens_in(block), plan.row_WV[rank], x_RD)
            order = expert_order(plan.slots_VK, num_here, most_entries=plan.slots_VK.numel())
            most_tokens, entries, *rows_W = map(int, numbers().tolist())
            if most_tokens <= room.tokens and max(rows_W) <= room.rows:
                break
            # All ranks see the same numbers, and drop the old blocks once the new ones are made.
            more = min(max(rows_W) * (SPARE + 1) // SPARE, self.world.size * max(most_tokens, room.tokens))
            self._room = self._made(max(most_tokens, room.tokens), max(more, room.rows), top_k)
        rows = rows_W[rank]
        own_WT = plan.row_WV[:, rank * room.tokens : rank * room.tokens + tokens]
        exchange = PeerExchange(self, rank_TK, own_WT, plan.row_WV[rank], rows)
        x_RD, weights_RK = _Dispatch.apply(x_TD, weights_TK.float(), _Rows(x_RD, plan.weights_VK), exchange)
        return Received(x_RD, weights_RK, cut(order, rows * top_k, entries)), exchange

    # ------------------------------------------------------------ the two ways of an exchange

    def turn(self) -> PeerMemory:
        """The block to write next: what is in it, all ranks have read."""
        self._room.blocks.reverse()
        return self._room.blocks[0]

    def _tokens_in(self, block: PeerMemory) -> PeerRows:
        start = _behind_choices(self._room.choices(block))
        return PeerRows(block.of_rank, block.pointers_W, start, self.hidden, self.dtype)

    def show_tokens(self, x_TD: Tensor) -> PeerRows:
        """Lays out rows for tokens whose choices are known. Collective."""
        rows = self._tokens_in(block := self.turn())
        rows.of_rank(self.world.rank)[: x_TD.shape[0]].copy_(x_TD)
        with self.world.exposed:
            block.barrier()
        return rows

    def show_results(self, y_RD: Tensor, numbers_RK: Tensor | None) -> tuple[PeerRows, PeerRows]:
        """Lays out this rank's results, and K numbers of each where there are any. Collective."""
        block, room, rank = self.turn(), self._room, self.world.rank
        rows = PeerRows(block.of_rank, block.pointers_W, 0, self.hidden, self.dtype)
        behind = _padded(room.rows * self.hidden * self.dtype.itemsize)
        numbers = PeerRows(block.of_rank, block.pointers_W, behind, room.top_k, torch.float32)
        rows.of_rank(rank)[: y_RD.shape[0]].copy_(y_RD)
        if numbers_RK is not None:
            numbers.of_rank(rank)[: y_RD.shape[0]].copy_(numbers_RK)
        with self.world.exposed:
            block.barrier()
        return rows, numbers


@dataclass(frozen=True)
class PeerExchange:
    """Which rows went where, of one call."""

    peers: PeerTokens
    rank_TK: Tensor  # int32; who serves each choice of this rank's tokens
    row_WT: Tensor  # int32; the row of each token at each rank; -1 where it has none
    row_V: Tensor  # int32; the row here of every rank's tokens; -1 where they have none
    rows: int  # R

    def pulled(self, rows: PeerRows) -> Tensor:
        out_RD = torch.empty(self.rows, rows.width, dtype=rows.dtype, device=self.row_V.device)
        with self.peers.world.exposed:
            pull_rows(rows, self.row_V, out_RD)
        return out_RD

    def summed(self, rows: PeerRows) -> Tensor:
        with self.peers.world.exposed:
            return sum_rows(rows, self.rank_TK, self.row_WT)

    def collect(self, y_RD: Tensor) -> Tensor:
        """Rows of results back to where their tokens came from, and their sum for each token in float32: (R, D) -> (T, D)."""
        y_TD: Tensor = _Collect.apply(y_RD, self)
        return y_TD


def _padded(nbytes: int) -> int:
    return -(-nbytes // LANE_BYTES) * LANE_BYTES


def _behind_choices(choices: PeerChoices) -> int:
    return _padded(choices.nbytes)


@dataclass(frozen=True)
class _Rows:
    """Of this rank, and room behind them."""

    x_RD: Tensor
    weights_RK: Tensor


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, rows: _Rows, exchange: PeerExchange) -> tuple[Tensor, Tensor]:
        """The rows are here already; what goes through here is who gets their gradients."""
        ctx.exchange = exchange
        return rows.x_RD[: exchange.rows], rows.weights_RK[: exchange.rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x_RD: Tensor, d_weights_RK: Tensor) -> tuple[Tensor | None, ...]:
        exchange: PeerExchange = ctx.exchange
        rows, numbers = exchange.peers.show_results(d_x_RD, d_weights_RK)
        return exchange.summed(rows), pick_numbers(numbers, exchange.rank_TK, exchange.row_WT), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, exchange: PeerExchange) -> Tensor:
        ctx.exchange = exchange
        rows, _ = exchange.peers.show_results(y_RD, None)
        return exchange.summed(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor, None]:
        exchange: PeerExchange = ctx.exchange
        return exchange.pulled(exchange.peers.show_tokens(d_y_TD)), None
