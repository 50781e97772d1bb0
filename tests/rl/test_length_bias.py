"""The length bias says 1 where nobody is preferred, less where short samples are, and recovers when the long ones come."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.april import rollout_round
from rl.length_bias import BINS, WINDOW, GroupLengths, LengthWindow, RoundLengths
from rl.trajectory import RolloutBuffer, Sample
from tests.rl.test_april import ScriptedPool, prompts, rollout_config, score


class AlternatingPool(ScriptedPool):
    """Every other prompt has responses of 30 tokens, the others of 3."""

    def final(self, sample: Sample) -> int:
        return 30 if sample.group % 2 else 3


def play(over_provision: float, rounds: int, advance: int = 3) -> list[float]:
    buffer, found = RolloutBuffer(), []
    config = rollout_config(groups=4, over_provision=over_provision, advance_tokens=advance, max_staleness=99)
    for version in range(rounds):
        result = rollout_round(AlternatingPool(version, 30, 40), buffer, prompts, config, version, score)
        found.append(result.metrics["rollout/length_bias"])
        buffer = RolloutBuffer.from_state(json.loads(json.dumps(buffer.to_state())))
    return found


def test_waiting_for_every_sample_has_no_bias() -> None:
    assert play(1.0, 12) == [1.0] * 12


def test_partial_rollouts_start_with_short_samples_and_train_the_long_ones_in_the_end() -> None:
    found = play(2.0, 60)
    assert min(found[1:WINDOW]) < 0.75
    assert 0.9 < sum(found[-WINDOW * 2 :]) / (WINDOW * 2) < 1.2


def test_by_hand() -> None:
    window = LengthWindow()
    window.close_round(RoundLengths(0, (GroupLengths(0, (2, 4)),), (GroupLengths(1, (9, 1)),)))
    waiting = [GroupLengths(2, (20, 0))]
    assert window.bias(waiting) == (6 / 2) / (36 / 6)
    trained, drawn = window.histogram(waiting, longest=32)  # two lengths a bin; what waits without a token is in the first
    assert trained == [0.5, 0.5, *[0] * 14]
    assert drawn == pytest.approx([3 / 6, 1 / 6, 0, 0, 1 / 6, 0, 0, 0, 0, 1 / 6, *[0] * 6], abs=1e-5)
    window.close_round(RoundLengths(3, (GroupLengths(2, (19, 21)),), ()))
    assert window.bias([]) == (46 / 4) / (56 / 6)


def test_rounds_leave_the_window_with_what_was_drawn_in_them() -> None:
    window = LengthWindow()
    for round_ in range(WINDOW + 1):
        window.close_round(RoundLengths(round_, (GroupLengths(round_, (1 if round_ else 50,)),), ()))
    assert window.bias([]) == 1
    assert window.bias([GroupLengths(0, (1000,))]) == 1, "drawn before the window"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=5), min_size=1, max_size=9), st.integers(1, 400))
def test_a_histogram_counts_every_sample_once_and_says_how_long_it_was(groups: list[list[int]], longest: int) -> None:
    lengths = [GroupLengths(place, tuple(min(n, longest) for n in tokens)) for place, tokens in enumerate(groups)]
    window = LengthWindow([RoundLengths(0, tuple(lengths), ())])
    trained, drawn = window.histogram([], longest)
    samples = [n for group in lengths for n in group.tokens]
    assert trained == drawn and sum(trained) == pytest.approx(1, abs=1e-4)
    for place, share in enumerate(trained):
        inside = [n for n in samples if place * longest <= max(0, n - 1) * BINS < (place + 1) * longest]
        assert share == pytest.approx(len(inside) / len(samples), abs=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 50), st.lists(st.integers(1, 99), min_size=1, max_size=4)), min_size=1, max_size=20))
def test_a_window_comes_back_from_its_state(rounds: list[tuple[int, list[int]]]) -> None:
    window = LengthWindow()
    for first, lengths in rounds:
        window.close_round(RoundLengths(first, tuple(GroupLengths(first, (length,)) for length in lengths), ()))
    again = LengthWindow.from_state(json.loads(json.dumps(window.to_state())))
    assert again.bias([]) == window.bias([]) > 0 and again.to_state() == window.to_state()
