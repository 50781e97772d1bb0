"""Gradients of the experts' matrices that leave autograd: the caller gets them whatever autograd sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.expert_mlp import expert_mlp
from kernels.expert_order import expert_order
from tests.kernels.test_expert_mlp import Case, different_experts, gpu, needs_hopper, without


def check_the_caller_gets_gradients_once(device: str, dtype: torch.dtype, tokens: int, weighted: bool) -> None:
    """Even where autograd sees nothing that needs one; without tokens they are zeros."""
    case = Case.draw(different_experts(tokens, 4, 2, 0), 4, size=128, hidden=64).to(device, dtype)
    absent_TK = torch.zeros_like(case.experts_TK, dtype=torch.bool)
    absent_TK[1::3, 0] = True
    case = without(case, absent_TK)
    order = expert_order(case.experts_TK, 4, num_entries=int((~absent_TK).sum()))
    weights = case.weights_TK if weighted else None
    matrices = [case.gate_up_ECD.requires_grad_(), case.down_EDF.requires_grad_()]
    y = expert_mlp(case.x_TD, order, weights, *matrices)
    expected = torch.autograd.grad(y.sum(), matrices)
    arena = [matrix.detach() for matrix in matrices]
    found: list[tuple[Tensor, Tensor]] = []

    def experts(x_TD: Tensor) -> Tensor:
        return expert_mlp(x_TD, order, weights, *arena, gradients=lambda *parts: found.append(parts))

    for step, recompute in enumerate((False, True)):
        ours = checkpoint(experts, case.x_TD, use_reentrant=False) if recompute else experts(case.x_TD)
        assert torch.equal(ours, y) and len(found) == step
        ours.sum().backward()
        assert len(found) == step + 1
        for grad, wanted in zip(found[-1], expected, strict=True):
            assert torch.equal(grad, wanted) and bool(grad.any()) == (tokens > 0)
    with torch.no_grad():
        assert not experts(case.x_TD).requires_grad


@pytest.mark.parametrize("tokens", [0, 50])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_caller_gets_gradients_once_whatever_else_needs_one(tokens: int, weighted: bool) -> None:
    check_the_caller_gets_gradients_once("cpu", torch.float32, tokens, weighted)


@gpu
@needs_hopper
@pytest.mark.parametrize("tokens", [0, 50])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernels_give_the_caller_gradients_once_whatever_else_needs_one(tokens: int, weighted: bool) -> None:
    check_the_caller_gets_gradients_once("cuda", torch.bfloat16, tokens, weighted)
