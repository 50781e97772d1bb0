"""Two levels give what one device gives, for any routing and in any chunks, and a token crosses to another node once.

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

from parallel.hooks import NONE, message_hooks
from parallel.placement import Topology
from parallel.schedule.pipeline import MOST_CHUNKS, Degrees
from parallel.token_exchange import Exchange, exchange
from parallel.topology import World
from parallel.two_level_exchange import rows_across, two_levels
from parallel.ways import Way
from tests.distributed.ranks import run_ranks

ROUNDING = [message_hooks(wanted, torch.float32) for wanted in ("bfloat16", "float8")]
HIDDEN, EACH = 8, 3  # numbers of a token, experts of a rank


@dataclass(frozen=True)
class Drawn:
    tokens_W: list[int]  # of each rank
    top_k: int
    favourites: int  # the fewer experts take part, the more choices of a token go the same way
    degrees: Degrees
    seed: int


drawn_cases = st.builds(
    Drawn,
    tokens_W=st.lists(st.one_of(st.just(0), st.integers(0, 20)), min_size=8, max_size=8),
    top_k=st.integers(1, 6),
    favourites=st.integers(6, 12),
    degrees=st.builds(Degrees, st.integers(1, MOST_CHUNKS), st.integers(1, MOST_CHUNKS)),
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


def factors_here(sent: Exchange, first: int) -> Tensor:
    """(R, K): of the choices served here, in the order in which rows are worked on; 0 of others."""
    place_RK = sent.order.place_N.view(sent.weights_RK.shape).long()
    expert_RK = first + torch.searchsorted(sent.order.ends_E.long(), place_RK.clamp(min=0), right=True)
    return torch.where(place_RK >= 0, factors(expert_RK), 0.0)


def there(way: Way, x_TD: Tensor) -> Tensor:
    """Chunk by chunk; rows as they arrive."""
    arrived = []
    for chunk in range(len(way)):
        rows = x_TD[way.legs[0].of_chunk(chunk)]
        for leg in way.legs:
            rows = leg.send(leg.pack(rows, chunk), chunk).wait()
        arrived.append(rows)
    return torch.cat(arrived)


def back(way: Way, y_RD: Tensor) -> Tensor:
    collected = []
    for chunk in range(len(way)):
        rows = y_RD[way.arrived(chunk)]
        for leg in reversed(way.legs):
            rows = leg.collect(leg.give_back(rows, chunk).wait(), chunk)
        collected.append(rows)
    return torch.cat(collected)


def through_nodes(world: World, cases: list[Drawn], ranks_per_node: int) -> list[dict[str, Any]]:
    world = replace(world, ranks_per_node=ranks_per_node)
    index_E = torch.full((EACH * world.size,), -1, dtype=torch.int32)
    first = EACH * world.rank
    index_E[first : first + EACH] = torch.arange(EACH, dtype=torch.int32)
    levels, found = two_levels(world, NONE), []
    rounding = [(hooks, tuple(replace(level, hooks=hooks) for level in levels)) for hooks in ROUNDING]
    for told in cases:
        x_TD, weights_TK, experts_TK = (part.detach() for part in inputs(told, world.rank, world.size))
        rank_TK = experts_TK.div(EACH, rounding_mode="floor").int()  # -1 stays
        sent = exchange(levels, weights_TK, experts_TK, rank_TK, index_E, EACH, told.degrees)
        factor_RK = factors_here(sent, first)
        scale_R1 = (factor_RK * sent.weights_RK).nan_to_num().sum(dim=1, keepdim=True)
        x_RD = there(sent.forward, x_TD)
        y_TD = back(sent.forward, x_RD * scale_R1[sent.forward.row_R])
        d_y_RD = there(sent.backward, -y_TD.sin())
        d_x_TD = back(sent.backward, d_y_RD * scale_R1[sent.backward.row_R])
        worked_RD = torch.empty_like(x_RD)
        worked_RD[sent.forward.row_R] = x_RD
        d_factor_R1 = (d_y_RD * worked_RD[sent.backward.row_R]).sum(dim=1, keepdim=True)
        d_weights_RK = d_factor_R1 * factor_RK[sent.backward.row_R]
        d_weights_TK = sent.collect_weights(sent.pass_weights_on(sent.return_weights(d_weights_RK)))
        for hooks, rounded in rounding:
            other = exchange(rounded, weights_TK, experts_TK, rank_TK, index_E, EACH, told.degrees)
            expected_RD = there(sent.forward, hooks.after_dispatch(hooks.before_dispatch(x_TD)))
            torch.testing.assert_close(there(other.forward, x_TD), expected_RD, rtol=1e-6, atol=0)  # on each leg, to the same
            torch.testing.assert_close(back(other.forward, x_RD), back(sent.forward, x_RD), rtol=2**-6, atol=2**-6)
        across, inside = sent.hops
        found.append(
            {
                "numbers": (y_TD, d_x_TD, d_weights_TK),
                "worked": worked_RD,
                "crossing": sum(across.splits.send_W) - across.splits.send_W[world.rank // ranks_per_node],
                "members": (len(across.splits.send_W), len(inside.splits.send_W)),
                "promised": rows_across(rank_TK, world.rank, world.topology),
            }
        )
        whole = exchange(levels, weights_TK, experts_TK, rank_TK, index_E, EACH, Degrees(1, 1))
        worked_RD = torch.empty_like(x_RD)
        worked_RD[whole.forward.row_R] = whole.forward.there(x_TD)
        assert torch.equal(worked_RD, found[-1]["worked"]), "the order of rows depends on the degrees"
        assert torch.equal(whole.order.entry_N, sent.order.entry_N)
    return found


@pytest.mark.parametrize(("size", "ranks_per_node"), [(4, 2), (8, 4), (8, 2)])
@settings(max_examples=2, deadline=None)
@given(cases=st.lists(drawn_cases, min_size=3, max_size=12))  # the first of the examples is the smallest
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
            assert found["members"] == (size // ranks_per_node, ranks_per_node), "each level has its own ranks"


@given(st.integers(0, 30), st.integers(1, 6), st.sampled_from([(4, 2), (8, 2), (8, 4), (12, 3)]), st.integers(0, 99))
def test_rows_across_count_each_rank_and_each_node_once(tokens: int, top_k: int, shape: tuple[int, int], seed: int) -> None:
    topology = Topology(*shape)
    rank_TK = torch.randint(-1, topology.devices, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    for rank in range(topology.devices):
        own = topology.node_of(rank)
        ranks = [{int(r) for r in row if r >= 0 and topology.node_of(int(r)) != own} for row in rank_TK]
        nodes = [{topology.node_of(r) for r in row} for row in ranks]
        assert rows_across(rank_TK, rank, topology) == (sum(map(len, ranks)), sum(map(len, nodes)))
