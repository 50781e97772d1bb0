"""Advantages and the policy loss: GRPO (2402.03300) with asymmetric clipping (DAPO, 2503.14476), or Dr. GRPO (2503.20783)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rl.off_policy import Ratios, bypass, decoupled
from trainer.batch import TokenLoss, TrainBatch
from trainer.config import AlgorithmConfig

STD_EPS = 1e-6


def group_advantages(rewards: Sequence[float | None], normalize_std: bool) -> tuple[float | None, ...]:
    """How much better each sample of one group is than its group: (R - mean) / (std + 1e-6), std unbiased.

    Without `normalize_std` the division is left out (Dr. GRPO). A sample that could not be judged (None) takes no part in
    mean and std and gets None. A group with one judged sample has nothing to compare with: its advantage is 0.
    """
    judged = np.array([reward for reward in rewards if reward is not None], dtype=np.float64)
    if judged.size < 2:
        return tuple(None if reward is None else 0.0 for reward in rewards)
    scale = float(judged.std(ddof=1)) + STD_EPS if normalize_std else 1.0
    mean = float(judged.mean())
    return tuple(None if reward is None else (reward - mean) / scale for reward in rewards)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's loss max(-r A, -clip(r, 1 - low, 1 + high) A), and where the clip takes the gradient away; elementwise."""
    free = -ratio * advantages
    clipped = -ratio.clamp(1 - low, 1 + high) * advantages
    return torch.maximum(free, clipped), clipped > free


@dataclass(frozen=True)
class PolicyObjective:
    """The objective of a policy update; `batch.extras` holds "advantages" and "behaviour_logprobs", both (B, S)."""

    config: AlgorithmConfig

    def __call__(self, logprobs_BS: Tensor, entropy_BS: Tensor, batch: TrainBatch) -> TokenLoss:
        behaviour_BS = batch.extras["behaviour_logprobs"]
        ratios = self._ratios(logprobs_BS, behaviour_BS)
        loss_BS, clipped_BS = clipped_surrogate(
            ratios.ratio, batch.extras["advantages"], self.config.clip_low, self.config.clip_high
        )
        metrics = {
            "policy/ratio_mean": ratios.ratio.detach(),
            "policy/clip_share": clipped_BS.float(),
            "policy/importance_weight_mean": ratios.importance,
            "policy/mismatch_abs": (logprobs_BS.detach() - behaviour_BS).abs(),
        }
        return TokenLoss(loss_BS=ratios.importance * loss_BS, metrics=metrics)

    def _ratios(self, logprobs_BS: Tensor, behaviour_BS: Tensor) -> Ratios:
        if self.config.off_policy == "bypass":
            return bypass(logprobs_BS, behaviour_BS)
        return decoupled(logprobs_BS, behaviour_BS, self.config.truncation)
