"""Experts spread over ranks compute what experts on one device compute: outputs and every gradient.

Rank r gives a loss of its own; the sum of all losses is what one device differentiates. Cases include ranks without tokens,
experts without tokens, and all tokens on one expert.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.router import Routing, route
from parallel.moe_layer import LocalExperts, ParallelExperts, received_experts
from parallel.token_exchange import ExchangePlan
from parallel.topology import World
from tests.distributed.ranks import run_ranks

D, F, E, K = 8, 6, 8, 2
CASES = 12


def case(seed: int, size: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """(tokens of each rank, router logits of each rank, gate_up, down)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 20, (size,), generator=generator).tolist()
    if seed % 3 == 0:
        tokens[seed % size] = 0
    x = [torch.randn(t, D, generator=generator) for t in tokens]
    logits = [torch.randn(t, E, generator=generator) * 2 for t in tokens]
    if seed % 4 == 1:  # all tokens want the same two experts
        logits = [torch.zeros(t, E).index_fill(1, torch.tensor([3, 6]), 9.0) for t in tokens]
    gate_up = torch.randn(E, 2 * F, D, generator=generator)
    return x, logits, gate_up, torch.randn(E, D, F, generator=generator)


def routed(logits_TE: Tensor) -> Routing:
    return route(logits_TE, top_k=K, scores="softmax", renormalize=True, scale=1.0, bias_E=None, valid_T=None)


def gradients(
    x: Tensor, logits: Tensor, experts: LocalExperts | ParallelExperts, weights: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """The output, and the gradients of sum(cos(output)) for tokens, logits and both weights."""
    x, logits = x.clone().requires_grad_(), logits.clone().requires_grad_()
    y = experts(x, routed(logits))
    y.cos().sum().backward()
    found = [y, x.grad, logits.grad, *(w.grad for w in weights)]
    assert all(t is not None for t in found), "a tensor got no gradient at all; it should get zeros"
    return [t.detach() for t in found if t is not None]


def spread(world: World) -> list[list[Tensor]]:
    results = []
    for seed in range(CASES):
        x, logits, gate_up, down = case(seed, world.size)
        share = E // world.size
        own = slice(world.rank * share, (world.rank + 1) * share)
        weights = (gate_up[own].clone().requires_grad_(), down[own].clone().requires_grad_())
        experts = ParallelExperts(*weights, world)
        results.append(gradients(x[world.rank], logits[world.rank], experts, weights))
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_spread_experts_equal_local_experts(size: int) -> None:
    by_rank = run_ranks(spread, size)
    for seed in range(CASES):
        x, logits, gate_up, down = case(seed, size)
        weights = (gate_up.requires_grad_(), down.requires_grad_())
        expected = gradients(torch.cat(x), torch.cat(logits), LocalExperts(*weights), weights)
        for part, name in enumerate(["output", "tokens", "logits", "gate_up", "down"]):
            found = torch.cat([results[seed][part] for results in by_rank])
            where = f"case {seed}, {name}"
            torch.testing.assert_close(found, expected[part], rtol=1e-5, atol=1e-5, msg=lambda text, at=where: f"{at}: {text}")


def test_received_rows_know_their_expert() -> None:
    # two ranks sent (1, 0, 2) and (2, 1, 0) rows for the three experts here
    plan = ExchangePlan(send_W=[], receive_W=[3, 3], received_counts_WE=torch.tensor([[1, 0, 2], [2, 1, 0]]))
    assert received_experts(plan).flatten().tolist() == [0, 2, 2, 0, 0, 1]
