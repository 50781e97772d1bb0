"""Advantages against loops over samples and tokens."""

from __future__ import annotations

import math
import statistics
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.advantages import advantages, overlong_penalty, uncertainty_weight
from trainer.config import Estimator

# Rewards a thousandth apart: the eps beside a std that is nothing but rounding would compare noise with noise.
sample_lists = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(-2000, 2000).map(lambda n: n / 1000)), st.integers(1, 9)), min_size=1, max_size=8
)
rounds = st.lists(sample_lists, min_size=1, max_size=5)
Round = list[list[tuple[float | None, int]]]


def one_by_one(samples: Round, estimator: Estimator) -> list[list[float | None]]:
    """The definitions, a token at a time."""
    result: list[list[float | None]] = []
    for group in samples:
        judged = [reward for reward, _ in group if reward is not None]
        result.append([None if reward is None else alone(reward, judged, estimator) for reward, _ in group])
    if not estimator.startswith("reinforce_pp"):
        return result
    tokens = [
        value
        for group, values in zip(samples, result, strict=True)
        for (_, length), value in zip(group, values, strict=True)
        if value is not None
        for _ in range(length)
    ]
    if not tokens:
        return result
    mean, scale = statistics.fmean(tokens), statistics.pstdev(tokens) + 1e-6
    return [[None if value is None else (value - mean) / scale for value in values] for values in result]


def alone(reward: float, judged: list[float], estimator: Estimator) -> float:
    if estimator == "reinforce_pp":
        return reward
    if len(judged) == 1:
        return 0.0
    if estimator == "rloo":
        return reward - (math.fsum(judged) - reward) / (len(judged) - 1)
    centred = reward - statistics.fmean(judged)
    return centred / (statistics.stdev(judged) + 1e-6) if estimator == "grpo" else centred


@pytest.mark.parametrize("estimator", get_args(Estimator))
@settings(max_examples=50, deadline=None, derandomize=True)
@given(rounds)
def test_advantages_equal_the_definition_over_the_judged_samples(estimator: Any, samples: Round) -> None:
    rewards, lengths = ([[sample[part] for sample in group] for group in samples] for part in (0, 1))
    got = advantages(rewards, lengths, estimator)  # type: ignore[arg-type]
    for found, wanted in zip(got, one_by_one(samples, estimator), strict=True):
        assert len(found) == len(wanted)
        for value, expected in zip(found, wanted, strict=True):
            assert (value is None) == (expected is None)
            if expected is not None:
                assert value == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_equal_rewards_teach_nothing(estimator: Any) -> None:
    assert advantages([[0.7] * 8], [[1, 2, 3, 4] * 2], estimator)[0] == pytest.approx((0.0,) * 8, abs=1e-9)


def test_whitening_spans_the_groups_and_counts_tokens_and_the_baseline_stays_within_them() -> None:
    rewards, lengths = [[1.0, 1.0], [0.0, 1.0]], [[1, 1], [6, 2]]
    plain = advantages(rewards, lengths, "reinforce_pp")
    assert plain[0] == pytest.approx((0.6 / math.sqrt(0.24),) * 2, rel=1e-5), "mean 0.4 over 10 tokens, not 0.75 over 4 samples"
    assert advantages(rewards, lengths, "reinforce_pp_baseline")[0] != plain[0]


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
