"""Held-out prompts, and how precise the mean reward of a sample of them is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

EVAL_GROUP = 1 << 40  # groups of held-out prompts count from here, far from those of training
FINAL_GROUP = 1 << 30  # prompts of a side of the split from here on are drawn for nothing but a last evaluation

Judged = tuple[str, float]  # the text of a prompt, the reward of an answer to it


@dataclass(frozen=True)
class Estimate:
    """`error`: one standard error of the mean, None where there is one prompt only. `prompts`: how many distinct ones."""

    mean: float
    error: float | None
    prompts: int


def estimate(judged: Sequence[Judged]) -> Estimate:
    """The mean reward over a task's prompts, and how far it may be off, from answers to n draws of G distinct prompts.

    Draws of the same prompt say little that is new of the others, so they count together (Liang and Zeger, Biometrika 1986):
    with e_g the sum of reward - mean over the draws of prompt g, error^2 = G / (G - 1) sum_g e_g^2 / n^2. Where all prompts
    differ that is the variance over n.
    """
    mean = sum(reward for _, reward in judged) / len(judged)
    excess: dict[str, float] = defaultdict(float)
    for prompt, reward in judged:
        excess[prompt] += reward - mean
    if len(excess) == 1:
        return Estimate(mean, None, 1)
    correction = len(excess) / (len(excess) - 1)
    error = math.sqrt(correction * sum(e * e for e in excess.values())) / len(judged)
    return Estimate(mean, error, len(excess))
