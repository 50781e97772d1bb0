"""All layers of a model at once: what they take together, and slices that set out when they are complete."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule.cost import Line
from parallel.schedule.execution import ExecutionCosts, LayerWork, in_sequence_s, layer_seconds
from parallel.schedule.generalised import ALONE, Around
from parallel.schedule.layers import DenseGradients, passes_s, plan_layers, with_slices
from parallel.schedule.pipeline import OFF, WHOLE, Degrees
from tests.parallel.schedule.test_generalised import costs, lines, whole, works

LAYERS = st.integers(1, 4)
degrees = st.builds(Degrees, st.integers(1, 8), st.integers(1, 8))
TOKENS = 8


@st.composite
def gradients(draw: st.DrawFn, layers: int) -> DenseGradients:
    ready = draw(st.lists(st.integers(0, 30), min_size=2 * layers, max_size=2 * layers))
    return DenseGradients(tuple(accumulate(ready)), sum(ready) + draw(st.integers(1, 30)), draw(lines))


@given(costs, st.lists(works, min_size=1, max_size=4), degrees, whole)
def test_layers_run_one_behind_the_other(
    measured: ExecutionCosts, each: list[LayerWork], degree: Degrees, attention_s: float
) -> None:
    count = len(each)
    alone = [layer_seconds(measured, work, degree) for work in each]
    assert passes_s(measured, each, [ALONE] * count, [degree] * count) == pytest.approx(sum(alone))
    around = [Around(attention_s, attention_back=3.0)] * count
    assert passes_s(measured, each, around, [degree] * count) == pytest.approx(sum(alone) + 4 * count * attention_s)
    off_s = sum(in_sequence_s(measured, work) + measured.announce_s + 4 * attention_s for work in each)
    assert passes_s(measured, each, around, [OFF] * count, left_s=7.0) == pytest.approx(off_s + 7)


@given(st.data(), costs, works, LAYERS, whole, degrees)
@settings(max_examples=50)
def test_slices_are_complete_where_they_set_out_and_cost_at_most_their_own_time(
    data: st.DataObject, measured: ExecutionCosts, work: LayerWork, count: int, attention_s: float, degree: Degrees
) -> None:
    dense, arounds = data.draw(gradients(count)), [Around(attention_s)] * count
    plans, bytes_P = plan_layers(measured, [work] * count, arounds, TOKENS, [WHOLE] * count, dense)
    assert bytes_P is not None and min(bytes_P) >= 0 and len(plans) == count
    assert all(sent <= complete for sent, complete in zip(accumulate(bytes_P), dense.complete_P, strict=True))
    assert tuple(accumulate(dense.when_complete_P)) == dense.complete_P
    plain_s = passes_s(measured, [work] * count, arounds, [degree] * count)
    for sent_P in (bytes_P, dense.when_complete_P):
        sliced, left_s = with_slices(arounds, sent_P, dense.reduce), dense.left_s(sent_P)
        slices_s = left_s + sum(map(dense.reduce.seconds, sent_P))
        found_s = passes_s(measured, [work] * count, sliced, [degree] * count, left_s)
        assert plain_s + left_s <= found_s * (1 + 1e-9) and found_s <= (plain_s + slices_s) * (1 + 1e-9)
    without, none = plan_layers(measured, [work] * count, arounds, TOKENS, [WHOLE] * count, None)
    assert none is None and [one.degrees for one in without] == [without[0].degrees] * count


def test_a_slice_travels_under_the_layers_below_it_and_delays_no_token() -> None:
    """Three layers whose messages take no time: all but the last layer's gradients hide under what is computed."""
    nothing = Line(0.0, 0.0)
    measured = ExecutionCosts(nothing, nothing, Line(0.0, 1.0), Line(0.0, 1.0), Line(0.0, 1.0), Line(0.0, 1.0), 0.0)
    dense = DenseGradients((0, 0, 5, 5, 10, 10), 15, Line(0.0, 1.0))
    arounds, work = [Around(1.0)] * 3, [LayerWork(0.0, 3.0)] * 3
    plans, bytes_P = plan_layers(measured, work, arounds, TOKENS, [WHOLE] * 3, dense)
    assert bytes_P is not None and sum(bytes_P) == 10 and [one.degrees for one in plans] == [WHOLE] * 3
    sliced = with_slices(arounds, bytes_P, dense.reduce)
    computed_s = 3 * (3 * 3 + 3 * 1)
    assert passes_s(measured, work, sliced, [WHOLE] * 3, dense.left_s(bytes_P)) == pytest.approx(computed_s + 5)
