"""Token advantages: rewards at tokens, returns, and values that predict them.

Pure functions on packed rows. A position predicts the token after it. A reward is at the position where its token is predicted;
a value is the return expected before that token. The steps of an episode are the learned tokens of a response: a reply of the
environment between two turns is not the policy's choice, its values are never fitted, and a long reply of a tool must not
discount what came before it. The end of a response is the end of its episode, cut off or not: nothing is expected after it.
Letters: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rl.advantages import STD_EPS
from rl.extras import ADVANTAGES, PROXIMAL, REFERENCE, RESPONSES, RETURNS, VALUES
from rl.kl import k1
from trainer.batch import TrainBatch
from trainer.config.rl import PER_TOKEN, AlgorithmConfig


def gae(
    rewards_BS: Tensor, values_BS: Tensor, documents_BS: Tensor, learned_BS: Tensor, discount: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimation (1506.02438, equation 16) over the learned tokens of each document; 0 elsewhere.

    A_t = delta_t + discount * gae_lambda * A_{t+1} with delta_t = r_t + discount * V_{t+1} - V_t, where t + 1 is the next
    learned token; A and V after the last one are 0. A reward at a token that is not learned belongs to the learned token
    before it. With values 0 and gae_lambda 1 it is the discounted return. Computed in float64.
    """
    rewards_BS, values_BS = rewards_BS.double(), values_BS.double()
    advantages_BS = torch.zeros_like(rewards_BS)
    behind_B = value_behind_B = earned_B = torch.zeros_like(rewards_BS[:, 0])
    last = rewards_BS.shape[1] - 1
    for place in range(last, -1, -1):
        if place < last:
            goes_on_B = documents_BS[:, place] == documents_BS[:, place + 1]
            behind_B, value_behind_B, earned_B = (
                torch.where(goes_on_B, x_B, 0.0) for x_B in (behind_B, value_behind_B, earned_B)
            )
        learned_B, value_B = learned_BS[:, place], values_BS[:, place]
        earned_B = earned_B + rewards_BS[:, place]
        delta_B = earned_B + discount * value_behind_B - value_B
        found_B = delta_B + discount * gae_lambda * behind_B
        advantages_BS[:, place] = torch.where(learned_B, found_B, 0.0)
        behind_B, value_behind_B = torch.where(learned_B, found_B, behind_B), torch.where(learned_B, value_B, value_behind_B)
        earned_B = torch.where(learned_B, 0.0, earned_B)
    return advantages_BS


def whitened(values: Sequence[Tensor], learned: Sequence[Tensor]) -> list[Tensor]:
    """(x - mean) / (std + 1e-6) over the learned tokens of all batches of a round, std biased; 0 elsewhere."""
    found = torch.cat([x[mask] for x, mask in zip(values, learned, strict=True)])
    mean, std = found.mean(), found.std(correction=0)
    return [torch.where(mask, (x - mean) / (std + STD_EPS), 0.0) for x, mask in zip(values, learned, strict=True)]


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), and where the clip decides. Elementwise.

    The factor 0.5 is that of the squared error's gradient, V - R.
    """
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    held = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(error, held), held > error


def explained_variance(values: Sequence[Tensor], returns: Sequence[Tensor], learned: Sequence[Tensor]) -> float:
    """1 - var(R - V) / var(R) over the learned tokens: 1 for a perfect prediction, 0 for that of a constant."""
    found = torch.cat([r[mask] for r, mask in zip(returns, learned, strict=True)]).double()
    errors = found - torch.cat([v[mask] for v, mask in zip(values, learned, strict=True)]).double()
    spread = found.var(correction=0)
    return float(1 - errors.var(correction=0) / spread) if spread > 0 else 0.0


def with_token_advantages(batches: Sequence[TrainBatch], config: AlgorithmConfig) -> tuple[list[TrainBatch], dict[str, float]]:
    """The batches of a round with advantages for every token, and metrics.

    What a response earned, its advantage as packed, is the reward at its last token; kl_coefficient * k1 is subtracted at every
    learned token (1909.08593). gae makes advantages of these rewards and the values before the update, and returns =
    advantages + values for the value head, before the advantages are whitened and with a lambda of their own: with 1 they are
    the discounted rewards alone, and values that are wrong do not teach themselves (VC-PPO, 2503.01491). reinforce_pp has no
    values: its advantages are the whitened discounted returns (2501.03262).
    """
    assert config.advantage in PER_TOKEN, config.advantage
    learned = [batch.weights_BS > 0 for batch in batches]
    values = [batch.extras.get(VALUES, torch.zeros_like(batch.weights_BS)) for batch in batches]

    def estimated(gae_lambda: float) -> list[Tensor]:
        return [
            gae(token_rewards(b, config), value_BS, b.documents_BS, mask, config.discount, gae_lambda)
            for b, value_BS, mask in zip(batches, values, learned, strict=True)
        ]

    found = estimated(config.gae_lambda if config.advantage == "gae" else 1.0)
    extras = [{ADVANTAGES: advantages_BS.float()} for advantages_BS in whitened(found, learned)]
    metrics = {}
    if config.advantage == "gae":
        returns = [a_BS + value_BS for a_BS, value_BS in zip(estimated(config.value_lambda), values, strict=True)]
        extras = [{**extra, RETURNS: returns_BS.float()} for extra, returns_BS in zip(extras, returns, strict=True)]
        metrics["value/explained_variance"] = explained_variance(values, returns, learned)
    return [replace(b, extras={**b.extras, **extra}) for b, extra in zip(batches, extras, strict=True)], metrics


def token_rewards(batch: TrainBatch, config: AlgorithmConfig) -> Tensor:
    """(B, S): what the response earned at its last token, less the penalty for leaving the reference at every learned one."""
    documents_BS, responses_BS = batch.documents_BS, batch.extras[RESPONSES]
    ends_BS = torch.ones_like(responses_BS)
    ends_BS[:, :-1] = documents_BS[:, 1:] != documents_BS[:, :-1]
    rewards_BS = torch.where(ends_BS & responses_BS, batch.extras[ADVANTAGES], 0.0)
    if config.kl_in_reward:
        gap_BS = torch.where(batch.weights_BS > 0, batch.extras[PROXIMAL] - batch.extras[REFERENCE], 0.0)
        rewards_BS = rewards_BS - config.kl_coefficient * k1(gap_BS)
    return rewards_BS
