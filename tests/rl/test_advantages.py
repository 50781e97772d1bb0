"""Advantages against loops over samples and tokens."""

from __future__ import annotations

import math
import statistics
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.advantages import advantages, overlong_penalty, uncertainty_weight
from trainer.config.rl import Estimator

# Rewards a thousandth apart: the eps beside a std that is nothing but rounding would compare noise with noise.
groups = st.lists(st.one_of(st.none(), st.integers(-2000, 2000).map(lambda n: n / 1000)), min_size=1, max_size=8)


def alone(reward: float, judged: list[float], estimator: Estimator) -> float:
    """The definitions, a sample at a time."""
    if estimator in ("reinforce_pp", "gae"):
        return reward
    if len(judged) == 1:
        return 0.0
    if estimator == "rloo":
        return reward - (math.fsum(judged) - reward) / (len(judged) - 1)
    centred = reward - statistics.fmean(judged)
    return centred / (statistics.stdev(judged) + 1e-6) if estimator == "grpo" else centred


@pytest.mark.parametrize("estimator", get_args(Estimator))
@settings(max_examples=50, deadline=None, derandomize=True)
@given(groups)
def test_advantages_equal_the_definition_over_the_judged_samples(estimator: Any, rewards: list[float | None]) -> None:
    judged = [reward for reward in rewards if reward is not None]
    found = advantages(rewards, estimator)
    assert len(found) == len(rewards)
    for value, reward in zip(found, rewards, strict=True):
        assert (value is None) == (reward is None)
        if reward is not None:
            assert value == pytest.approx(alone(reward, judged, estimator), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("estimator", [e for e in get_args(Estimator) if e not in ("reinforce_pp", "gae")])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1e-3, 1e9 / 3])
def test_equal_rewards_of_a_group_teach_nothing_at_all(estimator: Any, reward: float) -> None:
    for size in range(1, 20):
        assert set(advantages([reward] * size, estimator)) == {0.0}, "exactly, whatever rounding does to their mean"
    assert advantages([None, reward, None, reward], estimator) == (None, 0.0, None, 0.0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=8), st.floats(0, 5))
def test_uncertainty_weight_is_the_published_formula(rewards: list[float | None], focus: float) -> None:
    judged = [reward for reward in rewards if reward is not None]
    p = sum(reward == 1 for reward in judged) / max(1, len(judged))
    terms = [x * math.log(x / 0.5) for x in (p, 1 - p) if x > 0]
    expected = math.exp(-focus * sum(terms)) if judged else 1.0
    assert uncertainty_weight(rewards, focus) == pytest.approx(expected, rel=1e-9)
    assert uncertainty_weight(rewards, 0.0) == 1


def test_uncertainty_weight_is_greatest_where_half_is_solved() -> None:
    weights = [uncertainty_weight([1.0] * solved + [0.0] * (8 - solved), 1.0) for solved in range(9)]
    assert weights[4] == 1 and weights == pytest.approx(weights[::-1])
    assert weights[:5] == sorted(weights[:5]) and weights[0] == pytest.approx(0.5)


def test_overlong_penalty_grows_linearly_over_the_margin_only() -> None:
    values = [overlong_penalty(length, limit=100, margin=20, factor=2.0) for length in (1, 80, 85, 90, 100)]
    assert values == [0, 0, -0.5, -1, -2]
    assert overlong_penalty(100, limit=100, margin=0, factor=2.0) == 0
