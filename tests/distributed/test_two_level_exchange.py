"""Two hops give what one device gives, for any routing, and a token crosses to another node once.

Experts multiply a token by a number each, so that what arrives where with which weight is all that counts; what whole layers
give over two levels is in test_moe_layer.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.peer_exchange import Received
from parallel.placement import Topology
from parallel.topology import World
from parallel.two_level_exchange import TwoLevelTokens, rows_across
from tests.distributed.ranks import run_ranks

HIDDEN, EACH = 8, 3  # numbers of a token, experts of a rank


@dataclass(frozen=True)
class Drawn:
    tokens_W: list[int]  # of each rank
    top_k: int
    favourites: int  # the fewer experts take part, the more choices of a token go the same way
    seed: int


drawn_cases = st.builds(
    Drawn,
    tokens_W=st.lists(st.one_of(st.just(0), st.integers(0, 20)), min_size=8, max_size=8),
    top_k=st.integers(1, 6),
    favourites=st.integers(6, 12),
    seed=st.integers(0, 2**31),
)


def inputs(told: Drawn, rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_TD, weights_TK, experts_TK) of a rank, as leaves."""
    generator = torch.Generator().manual_seed(told.seed + rank)
    tokens, experts = told.tokens_W[rank], EACH * size
    among = torch.randperm(experts, generator=torch.Generator().manual_seed(told.seed))[: told.favourites]
    scores = torch.rand(tokens, len(among), generator=generator)
    experts_TK = among[scores.argsort(dim=1)[:, : told.top_k]]
    experts_TK[scores[:, : told.top_k] < 0.1] = -1  # absent
    x_TD = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    return x_TD, torch.rand(tokens, told.top_k, generator=generator).requires_grad_(), experts_TK


def factors(experts: Tensor) -> Tensor:
    return 1 + experts.float() / 7


def served(received: Received, first: int) -> Tensor:
    """The rows times the factors and weights of the choices served here."""
    place_RK = received.order.place_N.view(received.weights_RK.shape).long()
    expert_RK = first + torch.searchsorted(received.order.ends_E.long(), place_RK.clamp(min=0), right=True)
    weight_RK = torch.where(place_RK >= 0, received.weights_RK * factors(expert_RK), 0.0)
    return received.x_RD * weight_RK.sum(dim=1, keepdim=True)


def through_nodes(world: World, cases: list[Drawn], ranks_per_node: int) -> list[dict[str, Any]]:
    world = replace(world, ranks_per_node=ranks_per_node)
    index_E = torch.full((EACH * world.size,), -1, dtype=torch.int32)
    first = EACH * world.rank
    index_E[first : first + EACH] = torch.arange(EACH, dtype=torch.int32)
    tokens, found = TwoLevelTokens(world), []
    for told in cases:
        x_TD, weights_TK, experts_TK = inputs(told, world.rank, world.size)
        rank_TK = experts_TK.div(EACH, rounding_mode="floor").int()  # -1 stays
        received, exchange = tokens.dispatch(x_TD, weights_TK, experts_TK, rank_TK, index_E, EACH)
        y_TD = exchange.collect(served(received, first))
        y_TD.cos().sum().backward()
        node = slice(world.rank // ranks_per_node * ranks_per_node, (world.rank // ranks_per_node + 1) * ranks_per_node)
        send_W, inside_W = exchange.across.send_W, exchange.inside.send_W
        found.append(
            {
                "numbers": (y_TD.detach(), x_TD.grad, weights_TK.grad),
                "crossing": sum(send_W) - sum(send_W[node]),
                "same place": all(rows == 0 or (to - world.rank) % ranks_per_node == 0 for to, rows in enumerate(send_W)),
                "stays": sum(inside_W) == sum(inside_W[node]),
                "promised": rows_across(rank_TK, world.rank, world.topology),
            }
        )
    return found


@pytest.mark.parametrize(("size", "ranks_per_node"), [(4, 2), (8, 4), (8, 2)])
@settings(max_examples=2, deadline=None)
@given(cases=st.lists(drawn_cases, min_size=12, max_size=12))
def test_any_routing_gives_what_one_device_gives_and_crosses_once(size: int, ranks_per_node: int, cases: list[Drawn]) -> None:
    by_rank = run_ranks(through_nodes, size, cases, ranks_per_node)
    for number, told in enumerate(cases):
        for rank, results in enumerate(by_rank):
            found = results[number]
            x_TD, weights_TK, experts_TK = inputs(told, rank, size)
            y_TD = x_TD * torch.where(experts_TK >= 0, weights_TK * factors(experts_TK), 0.0).sum(dim=1, keepdim=True)
            y_TD.cos().sum().backward()
            for one, other in zip(found["numbers"], (y_TD.detach(), x_TD.grad, weights_TK.grad), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            nodes = [{int(expert) // EACH // ranks_per_node for expert in row if expert >= 0} for row in experts_TK]
            crossing = sum(len(there - {rank // ranks_per_node}) for there in nodes)
            assert found["crossing"] == crossing, "a token crosses once to each other node that serves it"
            assert found["promised"][1] == crossing
            assert found["same place"] and found["stays"]


@given(st.integers(0, 30), st.integers(1, 6), st.sampled_from([(4, 2), (8, 2), (8, 4), (12, 3)]), st.integers(0, 99))
def test_rows_across_count_each_rank_and_each_node_once(tokens: int, top_k: int, shape: tuple[int, int], seed: int) -> None:
    topology = Topology(*shape)
    rank_TK = torch.randint(-1, topology.devices, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    for rank in range(topology.devices):
        own = topology.node_of(rank)
        ranks = [{int(r) for r in row if r >= 0 and topology.node_of(int(r)) != own} for row in rank_TK]
        nodes = [{topology.node_of(r) for r in row} for row in ranks]
        assert rows_across(rank_TK, rank, topology) == (sum(map(len, ranks)), sum(map(len, nodes)))
