"""Layers in chunks over NCCL, over one level and two, and whole in memory that all ranks read, with the bfloat16 kernels: the
same bits at any degrees, and what one device computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.router import Routing
from parallel.expert_arena import ExpertArena, ExpertShape
from parallel.flows import Plan, shares
from parallel.hooks import MessageDtype, message_hooks
from parallel.moe_layer import LocalExperts, ShardedExperts
from parallel.placement import Placement, TransportKind, even_owners
from parallel.schedule.pipeline import OFF, WHOLE, Degrees
from parallel.topology import World
from tests.distributed.ranks import run_ranks
from tests.gpu.needs import gpus, hopper, linked

pytestmark = [pytest.mark.gpu, gpus(2), hopper()]
SHAPE = ExpertShape(layers=1, experts=8, hidden=256, expert_hidden=96)
K = 3
TOKENS = (1000, 37, 0, 611)  # of each rank
DEGREES = [WHOLE, OFF, Degrees(4, 2), Degrees(3, 16), Degrees(16, 5)]
CALLS = 4  # of each layer: in place the first finds no room, and blocks take turns


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def matrices() -> tuple[Tensor, Tensor]:
    return numbers(8, 192, 256, seed=1) / 16, numbers(8, 256, 96, seed=2) / 8


def inputs(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices and combine weights; half of the tokens want the same experts."""
    generator = torch.Generator().manual_seed(rank)
    experts_TK = torch.rand(TOKENS[rank], SHAPE.experts, generator=generator).topk(K).indices
    experts_TK[::2] = torch.tensor([5, 0, 2])
    return numbers(TOKENS[rank], SHAPE.hidden, seed=10 + rank), experts_TK, torch.rand(TOKENS[rank], K, generator=generator)


def layer(world: World, kind: TransportKind, message_dtype: MessageDtype) -> list[dict[str, Any]]:
    """What each call gives, and the sums of gradients. Two nodes have two levels, of one rank each as well as of more."""
    world, owned = replace(world, ranks_per_node=world.size // 2), SHAPE.experts // world.size
    owner_E = even_owners(SHAPE.experts, world.size)
    copies_ED = owner_E[:, None] == np.arange(world.size)
    copies_ED[5] = True
    plan = Plan(Placement(owner_E, copies_ED))
    found = []
    for degrees in DEGREES:
        sums = SHAPE.matrices(owned, torch.float32, world.device)
        for part in sums:
            part.zero_()

        def add(row: int, gradients: tuple[Tensor, ...], sums: tuple[Tensor, ...] = sums) -> None:
            for total, gradient in zip(sums, gradients, strict=True):
                total[row : row + gradient.shape[0]] += gradient

        arena = ExpertArena(SHAPE, owned, 4, world, torch.bfloat16, add, kind, message_hooks(message_dtype, torch.bfloat16))
        for rows, part in zip(arena.rows, matrices(), strict=True):
            rows[:owned].copy_(part[torch.from_numpy(owner_E == world.rank)])
        arena.place([plan.placement], [shares(plan, world.topology, world.rank)])
        parts: list[Tensor] = []
        for call in range(CALLS):
            arena.outdated()
            parts += one_call(
                ShardedExperts(0, arena, degrees=degrees), *(part[call:].to(world.device) for part in inputs(world.rank))
            )
        found.append({"parts": [part.cpu() for part in (*parts, *sums)], "owned": np.flatnonzero(owner_E == world.rank)})
    return found


def one_call(experts: ShardedExperts, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> list[Tensor]:
    """y_TD and the gradients of tokens and weights."""
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    experts.prepare()
    y_TD = experts(x_TD, Routing(experts_TK, weights_TK, experts_TK.flatten().bincount(minlength=SHAPE.experts)))
    with experts.arena.backward_pass():
        y_TD.float().square().sum().backward()
    assert x_TD.grad is not None and weights_TK.grad is not None
    return [y_TD.detach(), x_TD.grad, weights_TK.grad]


@pytest.mark.parametrize(
    ("size", "kind", "message_dtype"),
    [
        (2, "messages", "auto"),
        (2, "two_level", "auto"),
        pytest.param(2, "peer_memory", "auto", marks=linked(2)),
        (2, "messages", "float8"),
        (2, "two_level", "float8"),
        pytest.param(4, "two_level", "auto", marks=gpus(4)),
    ],
)
def test_no_number_depends_on_the_degrees_and_all_are_those_of_one_device(
    size: int, kind: TransportKind, message_dtype: MessageDtype
) -> None:
    by_rank = run_ranks(layer, size, kind, message_dtype, kind="cuda")
    near = 2e-2 if message_dtype == "auto" else 8e-2
    for whole, *cut in by_rank:
        for one in cut:
            for found, wanted in zip(one["parts"], whole["parts"], strict=True):
                assert torch.equal(found, wanted)
    weights = [part.double().requires_grad_() for part in matrices()]
    for rank in range(size):
        for call in range(CALLS):
            x_TD, experts_TK, weights_TK = (part[call:] for part in inputs(rank))
            given = [x_TD.double().requires_grad_(), weights_TK.double().requires_grad_()]
            counts_E = experts_TK.flatten().bincount(minlength=SHAPE.experts)
            y_TD = LocalExperts(*weights)(given[0], Routing(experts_TK, given[1], counts_E))
            y_TD.square().sum().backward()
            parts = by_rank[rank][0]["parts"][3 * call : 3 * call + 3]
            for found, wanted in zip(parts, [y_TD.detach(), *(part.grad for part in given)], strict=True):
                assert wanted is not None and (found - wanted).norm() <= near * wanted.norm()
    for rank in range(size):
        for found, part in zip(by_rank[rank][0]["parts"][3 * CALLS :], weights, strict=True):
            assert part.grad is not None
            wanted = part.grad[by_rank[rank][0]["owned"]]
            assert (found - wanted).norm() <= near * wanted.norm()


@linked(2)
def test_what_is_read_in_place_has_the_bits_of_messages() -> None:
    """Own gradients and those of copies are added in another order; all else is alike."""
    of_kind = [run_ranks(layer, 2, kind, "auto", kind="cuda") for kind in ("peer_memory", "messages")]
    for in_place, sent in zip(*of_kind, strict=True):
        *pairs, gate_up, down = zip(in_place[0]["parts"], sent[0]["parts"], strict=True)
        for found, wanted in pairs:
            assert torch.equal(found, wanted)
        for found, wanted in (gate_up, down):
            assert (found - wanted).norm() <= 1e-3 * wanted.norm()
