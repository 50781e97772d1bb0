"""Random layers for the tests of schedules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hypothesis import strategies as st

from parallel.schedule.cost import Chunk, EspCosts, Line, esp_chunk, esp_workload

whole = st.integers(1, 40).map(float)  # whole seconds, so that sums are exact and ties are ties
esp_chunks = st.builds(Chunk, expert_s=whole, across_s=whole, gather_s=whole, scatter_s=whole)
any_chunks = st.builds(
    Chunk,
    expert_s=whole,
    across_s=st.integers(0, 40).map(float),
    within_s=st.integers(0, 40).map(float),
    gather_s=st.integers(0, 40).map(float),
    scatter_s=st.integers(0, 40).map(float),
)
lines = st.builds(Line, st.floats(1e-6, 1e-3), st.floats(1e-12, 1e-8))
esp_costs = st.builds(EspCosts, lines, lines, lines, lines, st.builds(Line, st.floats(1e-6, 1e-3), st.floats(1e-15, 1e-12)))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Callable[[int], Chunk], Callable[[int], Chunk], EspCosts]:
    """(chunks forward, chunks backward, costs) of a layer by its degree."""
    costs = draw(esp_costs)
    work = esp_workload(
        tokens=draw(st.integers(64, 8192)),
        hidden=draw(st.sampled_from([512, 1024, 4096])),
        expert_hidden=draw(st.sampled_from([512, 4096, 16384])),
        top_k=draw(st.integers(1, 8)),
        capacity=draw(st.floats(1.0, 2.4)),
        devices_per_node=draw(st.sampled_from([1, 4, 8])),
        products=draw(st.integers(2, 3)),
    )
    return partial(esp_chunk, costs, work, backward=False), partial(esp_chunk, costs, work, backward=True), costs
