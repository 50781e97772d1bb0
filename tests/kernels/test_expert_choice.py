"""Experts choose tokens by the definition, whatever is padding; and gradients are those of differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.errors import UserError
from kernels.expert_choice import choose_tokens
from kernels.expert_mlp import expert_mlp
from kernels.expert_order import expert_order


def drawn(tokens: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """(logits with ties, which tokens are valid)."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randint(-4, 5, (tokens, experts), generator=generator) / 3 + 0.0
    return logits_TE.double(), torch.rand(tokens, generator=generator) < (0.7 if seed % 2 else 1.0)


@given(st.integers(0, 14), st.integers(1, 7), st.integers(0, 999), st.booleans(), st.data())
def test_each_expert_takes_its_best_tokens(
    tokens: int, experts: int, seed: int, renormalize: bool, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    most = data.draw(st.integers(top_k, experts))
    logits_TE, valid_T = drawn(tokens, experts, seed)
    options = {"scores": "softmax", "renormalize": renormalize, "scale": 1.5, "valid_T": valid_T}
    routing = choose_tokens(logits_TE, top_k=top_k, most_experts=most, **options)  # type: ignore[arg-type]
    scores = logits_TE.softmax(dim=1).tolist()
    valid = [t for t in range(tokens) if valid_T[t]]
    capacity = math.ceil(len(valid) * top_k / experts)
    taken: dict[int, list[int]] = {t: [] for t in range(tokens)}
    for e in range(experts):
        for t in sorted(valid, key=lambda t: -scores[t][e])[:capacity]:
            taken[t].append(e)
    counts = [0] * experts
    for t in range(tokens):
        kept = sorted(taken[t], key=lambda e: -scores[t][e])[:most]
        for e in kept:
            counts[e] += 1
        total = sum(scores[t][e] for e in kept) if renormalize else 1.0
        absent = most - len(kept)
        assert routing.experts_TK[t].tolist() == kept + [-1] * absent
        wanted = torch.tensor([scores[t][e] / total * 1.5 for e in kept] + [0.0] * absent, dtype=torch.float64)
        torch.testing.assert_close(routing.weights_TK[t], wanted)
    assert routing.counts_E.tolist() == counts and routing.num_entries == sum(counts)
    if most == experts:
        assert set(counts) == {capacity}, "the load is even"


def test_gradients_through_experts_are_those_of_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, 4), (9, 8), (4, 12, 8), (4, 8, 6))
    arguments = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]

    def layer(logits_TE: Tensor, x_TD: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
        routing = choose_tokens(logits_TE, top_k=2, most_experts=3, scores="sigmoid", renormalize=True, scale=1.0, valid_T=None)
        assert bool((routing.experts_TK < 0).any())
        order = expert_order(routing.experts_TK, 4, num_entries=routing.num_entries)
        return expert_mlp(x_TD, order, routing.weights_TK, gate_up_ECD, down_EDF)

    assert torch.autograd.gradcheck(layer, arguments)


def test_more_experts_a_token_than_there_are_is_an_error_with_numbers() -> None:
    with pytest.raises(UserError, match=r"4 experts cannot .* top_k=2 .* most_experts=5 at most; choose 1 <= top_k"):
        choose_tokens(torch.zeros(3, 4), top_k=2, most_experts=5, scores="softmax", renormalize=False, scale=1.0, valid_T=None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_choice_is_that_of_the_cpu() -> None:
    logits_TE, valid_T = drawn(500, 16, 1)
    options = {"top_k": 2, "most_experts": 6, "scores": "sigmoid", "renormalize": True, "scale": 1.0}
    here = choose_tokens(logits_TE, valid_T=valid_T, **options)  # type: ignore[arg-type]
    there = choose_tokens(logits_TE.cuda(), valid_T=valid_T.cuda(), **options)  # type: ignore[arg-type]
    assert torch.equal(there.experts_TK.cpu(), here.experts_TK) and there.num_entries == here.num_entries
    torch.testing.assert_close(there.weights_TK.cpu(), here.weights_TK)
