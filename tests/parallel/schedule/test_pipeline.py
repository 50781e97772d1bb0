"""Chunks of a layer: against an independent recursion, against bounds, and against every fixed degree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule.closed_form import CODED_DEGREES, case_of, closed_form_degree, coded_degree
from parallel.schedule.cost import Chunk, EspCosts
from parallel.schedule.pipeline import (
    ACROSS,
    COMPUTE,
    MOST_CHUNKS,
    WITHIN,
    best,
    every_degree,
    layer_tasks,
    pipelined,
)
from parallel.schedule.timeline import simulate
from tests.parallel.schedule.chunks import any_chunks, esp_chunks, layers

Layer = tuple[Callable[[int], Chunk], Callable[[int], Chunk], EspCosts]


def recursion(chunk: Chunk, degree: int, gradients_s: float) -> float:
    """FSMoE's three streams, written down without tasks: dispatches, gradients and combines in this order between nodes; within
    nodes whatever can start first, gathers before scatters; experts one after the other."""
    arrived = [chunk.across_s * (i + 1) for i in range(degree)]
    across, within, compute = degree * chunk.across_s + gradients_s, 0.0, 0.0
    computed: list[float] = []
    summed: list[float] = []
    while len(summed) < degree:
        able = []
        if len(computed) < degree:
            able.append((max(within, arrived[len(computed)]), 0))
        if len(computed) > len(summed):
            able.append((max(within, computed[len(summed)]), 1))
        start, kind = min(able)
        if kind == 0:
            within = start + chunk.gather_s
            compute = max(compute, within) + chunk.expert_s
            computed.append(compute)
        else:
            within = start + chunk.scatter_s
            summed.append(within)
    for one in summed:
        across = max(across, one) + chunk.across_s
    return across


@settings(max_examples=300)
@given(esp_chunks, st.integers(1, MOST_CHUNKS), st.integers(0, 300).map(float))
def test_the_simulation_equals_the_recursion(chunk: Chunk, degree: int, gradients_s: float) -> None:
    assert simulate(layer_tasks(chunk, degree, gradients_s)).seconds == recursion(chunk, degree, gradients_s)


@settings(max_examples=300)
@given(any_chunks, st.integers(1, MOST_CHUNKS), st.integers(0, 300).map(float))
def test_gradients_cost_what_does_not_fit_beside_the_tokens(chunk: Chunk, degree: int, gradients_s: float) -> None:
    found = pipelined(lambda _: chunk, degree)
    assert found.seconds(gradients_s) == simulate(layer_tasks(chunk, degree, gradients_s)).seconds


@given(any_chunks, st.integers(1, MOST_CHUNKS), st.integers(0, 300).map(float))
def test_a_layer_keeps_every_bound(chunk: Chunk, degree: int, gradients_s: float) -> None:
    r, timeline = degree, simulate(layer_tasks(chunk, degree, gradients_s))
    exchange_s = max(chunk.across_s, chunk.within_s)
    assert timeline.seconds >= 2 * r * chunk.across_s + gradients_s
    assert timeline.seconds >= r * (2 * chunk.within_s + chunk.gather_s + chunk.scatter_s)
    assert timeline.seconds >= 2 * exchange_s + chunk.gather_s + chunk.scatter_s + r * chunk.expert_s
    in_sequence = r * (2 * (chunk.across_s + chunk.within_s) + chunk.gather_s + chunk.scatter_s + chunk.expert_s) + gradients_s
    assert timeline.seconds <= in_sequence
    if degree == 1 and gradients_s == 0:
        assert timeline.seconds == 2 * exchange_s + chunk.gather_s + chunk.scatter_s + chunk.expert_s
    assert timeline.busy_s(COMPUTE) == r * chunk.expert_s and timeline.busy_s(ACROSS) == 2 * r * chunk.across_s + gradients_s
    assert timeline.busy_s(WITHIN) == r * (2 * chunk.within_s + chunk.gather_s + chunk.scatter_s)


@settings(max_examples=60)
@given(layers(), st.floats(0, 0.1))
def test_no_fixed_degree_and_no_closed_form_is_better_than_the_plan(layer: Layer, gradients_s: float) -> None:
    for chunk_of, slice_s in ((layer[0], 0.0), (layer[1], gradients_s)):
        options = every_degree(chunk_of)
        assert [one.degree for one in options] == list(range(1, MOST_CHUNKS + 1))
        plan_s = best(options, slice_s).seconds(slice_s)
        for degree in (1, 2, 4, 8, closed_form_degree(chunk_of, slice_s, range(1, 17)), coded_degree(chunk_of, slice_s)):
            simulated_s = simulate(layer_tasks(chunk_of(degree), degree, slice_s)).seconds
            assert plan_s <= simulated_s * (1 + 1e-12)


@given(esp_chunks, st.integers(1, MOST_CHUNKS), st.integers(0, 300).map(float))
def test_the_closed_form_never_expects_more_than_the_simulation_but_in_its_third_case(
    chunk: Chunk, degree: int, gradients_s: float
) -> None:
    case, seconds = case_of(chunk, degree, gradients_s)
    simulated_s = recursion(chunk, degree, gradients_s)
    assert seconds <= simulated_s or (case == "exchange" and degree > 1)
    if degree == 1 and case != "across":
        assert seconds == simulated_s


@pytest.mark.parametrize(
    ("chunk", "gradients_s", "case", "seconds"),
    [
        (Chunk(expert_s=1.0, across_s=10.0, gather_s=1.0, scatter_s=1.0), 50.0, "across", 4 * 20 + 50.0),
        (Chunk(expert_s=50.0, across_s=2.0, gather_s=1.0, scatter_s=1.0), 0.0, "experts", 2 * 2 + 2 + 4 * 50.0),
        (Chunk(expert_s=1.0, across_s=10.0, gather_s=1.0, scatter_s=1.0), 0.0, "exchange", 4 * 20 + 2.0),
        (Chunk(expert_s=1.0, across_s=1.0, gather_s=10.0, scatter_s=10.0), 0.0, "within", 2 * 1 + 4 * 20.0),
    ],
)
def test_each_case_of_the_paper(chunk: Chunk, gradients_s: float, case: str, seconds: float) -> None:
    assert case_of(chunk, 4, gradients_s) == (case, seconds)
    simulated_s = simulate(layer_tasks(chunk, 4, gradients_s)).seconds
    assert simulated_s == (80.0 if case == "exchange" else seconds), "what comes beside a long exchange costs nothing"


def test_short_exchanges_stay_whole_as_in_the_papers_code() -> None:
    chunk = Chunk(expert_s=1.0, across_s=0.9e-3, gather_s=1e-4, scatter_s=1e-4)
    assert coded_degree(lambda degree: replace(chunk, expert_s=1 / degree), 0.0) == 1
    assert set(CODED_DEGREES) == {1, 2, 4, 8}
