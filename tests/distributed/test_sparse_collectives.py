"""Sparse collectives on gloo ranks: copies arrive bit for bit, gradients come home as sums that do not depend on timing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel.placement import Placement
from parallel.sparse_collectives import SparseAllGather, SparseReduceScatter, gather_plan
from parallel.topology import World
from tests.distributed.ranks import run_cases

EXPERTS, CASES = 6, 10


def placement(seed: int, size: int) -> tuple[Placement, int]:
    """Sometimes no copies at all, sometimes everything everywhere; a number of ranks on each node."""
    random = np.random.default_rng(seed)
    owner_E = random.integers(0, size, EXPERTS)
    copies_ED = random.random((EXPERTS, size)) < seed % 5 / 4
    copies_ED[np.arange(EXPERTS), owner_E] = True
    return Placement(owner_E, copies_ED), int(random.choice([n for n in (1, 2, 4, 8) if size % n == 0]))


def expert(index: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + index)
    return torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)


def gradient(index: int, rank: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up, down = expert(index, 7 + seed * 64 + rank)
    return gate_up.to(dtype), down.to(dtype)


def gather_and_reduce(world: World, dtype: torch.dtype) -> list[tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]]:
    found = []
    for seed in range(CASES):
        planned, ranks_per_node = placement(seed, world.size)
        plan = gather_plan(planned, replace(world, ranks_per_node=ranks_per_node).topology, world.rank)
        here = np.flatnonzero(planned.copies_ED[:, world.rank]).tolist()
        weights = {e: [torch.full_like(part, torch.nan) for part in expert(e, seed)] for e in here}
        for e in here:
            if planned.owner_E[e] == world.rank:
                weights[e] = list(expert(e, seed))
        SparseAllGather(plan, lambda e, weights=weights: tuple(weights[e])).finish()
        gradients = {e: gradient(e, world.rank, seed, dtype) for e in here}
        sums = {e: [part.float() for part in gradients[e]] for e in here if planned.owner_E[e] == world.rank}
        for e, parts in SparseReduceScatter(plan, lambda e, gradients=gradients: gradients[e]).finish():
            for total, (part,) in zip(sums[e], parts, strict=True):
                total += part
        found.append((weights, sums))
    return found


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (4, torch.bfloat16), (8, torch.float32)])
def test_copies_are_exact_and_gradients_are_sums(size: int, dtype: torch.dtype) -> None:
    by_rank, again = run_cases(gather_and_reduce, size, [(dtype,), (dtype,)])
    for seed in range(CASES):
        planned, _ = placement(seed, size)
        summed = set()
        for rank in range(size):
            weights, sums = by_rank[rank][seed]
            assert sorted(weights) == np.flatnonzero(planned.copies_ED[:, rank]).tolist()
            for e, parts in weights.items():
                assert all(torch.equal(*pair) for pair in zip(parts, expert(e, seed), strict=True)), f"expert {e} on {rank}"
            for e, parts in sums.items():
                summed.add(e)
                holders = np.flatnonzero(planned.copies_ED[e]).tolist()
                for index, part in enumerate(parts):
                    wanted = sum(gradient(e, holder, seed, dtype)[index].double() for holder in holders)
                    torch.testing.assert_close(part.double(), wanted, rtol=1e-6, atol=1e-6)
                    assert torch.equal(part, again[rank][seed][1][e][index]), "the sum changed from one run to the next"
        assert summed == set(range(EXPERTS))
