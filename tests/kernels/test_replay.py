"""Routing replay against its formula, and against the routing that it repeats."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.replay import record_dtype, replay, unrecorded
from kernels.router import Scores, route

SCORES = get_args(Scores)


def score(logits: Tensor, scores: Scores) -> Tensor:
    if scores == "softmax":
        return logits.exp() / logits.exp().sum()
    return logits.sigmoid() if scores == "sigmoid" else (1 + logits.exp()).log().sqrt()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 7), st.integers(2, 9), st.sampled_from(SCORES), st.booleans(), st.integers(0, 10**6), st.data())
def test_replay_equals_its_formula_and_so_do_its_gradients(
    tokens: int, experts: int, scores: Scores, renormalize: bool, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, dtype=torch.float64, generator=draw).requires_grad_()
    recorded = torch.stack([torch.randperm(experts, generator=draw)[:top_k] for _ in range(tokens)]).to(record_dtype(experts))
    known = torch.rand(tokens, generator=draw) < 0.7
    recorded[~known] = unrecorded(recorded.dtype)
    valid = torch.rand(tokens, generator=draw) < 0.7
    options: dict[str, Any] = {"scores": scores, "renormalize": renormalize, "scale": 2.5, "valid_T": valid}
    own = route(logits, top_k=top_k, bias_E=torch.randn(experts, generator=draw), **options)
    routing, changed = replay(logits, recorded, own, **options)
    wanted, counts = [], [0] * experts
    for t in range(tokens):
        chosen = recorded[t].tolist() if known[t] else own.experts_TK[t].tolist()
        assert routing.experts_TK[t].tolist() == chosen
        own_ones = set(own.experts_TK[t].tolist())
        assert changed[t].item() == pytest.approx(sum(e not in own_ones for e in chosen) / top_k)
        s = score(logits[t], scores)
        total = sum(s[e] for e in chosen) if renormalize else 1.0
        wanted += [2.5 * s[e] / total for e in chosen]
        for e in chosen:
            counts[e] += bool(valid[t])
    assert routing.counts_E.tolist() == counts
    expected = torch.stack(wanted).view(tokens, top_k)
    torch.testing.assert_close(routing.weights_TK, expected, rtol=1e-9, atol=1e-12)
    mixed = torch.randn(tokens, top_k, dtype=torch.float64, generator=draw)
    found, right = (
        torch.autograd.grad((w * mixed).sum(), logits, retain_graph=True)[0] for w in (routing.weights_TK, expected)
    )
    torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_replay_of_the_own_choice_is_the_routing_bit_for_bit(scores: Scores, renormalize: bool) -> None:
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    options: dict[str, Any] = {"scores": scores, "renormalize": renormalize, "scale": 1.5, "valid_T": torch.rand(64) < 0.5}
    own = route(logits, top_k=6, bias_E=torch.linspace(-0.1, 0.1, 300), **options)
    again, changed = replay(logits, own.experts_TK.to(record_dtype(300)), own, **options)
    assert torch.equal(own.weights_TK, again.weights_TK) and torch.equal(own.counts_E, again.counts_E) and not changed.any()
    gradients = [torch.autograd.grad(r.weights_TK.square().sum(), logits, retain_graph=True)[0] for r in (own, again)]
    assert torch.equal(*gradients) and gradients[0].any()


def test_records_hold_every_expert_and_one_number_more() -> None:
    assert (record_dtype(255), record_dtype(256)) == (torch.uint8, torch.int16)
    assert unrecorded(torch.uint8) == 255 and unrecorded(torch.int16) == 32767


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scores", SCORES)
def test_on_a_gpu_a_replay_of_the_own_choice_is_the_routing_to_rounding(scores: Scores) -> None:
    logits = torch.randn(512, 128, device="cuda").requires_grad_()
    options: dict[str, Any] = {"scores": scores, "renormalize": True, "scale": 1.5, "valid_T": None}
    own = route(logits, top_k=8, bias_E=torch.linspace(-0.1, 0.1, 128, device="cuda"), **options)
    again, changed = replay(logits, own.experts_TK.to(record_dtype(128)), own, **options)
    assert torch.equal(own.experts_TK, again.experts_TK) and torch.equal(own.counts_E, again.counts_E) and not changed.any()
    torch.testing.assert_close(own.weights_TK, again.weights_TK, rtol=1e-5, atol=1e-7)
    mixed = torch.randn_like(own.weights_TK)
    gradients = [torch.autograd.grad((r.weights_TK * mixed).sum(), logits, retain_graph=True)[0] for r in (own, again)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
