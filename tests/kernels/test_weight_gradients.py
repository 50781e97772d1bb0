"""Gradients of the experts' matrices that leave autograd: the caller gets them whatever autograd sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.accumulate import Sum
from kernels.expert_mlp import expert_mlp
from kernels.expert_order import expert_order
from tests.kernels.test_expert_mlp import Case, different_experts, gpu, needs_hopper, relative, without


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


@gpu
@needs_hopper
@pytest.mark.parametrize(("size", "hidden"), [(128, 64), (320, 96), (512, 768)])
@pytest.mark.parametrize("summed", [1, 4, 6])
def test_kernels_add_gradients_of_the_first_experts_in_float32(size: int, hidden: int, summed: int) -> None:
    case = Case.draw(different_experts(700, 6, 2, 3), 6, size=size, hidden=hidden).to("cuda", torch.bfloat16)
    order = expert_order(case.experts_TK, 6)
    arena = case.gate_up_ECD.detach(), case.down_EDF.detach()
    found: list[tuple[Tensor, Tensor]] = []
    totals = [torch.full((summed, *part.shape[1:]), torch.nan, device="cuda") for part in arena]

    def gradients(sums: tuple[Sum, Sum] | None) -> tuple[Tensor, Tensor]:
        y_TD = expert_mlp(
            case.x_TD.detach(), order, case.weights_TK.detach(), *arena,
            gradients=lambda *parts: found.append(parts), sums=lambda: sums,
        )  # fmt: skip
        y_TD.backward(torch.ones_like(y_TD))
        return found.pop()

    rounded = gradients(None)
    for times in (1, 2, 3):
        others = gradients(tuple(Sum(total, fresh=times == 1) for total in totals))
        for total, other, whole in zip(totals, others, rounded, strict=True):
            assert torch.equal(other, whole[summed:]), "of experts behind those that are summed"
            exact = total / times  # of float32 products, which bfloat16 rounds
            torch.testing.assert_close(exact.bfloat16(), whole[:summed], rtol=2**-7, atol=1e-6)
            assert relative(exact, whole[:summed]) > 2**-11, "no float32 is told from bfloat16"
