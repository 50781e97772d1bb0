"""The token exchange over nodes of several ranks: a token crosses to another node once, and is spread inside it.

A hop takes a token to a rank once, with the choices that go there and their combine weights, and brings one row of results
back. The first hop goes to the rank of the same place in each node that serves any of a token's choices, so what goes between
nodes is a row a node, whatever K (as in DeepSeek-V3, arXiv 2412.19437, section 3.2.2). The second goes on to the ranks of that
node. Results are summed inside the node, in float32 and rounded to their dtype, before one row crosses back, and gradients
likewise: so numbers differ from those of token_exchange.py by the order of sums. All ranks call everything here together; both
hops are messages of the one process group, in which nothing goes to ranks that a hop does not reach.

Letters: T tokens of this rank, K top-k, N = T * K, S rows sent, R rows received, D model, E experts, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.errors import UserError
from kernels.expert_order import expert_order
from kernels.rows import combine_rows, spread_rows
from parallel.peer_exchange import Received
from parallel.placement import Topology
from parallel.topology import World


@dataclass(frozen=True)
class Hop:
    """Which row goes where. The way back, and backward, walk it in the other direction."""

    world: World
    place_N: Tensor  # int32: the sent row of a choice, if it is its token's first for that rank; else -1
    token_S: Tensor  # int64: the token of each sent row; rows are sorted by rank, then by token
    here_SK: Tensor  # bool: which choices of its token go with a row
    send_W: list[int]  # rows to each rank
    receive_W: list[int]  # rows from each rank
    entries: int  # choices that come with all rows received

    def messages(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """(S, ..) -> (R, ..), or back."""
        send_W, receive_W = (self.receive_W, self.send_W) if back else (self.send_W, self.receive_W)
        received = rows.new_empty(sum(receive_W), *rows.shape[1:])
        rows = rows.contiguous()
        with self.world.exposed:
            dist.all_to_all_single(received, rows, receive_W, send_W)
        return received

    def send(self, x_TD: Tensor) -> Tensor:
        rows_SD = x_TD.new_empty(len(self.token_S), x_TD.shape[1])
        spread_rows(x_TD.contiguous(), self.place_N, self.here_SK.shape[1], rows_SD)
        return self.messages(rows_SD)

    def bring_back(self, rows_RD: Tensor) -> Tensor:
        """The sum of each token's rows, (R, D) -> (T, D)."""
        return combine_rows(self.messages(rows_RD, back=True), self.place_N, self.here_SK.shape[1])


@dataclass(frozen=True)
class TwoLevelExchange:
    across: Hop
    inside: Hop

    def collect(self, y_RD: Tensor) -> Tensor:
        """As peer_exchange.PeerExchange.collect."""
        for hop in (self.inside, self.across):
            y_RD = _BringBack.apply(y_RD, hop)
        return y_RD


class TwoLevelTokens:
    """One rank's end."""

    def __init__(self, world: World) -> None:
        self.world = world

    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, rank_TK: Tensor, index_E: Tensor, num_here: int
    ) -> tuple[Received, TwoLevelExchange]:
        """As peer_exchange.PeerTokens.dispatch; rows that came to this rank are sorted by the rank of its node that passed them
        on, there by node, then by token. A wait for the device in each hop."""
        rank_TK = rank_TK.long()
        across = _hop(_relays(rank_TK, self.world.rank, self.world.topology), self.world)
        x_RD, weights_RK, experts_RK, rank_RK = _take(x_TD, weights_TK.float(), experts_TK, rank_TK, across)
        inside = _hop(rank_RK.long(), self.world)
        x_RD, weights_RK, experts_RK, _ = _take(x_RD, weights_RK, experts_RK, rank_RK, inside)
        slots_RK = torch.where(experts_RK >= 0, index_E[experts_RK.clamp(min=0).long()], -1)
        order = expert_order(slots_RK, num_here, num_entries=inside.entries)
        return Received(x_RD, weights_RK, order), TwoLevelExchange(across, inside)


def has_two_levels(topology: Topology) -> bool:
    """Whether there are several nodes with several ranks each."""
    return topology.nodes > 1 and topology.devices_per_node > 1


def check_two_levels(topology: Topology) -> None:
    """Raises UserError where one of the levels has nothing to carry."""
    if not has_two_levels(topology):
        nodes = f"{topology.nodes} node{'s' * (topology.nodes > 1)}"
        raise UserError(
            f"transport=two_level, but {topology.devices} ranks on {nodes} of {topology.devices_per_node} leave one level "
            "only: there have to be several nodes with several ranks each; set transport=auto"
        )


def rows_across(rank_TK: Tensor, rank: int, topology: Topology) -> tuple[int, int]:
    """How many rows of `rank`'s tokens go to other nodes: (one for each rank there that serves a token, one for each node)."""
    tokens, size = rank_TK.shape[0], topology.devices_per_node
    served_TW = torch.zeros(tokens, topology.devices + 1, dtype=torch.bool, device=rank_TK.device)
    served_TW = served_TW.scatter_(1, rank_TK.long() + 1, True)[:, 1:]  # before it what is absent, -1
    served_TW[:, rank // size * size : (rank // size + 1) * size] = False
    return int(served_TW.sum()), int(served_TW.unflatten(1, (-1, size)).any(dim=2).sum())


def _relays(rank_TK: Tensor, rank: int, topology: Topology) -> Tensor:
    """Of each choice, the rank that stands in the serving rank's node where `rank` stands in its own."""
    size = topology.devices_per_node
    return torch.where(rank_TK >= 0, rank_TK // size * size + rank % size, -1)


def _hop(target_TK: Tensor, world: World) -> Hop:
    """To `target_TK` (int64), -1 for choices that go nowhere. One message of two numbers to every rank, and one wait."""
    top_k = target_TK.shape[1]
    same_TKK = target_TK.unsqueeze(2) == target_TK.unsqueeze(1)
    first_TK = same_TKK.int().argmax(dim=2)  # the first choice with the same target
    leads_TK = first_TK == torch.arange(top_k, device=target_TK.device)
    leaders_TK = torch.where(leads_TK, target_TK, -1)
    counts_W2 = torch.stack([_count(leaders_TK, world.size), _count(target_TK, world.size)], dim=1)
    received_W2 = torch.empty_like(counts_W2)
    with world.exposed:
        dist.all_to_all_single(received_W2, counts_W2)
    send_W, receive_W, entries_W = torch.stack([counts_W2[:, 0], received_W2[:, 0], received_W2[:, 1]]).tolist()
    order = expert_order(leaders_TK, world.size, num_entries=sum(send_W))
    entry_S = order.entry_N.long()
    token_S = entry_S // max(top_k, 1)
    here_SK = target_TK[token_S] == target_TK.flatten()[entry_S].unsqueeze(1)
    return Hop(world, order.place_N, token_S, here_SK, send_W, receive_W, sum(entries_W))


def _count(target_TK: Tensor, ranks: int) -> Tensor:
    target_N = torch.where(target_TK >= 0, target_TK, ranks).flatten()
    counts = torch.zeros(ranks + 1, dtype=torch.int64, device=target_N.device)
    return counts.scatter_add_(0, target_N, torch.ones_like(target_N))[:ranks]


def _take(
    x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, rank_TK: Tensor, hop: Hop
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_RD, weights_RK, experts_RK, rank_RK) behind a hop; experts and ranks are int32, and -1 for choices that went
    elsewhere, whose weights are 0. Differentiable in tokens and weights."""
    experts_SK, rank_SK = (torch.where(hop.here_SK, part[hop.token_S], -1).int() for part in (experts_TK, rank_TK))
    weights_SK = torch.where(hop.here_SK, weights_TK.detach()[hop.token_S], 0.0)
    told_SM = torch.cat([experts_SK, rank_SK, weights_SK.view(torch.int32)], dim=1)
    experts_RK, rank_RK, bits_RK = hop.messages(told_SM).chunk(3, dim=1)
    x_RD, weights_RK = _Send.apply(x_TD, weights_TK, bits_RK.contiguous().view(torch.float32), hop)
    return x_RD, weights_RK, experts_RK, rank_RK


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, weights_RK: Tensor, hop: Hop) -> tuple[Tensor, Tensor]:
        """The weights are here already; what goes through here is who gets their gradients."""
        ctx.hop, ctx.tokens = hop, x_TD.shape[0]
        return hop.send(x_TD), weights_RK.view_as(weights_RK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x_RD: Tensor, d_weights_RK: Tensor) -> tuple[Tensor | None, ...]:
        hop: Hop = ctx.hop
        d_weights_SK = torch.where(hop.here_SK, hop.messages(d_weights_RK, back=True), 0.0)
        d_weights_TK = d_weights_SK.new_zeros(ctx.tokens, d_weights_SK.shape[1])
        d_weights_TK.index_add_(0, hop.token_S, d_weights_SK)  # of a choice one row has it, the others add 0
        return hop.bring_back(d_x_RD), d_weights_TK, None, None


class _BringBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, hop: Hop) -> Tensor:
        ctx.hop = hop
        return hop.bring_back(y_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.hop.send(d_y_TD), None
