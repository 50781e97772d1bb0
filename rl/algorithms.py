"""The objective of a policy update: a loss of rl/losses.py on the ratios and masks of rl/off_policy.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.losses import cispo, dppo, gspo, ppo, sapo
from rl.off_policy import Ratios, bounded_exp, bypass, decoupled, in_band, not_unlikely, recompute, sequence_mean
from trainer.batch import TokenLoss, TrainBatch
from trainer.config import AlgorithmConfig

PROXIMAL = "proximal_logprobs"  # of batch.extras


@dataclass(frozen=True)
class PolicyObjective:
    """The loss of every token: importance * loss - entropy_bonus * entropy.

    `batch.extras` holds "advantages" and "behaviour_logprobs", both (B, S), and "proximal_logprobs" where a round takes several
    optimizer steps. With one step the proximal policy is the one being trained: its log-probabilities are those of this very
    forward pass, detached. A ratio to it is 1 then, and no clip acts on it.
    """

    config: AlgorithmConfig

    def __call__(self, logprobs_BS: Tensor, entropy_BS: Tensor, batch: TrainBatch) -> TokenLoss:
        behaviour_BS = batch.extras["behaviour_logprobs"]
        proximal_BS = batch.extras.get(PROXIMAL, logprobs_BS.detach())
        ratios = self._ratios(logprobs_BS, proximal_BS, behaviour_BS)
        loss_BS, clipped_BS = self._loss(ratios.log_ratio, logprobs_BS, batch)
        kept_BS = self._kept(logprobs_BS.detach(), proximal_BS, batch)
        importance_BS = ratios.importance * kept_BS
        metrics = {
            "policy/ratio_mean": bounded_exp(ratios.log_ratio.detach()),
            "policy/clip_share": clipped_BS.float(),
            "policy/masked_share": (~kept_BS).float(),
            "policy/importance_weight_mean": importance_BS,
            "policy/mismatch_abs": (proximal_BS - behaviour_BS).abs(),
        }
        loss_BS = importance_BS * loss_BS
        if self.config.entropy_bonus > 0:
            loss_BS = loss_BS - self.config.entropy_bonus * entropy_BS
        return TokenLoss(loss_BS=loss_BS, metrics=metrics)

    def _ratios(self, logprobs_BS: Tensor, proximal_BS: Tensor, behaviour_BS: Tensor) -> Ratios:
        match self.config.off_policy:
            case "recompute" | "mask":
                return recompute(logprobs_BS, proximal_BS)
            case "bypass":
                return bypass(logprobs_BS, behaviour_BS)
            case "decoupled":
                return decoupled(logprobs_BS, proximal_BS, behaviour_BS, self.config.truncation)

    def _loss(self, log_ratio_BS: Tensor, logprobs_BS: Tensor, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        config, advantages_BS = self.config, batch.extras["advantages"]
        low, high = config.clip_low, config.clip_high
        match config.loss:
            case "ppo":
                return ppo(log_ratio_BS, advantages_BS, low, high, config.dual_clip)
            case "gspo":
                mean_BS = _mean_of_response(log_ratio_BS.detach(), batch)
                return gspo(log_ratio_BS, mean_BS, advantages_BS, low, high)
            case "cispo":
                return cispo(log_ratio_BS, logprobs_BS, advantages_BS, low, high)
            case "sapo":
                return sapo(log_ratio_BS, advantages_BS, config.sapo_temperatures)
            case "dppo":
                return dppo(log_ratio_BS, logprobs_BS, advantages_BS, low, high)

    def _kept(self, policy_BS: Tensor, proximal_BS: Tensor, batch: TrainBatch) -> Tensor:
        """What no mask drops; the log-probabilities carry no gradient."""
        config, behaviour_BS = self.config, batch.extras["behaviour_logprobs"]
        kept_BS = torch.ones_like(policy_BS, dtype=torch.bool)
        if config.token_band is not None:
            kept_BS = kept_BS & in_band(proximal_BS - behaviour_BS, config.token_band)
        if config.sequence_band is not None:
            kept_BS = kept_BS & in_band(_mean_of_response(proximal_BS - behaviour_BS, batch), config.sequence_band)
        if config.sequence_delta is not None:
            gap_BS = _mean_of_response(behaviour_BS - policy_BS, batch)
            kept_BS = kept_BS & not_unlikely(gap_BS, batch.extras["advantages"], config.sequence_delta)
        return kept_BS


def _mean_of_response(values_BS: Tensor, batch: TrainBatch) -> Tensor:
    return sequence_mean(values_BS, batch.documents_BS, batch.weights_BS > 0)
