"""The token exchange without messages: ranks read each other's tokens, choices and results in place.

Every rank lays out its tokens with the gate's choices. After one barrier each rank reads all choices, computes the same plan of
which rows go where (kernels/peer_routing.py), and pulls the rows that it serves, each once.
Results are written where all can read them, and each token's results are summed on its own rank. Rows and the sums of a token
are those of token_exchange.py, bit for bit. peer_layer.py makes a layer of it.

Letters: T tokens of this rank, C of each rank that there is memory for, W ranks, V = W * C, K top-k, R rows received, D model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.expert_order import ExpertOrder, cut, expert_order
from kernels.host_device import to_host
from kernels.peer_routing import lay_out, plan_rows
from kernels.peer_rows import pick_numbers, pull_rows, sum_rows
from kernels.peers import LANE_BYTES, PeerChoices, PeerRows, capacity_for
from parallel.peer_memory import PeerMemory
from parallel.topology import World

FIRST_TOKENS = 16  # room before the first call tells how many come
SPARE = 16  # room for a sixteenth more rows than there were, because they vary


@dataclass(frozen=True)
class Block:
    """Of each rank, and what lies where in it: choices with tokens after them on the way there; on the way back results, and
    after them a number for each choice."""

    memory: PeerMemory
    choices: PeerChoices
    tokens: PeerRows
    results: PeerRows
    numbers: PeerRows  # float32, K wide


@dataclass(frozen=True)
class Room:
    """Two blocks of each rank that take turns, so one barrier serves a way."""

    blocks: list[Block]
    tokens: int  # C
    rows: int  # R at most
    top_k: int


@dataclass(frozen=True)
class Results:
    """Where this rank writes what it gives back; after a barrier all ranks read it, until the exchange after the next."""

    block: Block
    own_RD: Tensor
    own_RK: Tensor


@dataclass(frozen=True)
class PeerCounts:
    """Of what comes to this rank."""

    rows: int  # R
    entries: int  # choices that are served here


class PeerTokens:
    """One rank's end. All ranks call `dispatch` together, and what it returns likewise."""

    def __init__(self, world: World, hidden: int, dtype: torch.dtype) -> None:
        self.world, self.hidden, self.dtype = world, hidden, dtype
        self._room = self._made(FIRST_TOKENS, FIRST_TOKENS, top_k=1)

    def _made(self, tokens: int, rows: int, top_k: int) -> Room:
        """Of the same size on all ranks, for either way. Grows forward only: no backward pass has more rows than its forward
        pass had, and activations that are computed again have the same."""
        tokens, row_bytes, number = capacity_for(tokens), self.hidden * self.dtype.itemsize, torch.float32
        behind_choices = _padded(PeerChoices((), torch.empty(0), tokens, top_k).nbytes)
        behind_rows = _padded(rows * row_bytes)
        nbytes = max(behind_choices + tokens * row_bytes, behind_rows + rows * top_k * number.itemsize)
        blocks = []
        for memory in (PeerMemory(self.world, nbytes), PeerMemory(self.world, nbytes)):
            each = memory.of_rank, memory.pointers_W
            there = PeerChoices(*each, tokens, top_k), PeerRows(*each, behind_choices, self.hidden, self.dtype)
            back = PeerRows(*each, 0, self.hidden, self.dtype), PeerRows(*each, behind_rows, top_k, number)
            blocks.append(Block(memory, *there, *back))
        return Room(blocks, tokens, rows, top_k)

    def dispatch(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        rank_TK: Tensor,
        index_E: Tensor,
        num_here: int,
        known: PeerCounts | None = None,
    ) -> tuple[Tensor, PeerExchange]:
        """Tokens, with the choices that each rank serves, to their ranks. Constants to autograd. Returns (x_RD, sorted by the
        rank that they came from; what brings results back).

        One wait for the device, in which the sizes come, if they are not known.

        Args:
            rank_TK: int32; who serves each choice (kernels/destinations.py), -1 of one that is absent.
            index_E: int32; which of the `num_here` experts on this rank an expert is.
            known: of an exchange that is repeated, on all ranks.
        """
        (tokens, top_k), world, rank = experts_TK.shape, self.world, self.world.rank
        if top_k != self._room.top_k:  # on all ranks
            self._room = self._made(self._room.tokens, self._room.rows, top_k)
        while True:
            room, block = self._room, self.turn()
            lay_out(block.choices, block.tokens, rank, rank_TK, experts_TK, weights_TK.detach(), x_TD.detach())
            with world.exposed:
                block.memory.barrier()
            # All of this has room for more than comes, so that the device is at work while the host waits for the sizes.
            plan = plan_rows(block.choices, index_E, rank)
            numbers = None if known is not None else to_host(plan.numbers)
            order = expert_order(plan.slots_VK, num_here, most_entries=plan.slots_VK.numel())
            x_RD = x_TD.new_empty(min(room.rows, plan.row_WV.shape[1]), self.hidden)
            with world.exposed:
                pull_rows(block.tokens, plan.row_WV[rank], x_RD)
            if numbers is None:
                break
            most_tokens, entries, *rows_W = map(int, numbers().tolist())
            if most_tokens <= room.tokens and max(rows_W) <= room.rows:
                known = PeerCounts(rows_W[rank], entries)
                break
            # All ranks see the same numbers, and drop the old blocks once the new ones are made.
            more = min(max(rows_W) * (SPARE + 1) // SPARE, self.world.size * max(most_tokens, room.tokens))
            self._room = self._made(max(most_tokens, room.tokens), max(more, room.rows), top_k)
        assert known is not None
        rows = known.rows
        own_WT = plan.row_WV[:, rank * room.tokens : rank * room.tokens + tokens]
        order, weights_RK = cut(order, rows * top_k, known.entries), plan.weights_VK[:rows]
        exchange = PeerExchange(self, rank_TK, own_WT, plan.row_WV[rank], known, weights_RK, order)
        return x_RD[:rows], exchange

    # ------------------------------------------------------------ the two ways of an exchange

    def turn(self) -> Block:
        """The one to write next: what is in it, all ranks have read."""
        self._room.blocks.reverse()
        return self._room.blocks[0]

    def results(self, count: int) -> Results:
        """Room for this many; to be shown before anything else is laid out."""
        block, rank = self.turn(), self.world.rank
        return Results(block, block.results.of_rank[rank][:count], block.numbers.of_rank[rank][:count])


@dataclass(frozen=True)
class PeerExchange:
    """Which rows went where, of one call."""

    peers: PeerTokens
    rank_TK: Tensor  # int32; who serves each choice of this rank's tokens
    row_WT: Tensor  # int32; the row of each token at each rank; -1 where it has none
    row_V: Tensor  # int32; the row here of every rank's tokens; -1 where they have none
    counts: PeerCounts
    weights_RK: Tensor  # float32; combine weights of the choices served here, elsewhere anything
    order: ExpertOrder  # of the choices served here, by their place among this rank's experts

    @property
    def place_RK(self) -> Tensor:
        return self.order.place_N.view(self.counts.rows, self.rank_TK.shape[1])

    def pull(self, d_y_TD: Tensor) -> Tensor:
        """Rows for tokens whose choices are known: (R, D). Collective."""
        world, block = self.peers.world, self.peers.turn()
        block.tokens.of_rank[world.rank][: d_y_TD.shape[0]].copy_(d_y_TD)
        out_RD = d_y_TD.new_empty(self.counts.rows, d_y_TD.shape[1])
        with world.exposed:
            block.memory.barrier()
            pull_rows(block.tokens, self.row_V, out_RD)
        return out_RD

    def results(self) -> Results:
        return self.peers.results(self.counts.rows)

    def summed(self, results: Results) -> Tensor:
        """Shows this rank's; what all ranks give back, summed for each token of this one in float32: (T, D). Collective."""
        with self.peers.world.exposed:
            results.block.memory.barrier()
            return sum_rows(results.block.results, self.rank_TK, self.row_WT)

    def picked(self, results: Results) -> Tensor:
        """The number of each choice, of results that have been shown: (T, K)."""
        return pick_numbers(results.block.numbers, self.rank_TK, self.row_WT)


def _padded(nbytes: int) -> int:
    return -(-nbytes // LANE_BYTES) * LANE_BYTES
