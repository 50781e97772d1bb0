"""The clipped surrogate and the off-policy corrections against loops and derivatives written by hand."""

from __future__ import annotations

import math
import pickle
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl.algorithms import PolicyObjective, clipped_surrogate
from rl.off_policy import bypass, decoupled
from tests.rl.algorithm import algorithm_config
from trainer.batch import TrainBatch
from trainer.config import AlgorithmConfig


def algorithm(off_policy: Literal["decoupled", "bypass"], **changes: Any) -> AlgorithmConfig:
    return algorithm_config(off_policy=off_policy, **changes)


def batch_of(advantages_BS: Tensor, behaviour_BS: Tensor) -> TrainBatch:
    zeros = torch.zeros(advantages_BS.shape, dtype=torch.int64)
    extras = {"advantages": advantages_BS, "behaviour_logprobs": behaviour_BS}
    return TrainBatch(zeros, zeros, zeros.int(), torch.ones(advantages_BS.shape), extras)


def random_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs with gradient, behaviour log-probs, advantages), (3, 7)."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(3, 7, generator=generator) * 4
    behaviour = (logprobs + torch.randn(3, 7, generator=generator) * 0.4).clamp(max=0)
    return logprobs.requires_grad_(), behaviour, torch.randn(3, 7, generator=generator)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 50))
def test_bypass_loss_and_its_clip_equal_a_loop(seed: int) -> None:
    logprobs, behaviour, advantages = random_inputs(seed)
    result = PolicyObjective(algorithm("bypass"))(logprobs, torch.zeros(3, 7), batch_of(advantages, behaviour))
    for row in range(3):
        for place in range(7):
            ratio = math.exp(logprobs[row, place].item() - behaviour[row, place].item())
            a = advantages[row, place].item()
            free, clipped = -ratio * a, -min(max(ratio, 0.8), 1.28) * a
            assert result.loss_BS[row, place].item() == pytest.approx(max(free, clipped), rel=1e-5)
            assert result.metrics["policy/clip_share"][row, place] == float(clipped > free)
            assert result.metrics["policy/ratio_mean"][row, place].item() == pytest.approx(ratio, rel=1e-5)
            assert result.metrics["policy/importance_weight_mean"][row, place] == 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 50))
def test_decoupled_loss_and_gradient_equal_a_truncated_importance_sampled_policy_gradient(seed: int) -> None:
    logprobs, behaviour, advantages = random_inputs(seed)
    result = PolicyObjective(algorithm("decoupled", truncation=1.2))(
        logprobs, torch.zeros(3, 7), batch_of(advantages, behaviour)
    )
    weight = (logprobs.detach() - behaviour).exp().clamp(max=1.2)
    torch.testing.assert_close(result.loss_BS, -weight * advantages)
    (gradient,) = torch.autograd.grad(result.loss_BS.sum(), logprobs)
    torch.testing.assert_close(gradient, -weight * advantages)
    assert result.metrics["policy/clip_share"].sum() == 0
    torch.testing.assert_close(result.metrics["policy/mismatch_abs"], (logprobs.detach() - behaviour).abs())


@pytest.mark.parametrize("off_policy", ["decoupled", "bypass"])
def test_on_policy_gradient_is_that_of_reinforce(off_policy: Literal["decoupled", "bypass"]) -> None:
    logprobs, _, advantages = random_inputs(0)
    result = PolicyObjective(algorithm(off_policy))(logprobs, torch.zeros(3, 7), batch_of(advantages, logprobs.detach()))
    (gradient,) = torch.autograd.grad(result.loss_BS.sum(), logprobs)
    (reinforce,) = torch.autograd.grad((-advantages * logprobs).sum(), logprobs)
    torch.testing.assert_close(gradient, reinforce)


def test_clip_stops_the_gradient_only_where_a_ratio_left_in_the_direction_of_its_advantage() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.25], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss, clipped = clipped_surrogate(ratio, advantages, low=0.2, high=0.28)
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    assert clipped.tolist() == [True, False, False, True, False]
    assert gradient.tolist() == [0, 1, -1, 0, -1]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_absurd_mismatch_gives_finite_losses_and_gradients(advantage: float, gap: float) -> None:
    logprobs = torch.tensor([[min(0.0, gap)]], requires_grad=True)
    behaviour = torch.tensor([[min(0.0, -gap)]])
    batch = batch_of(torch.tensor([[advantage]]), behaviour)
    for off_policy in ("decoupled", "bypass"):
        loss = PolicyObjective(algorithm(off_policy))(logprobs, torch.zeros(1, 1), batch).loss_BS
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_importance_weights_carry_no_gradient() -> None:
    logprobs, behaviour, _ = random_inputs(1)
    assert not decoupled(logprobs, behaviour, 2.0).importance.requires_grad
    assert not bypass(logprobs, behaviour).importance.requires_grad
    assert decoupled(logprobs, behaviour, 2.0).ratio.detach().eq(1).all()


def test_objective_travels_by_pickle() -> None:
    objective = PolicyObjective(algorithm("decoupled"))
    assert pickle.loads(pickle.dumps(objective)) == objective
