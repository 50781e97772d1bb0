"""Costs come out of two timings, and are never nothing, however a machine was disturbed between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.profiling import line


@given(st.floats(0, 1), st.floats(1e-9, 1e-3))
def test_a_line_through_two_timings_is_found(fixed_s: float, each_s: float) -> None:
    many = 1_000_000
    fixed_s = min(fixed_s, each_s * many)  # so that at least half of the time is that of the amount
    found = line(1000, fixed_s + 1000 * each_s, many, fixed_s + many * each_s)
    assert found == (pytest.approx(fixed_s, abs=1e-9), pytest.approx(each_s))


@given(st.floats(1e-9, 10), st.floats(1e-9, 10))
def test_no_timing_makes_an_amount_free(few_s: float, many_s: float) -> None:
    fixed_s, each_s = line(10, few_s, 1000, many_s)
    assert fixed_s >= 0 and each_s > 0 and fixed_s + 1000 * each_s >= many_s * 0.5
