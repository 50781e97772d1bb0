"""Advantages: how much better a sample is than the policy's average. Plain numbers, no tensors.

Token advantages are in rl/returns.py; they start from a sample's reward, minus its group's mean or not. A group is the samples
of one prompt. A sample that could not be judged (None) takes no part in any mean and gets None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.config.rl import Estimator

STD_EPS = 1e-6

Values = NDArray[np.float64]


def grpo(rewards: Values) -> Values:
    """GRPO (2402.03300): (R - mean) / (std + 1e-6) within the group, std unbiased."""
    return dr_grpo(rewards) / (float(rewards.std(ddof=1)) + STD_EPS)


def dr_grpo(rewards: Values) -> Values:
    """Dr. GRPO (2503.20783): R - mean. Prompts that are nearly always or nearly never solved get no extra weight."""
    excess = rewards - rewards[0]  # of equal rewards exactly 0, which rounding of their mean would not give
    return excess - float(excess.mean())


def rloo(rewards: Values) -> Values:
    """RLOO (2402.14740): R - the mean of the n - 1 others = n / (n - 1) (R - mean)."""
    return dr_grpo(rewards) * (rewards.size / (rewards.size - 1))


# What a group does for itself, and how many judged samples it needs for that.
_ESTIMATORS: dict[Estimator, tuple[Callable[[Values], Values], int]] = {
    "grpo": (grpo, 2),
    "dr_grpo": (dr_grpo, 2),
    "rloo": (rloo, 2),
    "reinforce_pp": (np.copy, 1),
    "reinforce_pp_baseline": (dr_grpo, 2),
    "gae": (np.copy, 1),
}


def advantages(rewards: Sequence[float | None], estimator: Estimator) -> tuple[float | None, ...]:
    """The advantage of every sample of a group; of what compares tokens of all groups, what the sample earned.

    Where a group compares its own samples, one that has a single judged sample has nothing to compare with: it gets 0.
    """
    estimate, least = _ESTIMATORS[estimator]
    judged = np.array([reward for reward in rewards if reward is not None], dtype=np.float64)
    values = iter((estimate(judged) if judged.size >= least else np.zeros_like(judged)).tolist())
    return tuple(None if reward is None else next(values) for reward in rewards)


def uncertainty_weight(rewards: Sequence[float | None], focus: float) -> float:
    """MGPO (VibeThinker, 2511.06221): exp(-focus D(p || 1/2)), p the share of the group's judged samples with full reward.

    D(p || 1/2) = p log(2 p) + (1 - p) log(2 (1 - p)) is 0 where the outcome is least certain and log 2 where it is certain.
    """
    solved = [reward >= 1 for reward in rewards if reward is not None]
    shares = [solved.count(outcome) / len(solved) for outcome in set(solved)]
    return math.exp(-focus * sum(share * math.log(2 * share) for share in shares))


def overlong_penalty(length: int, limit: int, margin: int, factor: float) -> float:
    """DAPO's soft overlong punishment (2503.14476): min(-(length - (limit - margin)) / margin * factor, 0).

    Responses may have `limit` tokens; the last `margin` of them cost, up to `factor`. No margin, no punishment.
    """
    return min(-(length - (limit - margin)) / margin * factor, 0.0) if margin else 0.0
