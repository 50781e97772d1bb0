"""Policy losses of a token, given its advantage A and the ratio r of the policy to the one that it is clipped to.

Pure elementwise functions. Each returns the loss, and where the policy has left the region in which the loss trusts r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl.off_policy import bounded_exp


def ppo(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """max(-r A, -clip(r, 1 - low, 1 + high) A) (1707.06347; low < high: DAPO, 2503.14476).

    `dual_clip` c > 1 bounds it by -c A where A < 0, so a ratio that exploded cannot (1912.09729).
    """
    ratio = bounded_exp(log_ratio)
    free = -ratio * advantages
    bound = -ratio.clamp(1 - low, 1 + high) * advantages
    loss, clipped = torch.maximum(free, bound), bound > free
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        over = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(over, ceiling, loss), clipped | over
    return loss, clipped


def gspo(log_ratio: Tensor, mean_log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """GSPO (2507.18071), token form: PPO's loss of s_t = exp(sg[mean log r] + log r - sg[log r]).

    `mean_log_ratio` is over the token's sequence. All tokens of a sequence have one value, that of its geometric mean ratio,
    and under the mean over sequences of the means over their tokens the gradient is that of the sequence form.
    """
    return ppo(mean_log_ratio.detach() + (log_ratio - log_ratio.detach()), advantages, low, high)


def cispo(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """CISPO (MiniMax-M1, 2506.13585): -sg[clip(r, 1 - low, 1 + high)] A log p. No token loses its gradient."""
    ratio = bounded_exp(log_ratio.detach())
    weight = ratio.clamp(1 - low, 1 + high)
    return -weight * advantages * logprobs, weight != ratio


def sapo(log_ratio: Tensor, advantages: Tensor, temperatures: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """SAPO (2511.20347): -A 4 / t sigmoid(t (r - 1)), t = temperatures[0] where A > 0, else temperatures[1].

    The gradient fades on both sides of r = 1, where it is that of -r A. Nothing is ever clipped.
    """
    temperature = torch.where(advantages > 0, *temperatures)
    gate = torch.sigmoid(temperature * (bounded_exp(log_ratio) - 1))
    return -advantages * gate * 4 / temperature, torch.zeros_like(advantages, dtype=torch.bool)


def dppo(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """DPPO (2602.04879), binary total variation: -r A, dropped where A > 0 and p - q > high, or A < 0 and p - q < -low.

    p is the policy's probability of the token, q = p / r that of the policy it is held to. A rare token may change its ratio
    much without a large change of the distribution, so differences bound what ratios do not.
    """
    policy = logprobs.detach()
    shift = policy.exp() - (policy - log_ratio.detach()).exp()
    dropped = ((advantages > 0) & (shift > high)) | ((advantages < 0) & (shift < -low))
    return torch.where(dropped, 0.0, -bounded_exp(log_ratio) * advantages), dropped
