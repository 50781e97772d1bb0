"""The objective of a policy update: a loss of rl/losses.py on the ratios and masks of rl/off_policy.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl import kl
from rl.extras import ADVANTAGES, BEHAVIOUR, PROXIMAL, REFERENCE, RETURNS, VALUES, WHOLE
from rl.losses import cispo, dppo, gspo, ppo, sapo
from rl.off_policy import Ratios, bounded_exp, bypass, decoupled, in_band, not_unlikely, recompute, sequence_mean
from rl.returns import clipped_value_loss
from trainer.batch import Predictions, TokenLoss, TrainBatch
from trainer.config.rl import AlgorithmConfig


@dataclass(frozen=True)
class PolicyObjective:
    """The loss of every token:

        importance * loss - entropy_bonus * entropy + kl_coefficient * kl + value_coefficient * value_loss

    `batch.extras` (rl/extras.py) holds PROXIMAL where a round takes several optimizer steps. With one step the proximal policy
    is the one being trained: its log-probabilities are those of this very forward pass, detached. A ratio to it is 1 then, and
    no clip acts on it. Under staged PROXIMAL is, token by token, the policy of the version that wrote it. k1 is not in the loss
    but in the reward (rl/returns.py). The last term moves the trunk below a value head, which itself is fitted to RETURNS.
    Where there is WHOLE, clips and masks compare with it and not with BEHAVIOUR, which the importance then holds
    (rl/off_policy.py).
    """

    config: AlgorithmConfig

    def __call__(self, predicted: Predictions, batch: TrainBatch) -> TokenLoss:
        logprobs_BS, whole_BS = predicted.logprobs_BS, batch.extras.get(WHOLE, batch.extras[BEHAVIOUR])
        proximal_BS = batch.extras.get(PROXIMAL, logprobs_BS.detach())
        ratios = self._ratios(logprobs_BS, proximal_BS, whole_BS, batch.extras[BEHAVIOUR])
        loss_BS, clipped_BS = self._loss(ratios.log_ratio, logprobs_BS, batch)
        kept_BS = self._kept(logprobs_BS.detach(), proximal_BS, whole_BS, batch)
        importance_BS = ratios.importance * kept_BS
        metrics = {
            "policy/ratio_mean": bounded_exp(ratios.log_ratio.detach()),
            "policy/clip_share": clipped_BS.float(),
            "policy/masked_share": (~kept_BS).float(),
            "policy/importance_weight_mean": importance_BS,
            "policy/mismatch_abs": (proximal_BS - whole_BS).abs(),
        }
        loss_BS = importance_BS * loss_BS
        if self.config.entropy_bonus > 0:
            loss_BS = loss_BS - self.config.entropy_bonus * predicted.entropy_BS
        if self.config.kl_coefficient > 0:
            gap_BS = logprobs_BS - batch.extras[REFERENCE]
            metrics["policy/kl_reference"] = kl.k3(gap_BS.detach())
            loss_BS = loss_BS + self.config.kl_coefficient * self._kl(gap_BS, ratios)
        if predicted.values_BS is not None:
            old_BS, returns_BS = batch.extras[VALUES], batch.extras[RETURNS]
            value_loss_BS, held_BS = clipped_value_loss(predicted.values_BS, old_BS, returns_BS, self.config.value_clip)
            metrics |= {"value/loss": value_loss_BS.detach(), "value/clip_share": held_BS.float()}
            if self.config.value_coefficient > 0:
                loss_BS = loss_BS + self.config.value_coefficient * value_loss_BS
        return TokenLoss(loss_BS=loss_BS, metrics=metrics, returns_BS=batch.extras.get(RETURNS))

    def _ratios(self, logprobs_BS: Tensor, proximal_BS: Tensor, whole_BS: Tensor, behaviour_BS: Tensor) -> Ratios:
        match self.config.off_policy:
            case "recompute" | "mask" | "staged":
                return recompute(logprobs_BS, proximal_BS)
            case "bypass":
                return bypass(logprobs_BS, whole_BS, behaviour_BS)
            case "decoupled":
                return decoupled(logprobs_BS, proximal_BS, behaviour_BS, self.config.truncation)

    def _kl(self, gap_BS: Tensor, ratios: Ratios) -> Tensor:
        """The penalty of every token; the weight of `unbiased` is the one that off_policy gives the policy loss, unclipped."""
        match self.config.kl_estimator:
            case "k1":
                return torch.zeros_like(gap_BS)
            case "k2":
                return kl.k2(gap_BS)
            case "k3":
                return kl.k3(gap_BS)
            case "unbiased":
                return kl.unbiased(gap_BS, bounded_exp(ratios.log_ratio) * ratios.importance)

    def _loss(self, log_ratio_BS: Tensor, logprobs_BS: Tensor, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        config, advantages_BS = self.config, batch.extras[ADVANTAGES]
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

    def _kept(self, policy_BS: Tensor, proximal_BS: Tensor, whole_BS: Tensor, batch: TrainBatch) -> Tensor:
        """What no mask drops; the log-probabilities carry no gradient."""
        config = self.config
        kept_BS = torch.ones_like(policy_BS, dtype=torch.bool)
        if config.token_band is not None:
            kept_BS = kept_BS & in_band(proximal_BS - whole_BS, config.token_band)
        if config.sequence_band is not None:
            kept_BS = kept_BS & in_band(_mean_of_response(proximal_BS - whole_BS, batch), config.sequence_band)
        if config.sequence_delta is not None:
            gap_BS = _mean_of_response(whole_BS - policy_BS, batch)
            kept_BS = kept_BS & not_unlikely(gap_BS, batch.extras[ADVANTAGES], config.sequence_delta)
        return kept_BS


def _mean_of_response(values_BS: Tensor, batch: TrainBatch) -> Tensor:
    return sequence_mean(values_BS, batch.documents_BS, batch.weights_BS > 0)
