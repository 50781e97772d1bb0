"""The policy loss: PPO's clipped surrogate with an asymmetric clip (DAPO, 2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.off_policy import Ratios, bypass, decoupled
from trainer.batch import TokenLoss, TrainBatch
from trainer.config import AlgorithmConfig


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
