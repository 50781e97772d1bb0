"""Estimators of KL(policy || reference) from one sampled token.

Source: Schulman, "Approximating KL divergence" (2020); for their gradients see DeepSeek-V3.2 (2512.02556, section 3.1).
With d = log(policy / reference) of a token that the policy sampled,

    k1          d                       mean KL; as a loss its gradient is zero on average, so it belongs into the reward
    k2          d^2 / 2                 as a loss its gradient is that of the KL, while its mean is not the KL
    k3          exp(-d) - 1 + d         mean KL, never negative; as a loss its gradient is that of KL(reference || policy)
    unbiased    weight * k3             mean and gradient are those of the KL, whoever sampled the token

where weight = policy / sampling policy. Pure functions, elementwise, of log-probabilities at the rollout temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl.off_policy import MAX_LOG_RATIO


def k1(gap: Tensor) -> Tensor:
    return gap


def k2(gap: Tensor) -> Tensor:
    return gap.square() / 2


def k3(gap: Tensor) -> Tensor:
    """Below d = -20 it is constant, so that it stays finite.

    To bound exp(-d) alone would leave the gradient of d, which pushes a token further down that is far too unlikely already.
    """
    gap = gap.clamp(min=-MAX_LOG_RATIO)
    return torch.expm1(-gap) + gap


def unbiased(gap: Tensor, weight: Tensor) -> Tensor:
    """weight * k3, with weight * d as its derivative by the log-probability, which is that of weight * k3 written out.

    Autograd would get there as weight * k3 + weight * (1 - exp(-d)), two large numbers of opposite sign where d is far below 0,
    and one of them alone where k3 is constant.
    """
    weight, distance = weight.detach(), gap.detach()
    return weight * k3(distance) + weight * distance * (gap - distance)
