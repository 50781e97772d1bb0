"""KL estimators against formulas written out, and against the exact divergence of a small vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl import kl
from rl.algorithms import PolicyObjective
from rl.extras import ADVANTAGES, BEHAVIOUR, PROXIMAL, REFERENCE
from tests.rl.algorithm import algorithm_config
from trainer.batch import Predictions, TokenLoss, TrainBatch

numbers = st.floats(-6.0, -0.01)


def told(config: dict[str, Any], policy: Tensor, **extras: float) -> TokenLoss:
    shape = policy.shape
    zeros = torch.zeros(shape, dtype=torch.int64)
    tensors = {name: torch.full(shape, value, dtype=policy.dtype) for name, value in extras.items()}
    batch = TrainBatch(zeros, zeros, zeros.int(), torch.ones(shape), tensors)
    return PolicyObjective(algorithm_config(**config))(Predictions(policy, torch.zeros_like(policy)), batch)


@pytest.mark.parametrize("off_policy", ["decoupled", "bypass", "recompute"])
@pytest.mark.parametrize("estimator", ["k2", "k3", "unbiased"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(policy=numbers, proximal=numbers, behaviour=numbers, reference=numbers)
def test_value_and_gradient_of_the_penalty_are_the_formula(
    estimator: str, off_policy: str, policy: float, proximal: float, behaviour: float, reference: float
) -> None:
    """With advantage 0 the penalty is the whole loss."""
    coefficient, truncation = 0.03, 1.5
    config = {"kl_coefficient": coefficient, "kl_estimator": estimator, "off_policy": off_policy, "truncation": truncation}
    logprobs = torch.tensor([[policy]], dtype=torch.float64, requires_grad=True)
    result = told(
        config,
        logprobs,
        **{ADVANTAGES: 0.0, BEHAVIOUR: behaviour, PROXIMAL: proximal, REFERENCE: reference},
    )
    (gradient,) = torch.autograd.grad(result.loss_BS.sum(), logprobs)
    d = policy - reference
    k3 = math.exp(-d) - 1 + d
    weight = {
        "decoupled": math.exp(policy - proximal) * min(math.exp(proximal - behaviour), truncation),
        "bypass": math.exp(policy - behaviour),
        "recompute": math.exp(policy - proximal),
    }[off_policy]
    value, slope = {"k2": (d * d / 2, d), "k3": (k3, 1 - math.exp(-d)), "unbiased": (weight * k3, weight * d)}[estimator]
    assert result.loss_BS.item() == pytest.approx(coefficient * value, rel=1e-6, abs=1e-6)
    assert gradient.item() == pytest.approx(coefficient * slope, rel=1e-6, abs=1e-6)
    assert result.metrics["policy/kl_reference"].item() == pytest.approx(k3, rel=1e-6, abs=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_means_over_the_whole_vocabulary_are_the_divergences_that_the_page_names(seed: int) -> None:
    """Every token weighed by how often it is sampled: no noise, so the identities hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference_logits, sampling_logits = torch.randn(3, 7, generator=generator, dtype=torch.float64).unbind()
    logits.requires_grad_()
    policy, reference, sampling = (x.log_softmax(-1) for x in (logits, reference_logits, sampling_logits))
    gap, often = policy - reference, policy.detach().exp()
    forward = (policy.exp() * gap).sum()  # KL(policy || reference)
    backward = (reference.exp() * (reference - policy)).sum()

    def slope(of: Tensor) -> Tensor:
        return torch.autograd.grad(of, logits, retain_graph=True)[0]

    def equal(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)

    equal((often * kl.k1(gap)).sum(), forward)
    equal((often * kl.k3(gap)).sum(), forward)
    equal(slope((often * kl.k1(gap)).sum()), torch.zeros_like(logits))
    equal(slope((often * kl.k2(gap)).sum()), slope(forward))
    equal(slope((often * kl.k3(gap)).sum()), slope(backward))
    weighted = (sampling.exp() * kl.unbiased(gap, (policy - sampling).exp())).sum()
    equal(weighted, forward)
    equal(slope(weighted), slope(forward))


@pytest.mark.parametrize("estimator", ["k2", "k3", "unbiased"])
@pytest.mark.parametrize("gap", [-300.0, -25.0, 25.0, 300.0])
def test_a_token_far_from_the_reference_gives_finite_numbers_and_is_never_pushed_further(estimator: str, gap: float) -> None:
    logprobs = torch.tensor([[min(gap, 0.0)]], requires_grad=True)
    extras = {ADVANTAGES: 0.0, BEHAVIOUR: min(gap, 0.0), REFERENCE: min(-gap, 0.0)}
    result = told({"kl_coefficient": 0.1, "kl_estimator": estimator}, logprobs, **extras)
    (gradient,) = torch.autograd.grad(result.loss_BS.sum(), logprobs)
    assert result.loss_BS.isfinite().all() and gradient.isfinite().all()
    assert gradient.item() * gap >= 0, "the step goes against the gradient, and must not widen the gap"


def test_without_a_coefficient_nothing_is_asked_and_nothing_told() -> None:
    result = told({}, torch.tensor([[-1.0]]), **{ADVANTAGES: 1.0, BEHAVIOUR: -1.0})
    assert "policy/kl_reference" not in result.metrics


def test_k1_is_no_loss_and_needs_rewards_of_single_tokens() -> None:
    config = {"kl_coefficient": 0.1, "kl_estimator": "k1", "advantage": "reinforce_pp"}
    result = told(config, torch.tensor([[-1.0]]), **{ADVANTAGES: 0.0, BEHAVIOUR: -1.0, REFERENCE: -2.0})
    assert result.loss_BS.item() == 0 and result.metrics["policy/kl_reference"].item() == pytest.approx(math.exp(-1))
    with pytest.raises(ValueError, match=r"kl_estimator=k1 stands in the rewards .* advantage=grpo .* choose kl_estimator=k3"):
        algorithm_config(kl_coefficient=0.1, kl_estimator="k1")
    assert algorithm_config(kl_estimator="k1").kl_coefficient == 0, "without a coefficient the estimator does not matter"
