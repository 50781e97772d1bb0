"""The standard error of an evaluation, where the same prompt may be drawn often."""

from __future__ import annotations

import math
import random
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.evaluation import estimate

REWARDS = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=20)


@given(REWARDS)
def test_of_distinct_prompts_it_is_that_of_a_mean(rewards: list[float]) -> None:
    found = estimate([(str(index), reward) for index, reward in enumerate(rewards)])
    assert found.mean == pytest.approx(mean(rewards)) and found.prompts == len(rewards)
    assert found.error == pytest.approx(stdev(rewards) / math.sqrt(len(rewards)), abs=1e-12)


@given(REWARDS, st.integers(1, 5))
def test_more_draws_of_the_same_answers_say_no_more(rewards: list[float], times: int) -> None:
    once = [(str(index), reward) for index, reward in enumerate(rewards)]
    assert estimate(once * times).error == pytest.approx(estimate(once).error, abs=1e-12)


def test_one_prompt_says_nothing_of_others() -> None:
    assert estimate([("a", 0.0), ("a", 1.0)]).error is None


def test_it_is_as_large_as_evaluations_differ() -> None:
    """Tasks of eight prompts that are solved or not, each drawn 64 times: the error that counts draws is a third of it."""
    draw, found = random.Random(0), []
    for _ in range(2000):
        solved = [draw.random() < 0.7 for _ in range(8)]
        found.append(estimate([(str(p), float(solved[p])) for p in range(8) for _ in range(64)]))
    spread = stdev(one.mean for one in found)
    typical = math.sqrt(mean((one.error or 0.0) ** 2 for one in found))
    assert typical == pytest.approx(spread, rel=0.1)
    assert math.sqrt(0.7 * 0.3 / 512) < spread / 3
