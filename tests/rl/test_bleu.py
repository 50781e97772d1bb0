"""BLEU on token ids against a count of n-grams in plain Python."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl.rewards.bleu import bleu

ids = st.lists(st.integers(0, 4) | st.integers(10**6, 10**6 + 1), max_size=14)


def reference_bleu(candidate: list[int], reference: list[int], max_order: int) -> float:
    """By the book: Papineni et al. 2002 with Lin and Och's smoothing."""
    logs = 0.0
    for order in range(1, max_order + 1):
        have, want = (Counter(tuple(t[i : i + order]) for i in range(len(t) - order + 1)) for t in (candidate, reference))
        common, total = sum((have & want).values()), sum(have.values())
        if order > 1:
            common, total = common + 1, total + 1
        if common == 0:
            return 0.0
        logs += math.log(common / total)
    brevity = min(0.0, 1 - len(reference) / len(candidate))
    return math.exp(brevity + logs / max_order)


def padded(rows: list[list[int]], width: int, padding: int) -> tuple[Tensor, Tensor]:
    filled = [row + [padding] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64).view(len(rows), width), torch.tensor([len(row) for row in rows])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=5), st.integers(1, 5), st.integers(0, 4))
def test_bleu_is_that_of_a_plain_count_whatever_else_is_in_the_batch_and_in_the_padding(
    pairs: list[tuple[list[int], list[int]]], max_order: int, padding: int
) -> None:
    candidates, references = ([pair[side] for pair in pairs] for side in (0, 1))
    found = bleu(*padded(candidates, 14, padding), *padded(references, 17, padding), max_order=max_order)
    expected = [reference_bleu(*pair, max_order) for pair in pairs]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_a_known_value() -> None:
    """The candidate of Papineni's example 2, a word seven times: clipped to two. Then 2/7, 1/7, 1/6, 1/5 and no brevity."""
    the, reference = [[1] * 7], [[1, 2, 3, 4, 1, 5]]
    found = bleu(*padded(the, 7, 0), *padded(reference, 6, 0))
    assert found.item() == pytest.approx((2 / 7 * 1 / 7 * 1 / 6 * 1 / 5) ** 0.25, rel=1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 6))
def test_a_copy_is_worth_one_and_a_shorter_one_less(tokens: list[int], max_order: int) -> None:
    row, length = padded([tokens], 30, 0)
    assert bleu(row, length, row, length, max_order).item() == pytest.approx(1.0, rel=1e-6)
    if len(tokens) > 1:
        assert bleu(row, length - 1, row, length, max_order).item() < 1


def test_nothing_is_worth_nothing() -> None:
    nothing, some = padded([[], [], [1]], 3, 1), padded([[], [1, 2], []], 3, 1)
    assert bleu(*nothing, *some).tolist() == [0.0, 0.0, 0.0]
