"""The clipped surrogate and the off-policy corrections against loops and derivatives written by hand."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl.algorithms import PolicyObjective
from rl.engine.sampler import Sampling, kept
from rl.extras import WHOLE
from rl.off_policy import bypass, decoupled, recompute
from tests.rl.algorithm import algorithm_config
from trainer.batch import Predictions, TrainBatch


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
    result = PolicyObjective(algorithm_config(off_policy="bypass"))(
        Predictions(logprobs, torch.zeros(3, 7)), batch_of(advantages, behaviour)
    )
    for row in range(3):
        for place in range(7):
            ratio = math.exp(logprobs[row, place].item() - behaviour[row, place].item())
            a = advantages[row, place].item()
            free, clipped = -ratio * a, -min(max(ratio, 0.8), 1.28) * a
            assert result.loss_BS[row, place].item() == pytest.approx(max(free, clipped), rel=1e-5)
            assert result.metrics["policy/clip_share"][row, place] == float(clipped > free)
            assert result.metrics["policy/ratio_mean"][row, place].item() == pytest.approx(ratio, rel=1e-5)
            assert result.metrics["policy/importance_weight_mean"][row, place] == 1


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "sapo", "dppo"])
def test_fresh_tokens_of_a_cut_distribution_weigh_the_share_that_was_kept_and_nothing_is_clipped(loss: str) -> None:
    """As docs/april.md says: all tokens that may be drawn stand in a row, and count as often as they are drawn."""
    logits_V = torch.tensor([1.2, 0.9, 0.7, 0.5, 0.1, -0.2, -0.4], requires_grad=True)
    logprobs_V = logits_V.log_softmax(-1)
    inside = kept(logits_V.detach()[None], Sampling(1.0, seed=0, top_p=0.6))[0]
    drawn = inside.isfinite().nonzero().flatten()
    behaviour = inside.log_softmax(-1)[drawn]
    share = logprobs_V.detach().exp()[drawn].sum()
    assert 0.6 <= share < 0.8 == 1 - algorithm_config().clip_low
    for advantage in (1.0, -1.0):
        advantages = torch.full_like(behaviour, advantage)
        expected = torch.autograd.grad(-(logprobs_V.exp()[drawn] * advantages).sum(), logits_V, retain_graph=True)[0]
        for mode, told in (("decoupled", True), ("decoupled", False), ("bypass", True)):  # a server does not tell
            bands = {"token_band": (0.9, 1.1), "sequence_band": (0.9, 1.1), "sequence_delta": 0.1} if told else {}
            objective = PolicyObjective(algorithm_config(off_policy=mode, loss=loss, **bands))
            batch = batch_of(advantages[None], behaviour[None])
            if told:
                batch = replace(batch, extras={**batch.extras, WHOLE: logprobs_V.detach()[drawn][None]})
            result = objective(Predictions(logprobs_V[drawn][None], torch.zeros(1, len(drawn))), batch)
            gap = torch.zeros(()) if told else -share.log()
            torch.testing.assert_close(result.metrics["policy/mismatch_abs"][0], gap.expand(len(drawn)))
            torch.testing.assert_close(result.metrics["policy/importance_weight_mean"][0], share.expand(len(drawn)))
            assert not result.metrics["policy/clip_share"].any() and not result.metrics["policy/masked_share"].any()
            total = (behaviour.exp() * result.loss_BS[0]).sum()
            found = torch.autograd.grad(total, logits_V, retain_graph=True)[0]
            torch.testing.assert_close(found, expected)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 50))
def test_decoupled_loss_and_gradient_equal_a_truncated_importance_sampled_policy_gradient(seed: int) -> None:
    logprobs, behaviour, advantages = random_inputs(seed)
    result = PolicyObjective(algorithm_config(truncation=1.2))(
        Predictions(logprobs, torch.zeros(3, 7)), batch_of(advantages, behaviour)
    )
    weight = (logprobs.detach() - behaviour).exp().clamp(max=1.2)
    torch.testing.assert_close(result.loss_BS, -weight * advantages)
    (gradient,) = torch.autograd.grad(result.loss_BS.sum(), logprobs)
    torch.testing.assert_close(gradient, -weight * advantages)
    assert result.metrics["policy/clip_share"].sum() == 0
    torch.testing.assert_close(result.metrics["policy/mismatch_abs"], (logprobs.detach() - behaviour).abs())


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "sapo", "dppo"])
@pytest.mark.parametrize("off_policy", ["recompute", "mask", "decoupled", "bypass"])
def test_on_policy_gradient_is_that_of_reinforce_whatever_the_loss(off_policy: str, loss: str) -> None:
    logprobs, _, advantages = random_inputs(0)
    result = PolicyObjective(algorithm_config(off_policy=off_policy, loss=loss))(
        Predictions(logprobs, torch.zeros(3, 7)), batch_of(advantages, logprobs.detach())
    )
    (gradient,) = torch.autograd.grad(result.loss_BS.sum(), logprobs)
    (reinforce,) = torch.autograd.grad((-advantages * logprobs).sum(), logprobs)
    torch.testing.assert_close(gradient, reinforce)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_absurd_mismatch_gives_finite_losses_and_gradients(advantage: float, gap: float) -> None:
    logprobs = torch.tensor([[min(0.0, gap)]], requires_grad=True)
    behaviour = torch.tensor([[min(0.0, -gap)]])
    batch = batch_of(torch.tensor([[advantage]]), behaviour)
    for off_policy, loss in itertools.product(("decoupled", "bypass"), ("ppo", "gspo", "cispo", "sapo", "dppo")):
        config = algorithm_config(off_policy=off_policy, loss=loss, token_band=(0.5, 2.0), sequence_delta=1.0)
        loss_BS = PolicyObjective(config)(Predictions(logprobs, torch.zeros(1, 1)), batch).loss_BS
        (gradient,) = torch.autograd.grad(loss_BS.sum(), logprobs)
        assert loss_BS.isfinite().all() and gradient.isfinite().all()


def test_importance_weights_carry_no_gradient() -> None:
    logprobs, behaviour, _ = random_inputs(1)
    proximal = logprobs.detach()
    for ratios in (
        decoupled(logprobs, proximal, behaviour, 2.0),
        bypass(logprobs, behaviour - 0.1, behaviour),
        recompute(logprobs, proximal),
    ):
        assert ratios.log_ratio.requires_grad and not ratios.importance.requires_grad
    assert decoupled(logprobs, proximal, behaviour, 2.0).log_ratio.detach().eq(0).all()


def test_entropy_bonus_is_added_to_what_the_masks_leave() -> None:
    logprobs, behaviour, advantages = random_inputs(2)
    entropy = torch.rand(3, 7, requires_grad=True)
    config = algorithm_config(entropy_bonus=0.01, token_band=(0.9, 1.1))
    batch = batch_of(advantages, behaviour)
    result = PolicyObjective(config)(Predictions(logprobs, entropy), batch)
    plain = PolicyObjective(algorithm_config(token_band=(0.9, 1.1)))(Predictions(logprobs, entropy), batch)
    torch.testing.assert_close(result.loss_BS, plain.loss_BS - 0.01 * entropy)
    (gradient,) = torch.autograd.grad(result.loss_BS.sum(), entropy)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -0.01))
    assert 0 < result.metrics["policy/masked_share"].mean() < 1 and not plain.loss_BS.isclose(result.loss_BS).any()


def test_options_that_cannot_be_meant_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"token_band \(1.5, 2.0\) does not contain the ratio 1 .* widen it"):
        algorithm_config(token_band=(1.5, 2.0))
    with pytest.raises(ValueError, match=r"dual_clip \(3.0\) is a part of loss=ppo; set dual_clip=null for loss=gspo"):
        algorithm_config(dual_clip=3.0, loss="gspo")
    with pytest.raises(ValueError, match=r"sapo_temperatures \(1.0, 0.0\) must both be positive"):
        algorithm_config(sapo_temperatures=(1.0, 0.0))


def test_objective_travels_by_pickle() -> None:
    objective = PolicyObjective(algorithm_config())
    assert pickle.loads(pickle.dumps(objective)) == objective
