"""The router against a reference that goes through the tokens one by one."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.router import route

Scores = Literal["softmax", "sigmoid"]


def reference(
    logits_TE: Tensor, top_k: int, scores: str, renormalize: bool, scale: float, bias_E: Tensor | None
) -> tuple[list[list[int]], list[list[float]]]:
    experts, weights = [], []
    for logits in logits_TE:
        score = logits.softmax(0) if scores == "softmax" else logits.sigmoid()
        biased = score if bias_E is None else score + bias_E
        chosen = sorted(range(len(logits)), key=lambda e: (-biased[e].item(), e))[:top_k]
        weight = [score[e].item() for e in chosen]
        total = sum(weight) if renormalize else 1.0
        experts.append(chosen)
        weights.append([scale * w / total for w in weight])
    return experts, weights


@given(
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 100),
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_route_equals_the_reference(
    tokens: int, experts: int, seed: int, scores: Scores, renormalize: bool, biased: bool, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, dtype=torch.float64, generator=generator)
    bias = torch.randn(experts, generator=generator) if biased else None
    valid = torch.rand(tokens, generator=generator) < 0.7
    routing = route(
        logits,
        top_k=top_k,
        scores=scores,
        renormalize=renormalize,
        scale=2.5,
        bias_E=bias,
        valid_T=valid,
    )
    expected_experts, expected_weights = reference(logits, top_k, scores, renormalize, 2.5, bias)
    assert routing.experts_TK.tolist() == expected_experts
    torch.testing.assert_close(routing.weights_TK, torch.tensor(expected_weights, dtype=torch.float64))
    counted = routing.experts_TK[valid].flatten().bincount(minlength=experts)
    assert routing.counts_E.tolist() == counted.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_are_float32_and_ties_go_to_the_lower_expert(dtype: torch.dtype) -> None:
    routing = route(
        torch.zeros(3, 5, dtype=dtype), top_k=2, scores="softmax", renormalize=False, scale=1.0, bias_E=None, valid_T=None
    )
    assert routing.experts_TK.tolist() == [[0, 1]] * 3
    assert routing.weights_TK.dtype == torch.float32
    torch.testing.assert_close(routing.weights_TK, torch.full((3, 2), 0.2))
    assert routing.counts_E.tolist() == [3, 3, 0, 0, 0]


def test_the_bias_moves_the_selection_but_not_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    routing = route(
        logits, top_k=1, scores="sigmoid", renormalize=False, scale=1.0, bias_E=torch.tensor([0.0, 0.0, 9.0]), valid_T=None
    )
    assert routing.experts_TK.tolist() == [[2]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.5]]))


def test_underflowing_scores_give_finite_weights() -> None:
    logits = torch.full((1, 3), -1000.0, requires_grad=True)
    routing = route(logits, top_k=2, scores="sigmoid", renormalize=True, scale=1.0, bias_E=None, valid_T=None)
    routing.weights_TK.sum().backward()
    assert routing.weights_TK.isfinite().all()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_are_differentiable(scores: Scores, renormalize: bool) -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def weights(logits_TE: Tensor) -> Tensor:
        return route(
            logits_TE,
            top_k=3,
            scores=scores,
            renormalize=renormalize,
            scale=1.5,
            bias_E=torch.randn(6) * 0,
            valid_T=None,
        ).weights_TK

    assert torch.autograd.gradcheck(weights, (logits,))


def test_no_tokens() -> None:
    routing = route(torch.zeros(0, 4), top_k=2, scores="softmax", renormalize=True, scale=1.0, bias_E=None, valid_T=None)
    assert routing.experts_TK.shape == routing.weights_TK.shape == (0, 2)
    assert routing.counts_E.tolist() == [0, 0, 0, 0]
