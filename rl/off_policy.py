"""How tokens from older weights, and from an engine that rounds differently than the trainer, enter the policy update.

Two policies besides the one being trained are in play: `behaviour`, which sampled a token (whatever its weight version; its
log-probability was stored with the token), and `proximal`, the trainer's policy when the update starts, which the clip is
relative to. Pure functions of log-probabilities at the rollout temperature, elementwise, any shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) is far beyond every clip and still finite, so a ratio that overflows cannot make the gradient inf * 0 = NaN
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Ratios:
    """`ratio`: probability ratio that is clipped, with gradient. `importance`: factor of the loss, without gradient."""

    ratio: Tensor
    importance: Tensor


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def bypass(logprobs: Tensor, behaviour: Tensor) -> Ratios:
    """PPO's ratio straight to the behaviour policy: old tokens are held back by the clip alone."""
    ratio = _exp(logprobs - behaviour)
    return Ratios(ratio=ratio, importance=torch.ones_like(ratio))


def decoupled(logprobs: Tensor, behaviour: Tensor, truncation: float) -> Ratios:
    """Decoupled PPO (AReaL, 2505.24298) with truncated importance weights.

    The clip is relative to the proximal policy, and min(proximal / behaviour, truncation) corrects for who sampled. One
    optimizer step is taken a round, so the proximal policy is the one being trained: its log-probabilities are those of this
    very forward pass, detached. The ratio is 1 in value then, and the clip never acts.
    """
    proximal = logprobs.detach()
    return Ratios(ratio=_exp(logprobs - proximal), importance=_exp(proximal - behaviour).clamp(max=truncation))
