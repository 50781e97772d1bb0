"""Advantages: how much better a sample is than what the policy does on average. Plain numbers, no tensors.

Rewards come as a list of groups, each the samples of one prompt. A sample that could not be judged (None) takes no part in any
mean and gets None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.config import Estimator

STD_EPS = 1e-6

Values = NDArray[np.float64]


def grpo(rewards: Values) -> Values:
    """GRPO (2402.03300): (R - mean) / (std + 1e-6) within the group, std unbiased."""
    return dr_grpo(rewards) / (float(rewards.std(ddof=1)) + STD_EPS)


def dr_grpo(rewards: Values) -> Values:
    """Dr. GRPO (2503.20783): R - mean. Prompts that are nearly always or nearly never solved get no extra weight."""
    return rewards - float(rewards.mean())


def rloo(rewards: Values) -> Values:
    """RLOO (2402.14740): R - the mean of the n - 1 others = n / (n - 1) (R - mean)."""
    return dr_grpo(rewards) * (rewards.size / (rewards.size - 1))


def whitened(values: Values, lengths: Values) -> Values:
    """(x - mean) / (std + 1e-6), mean and biased std over the tokens of all samples: each counts `lengths` times.

    REINFORCE++ (2501.03262) does so with token returns. Without a discount and a penalty within the reward, the return of
    every token is the reward of its sample.
    """
    mean = np.average(values, weights=lengths)
    std = np.sqrt(np.average((values - mean) ** 2, weights=lengths))
    return (values - mean) / (std + STD_EPS)


# What a group does for itself, how many judged samples it needs for that, and whether all samples are whitened afterwards.
_ESTIMATORS: dict[Estimator, tuple[Callable[[Values], Values], int, bool]] = {
    "grpo": (grpo, 2, False),
    "dr_grpo": (dr_grpo, 2, False),
    "rloo": (rloo, 2, False),
    "reinforce_pp": (np.copy, 1, True),
    "reinforce_pp_baseline": (dr_grpo, 2, True),
}


def advantages(
    rewards: Sequence[Sequence[float | None]], lengths: Sequence[Sequence[int]], estimator: Estimator
) -> list[tuple[float | None, ...]]:
    """The advantage of every sample of a round; `lengths` are response tokens.

    A group with one judged sample has nothing to compare with: its advantage is 0, but for reinforce_pp, which compares all
    samples of the round.
    """
    estimate, least, whiten = _ESTIMATORS[estimator]
    judged = [np.array([r for r in group if r is not None], dtype=np.float64) for group in rewards]
    found = np.concatenate([estimate(group) if group.size >= least else np.zeros_like(group) for group in judged])
    if whiten and found.size:
        pairs = [pair for groups in zip(rewards, lengths, strict=True) for pair in zip(*groups, strict=True)]
        found = whitened(found, np.array([length for reward, length in pairs if reward is not None], dtype=np.float64))
    values = iter(found.tolist())
    return [tuple(None if reward is None else next(values) for reward in group) for group in rewards]


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
