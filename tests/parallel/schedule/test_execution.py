"""Layers as chunked_experts.py runs them: bounds, order, and no degree that is clearly faster than the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.cuts import FINEST, backward_cut, forward_cut
from parallel.flows import Plan
from parallel.placement import Topology, even_owners, without_copies
from parallel.schedule.cost import Line
from parallel.schedule.execution import (
    NEARLY,
    UP_SHARE,
    ExecutionCosts,
    LayerWork,
    again_tasks,
    backward_tasks,
    forward_tasks,
    in_sequence_s,
    layer_seconds,
    layer_work,
    plan_layer,
)
from parallel.schedule.generalised import Around
from parallel.schedule.pipeline import COMPUTE, MOST_CHUNKS, OFF, WHOLE, WITHIN, Degrees
from parallel.schedule.timeline import simulate

starts = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))
slopes = st.floats(1e-6, 10.0)
lines = st.builds(Line, starts, slopes)
costs = st.builds(ExecutionCosts, lines, lines, lines, lines, lines, lines, starts, lines, lines)
amounts = st.floats(0.0, 100.0)


@st.composite
def works(draw: st.DrawFn) -> LayerWork:
    """Over one level, where part of the entries may stay, or over two."""
    entries = draw(amounts)
    if draw(st.booleans()):
        return LayerWork(draw(amounts), entries, staying=entries * draw(st.floats(0.0, 1.0)))
    return LayerWork(draw(amounts), entries, draw(st.floats(1e-3, 100.0)))


DEGREES = range(1, MOST_CHUNKS + 1)


@given(costs, works(), st.integers(1, 40))
def test_no_degree_without_empty_chunks_is_clearly_faster(measured: ExecutionCosts, work: LayerWork, tokens: int) -> None:
    found = plan_layer(measured, work, tokens)
    for tasks_of, timeline, degree in (
        (forward_tasks, found.forward, found.degrees.forward),
        (backward_tasks, found.backward, found.degrees.backward),
    ):
        tried = {one: simulate(tasks_of(measured, work, one)).seconds for one in DEGREES if one <= tokens}
        assert tried[degree] == timeline.seconds <= (1 + NEARLY) * min(tried.values())
        assert all(seconds > (1 + NEARLY) * min(tried.values()) for one, seconds in tried.items() if one < degree)


@given(costs, works(), st.integers(1, 40), st.sampled_from(DEGREES), st.sampled_from(DEGREES))
def test_degrees_stay_while_they_are_nearly_the_fastest(
    measured: ExecutionCosts, work: LayerWork, tokens: int, forward: int, backward: int
) -> None:
    found = plan_layer(measured, work, tokens, Degrees(forward, backward))
    anew = plan_layer(measured, work, tokens)
    for tasks_of, present, now, other in (
        (forward_tasks, forward, found.degrees.forward, anew.degrees.forward),
        (backward_tasks, backward, found.degrees.backward, anew.degrees.backward),
    ):
        fastest_s = min(simulate(tasks_of(measured, work, one)).seconds for one in DEGREES if one <= tokens)
        good = present <= tokens and simulate(tasks_of(measured, work, present)).seconds <= (1 + NEARLY) * fastest_s
        assert now == (present if good else other)


@given(costs, works(), st.integers(1, 40), st.sets(st.sampled_from(DEGREES), min_size=1))
def test_degrees_that_were_measured_come_first(measured: ExecutionCosts, work: LayerWork, tokens: int, tried: set[int]) -> None:
    """But for one chunk, which is what layers have at first. A layer takes what its parts say, so what was measured changes
    no time."""
    found = plan_layer(replace(measured, times=((0, 1.0), *((degree, 1.0) for degree in sorted(tried)))), work, tokens)
    for tasks_of, degree in ((forward_tasks, found.degrees.forward), (backward_tasks, found.degrees.backward)):
        seconds = {one: simulate(tasks_of(measured, work, one)).seconds for one in DEGREES if one <= tokens}
        near = [one for one, taken in seconds.items() if taken <= (1 + NEARLY) * min(seconds.values())]
        assert degree == (1 if 1 in near else min(tried & {*near}, default=near[0]))


def bound_s(costs: ExecutionCosts, work: LayerWork) -> float:
    """What no degree can beat: the experts alone, or the messages of one kind of links alone, forward and backward."""
    computed_s = (
        costs.forward.seconds(work.entries) + costs.backward.seconds(work.entries) + costs.weights.seconds(work.entries)
    )
    return max(computed_s, 4 * costs.exchange.seconds(work.row_bytes), 4 * costs.inside.seconds(work.inside_bytes))


@given(costs, works(), st.sampled_from(DEGREES))
def test_every_degree_keeps_the_bound_and_the_order(measured: ExecutionCosts, work: LayerWork, degree: int) -> None:
    ahead, back = (simulate(tasks_of(measured, work, degree)) for tasks_of in (forward_tasks, backward_tasks))
    assert ahead.seconds + back.seconds >= bound_s(measured, work) * (1 - 1e-9)
    if degree == 1:
        assert ahead.seconds + back.seconds <= in_sequence_s(measured, work) * (1 + 1e-9)
    for timeline in (ahead, back):
        for resource in {span.task.resource for span in timeline.spans}:
            begins = [span.start_s for span in timeline.spans if span.task.resource == resource]
            assert begins == sorted(begins)


@given(costs, works(), st.sampled_from(DEGREES))
def test_forward_again_nothing_is_given_back_and_down_is_left_out(
    measured: ExecutionCosts, work: LayerWork, degree: int
) -> None:
    again, ahead = again_tasks(measured, work, degree), forward_tasks(measured, work, degree)
    back = ("scatter", "sum", "combine", "collect")
    there = [(task.name, task.resource, task.seconds) for task in ahead if not task.name.startswith((*back, "experts"))]
    assert there == [(task.name, task.resource, task.seconds) for task in again if not task.name.startswith("experts")]
    products = [sum(task.seconds for task in tasks if task.name.startswith("experts")) for tasks in (again, ahead)]
    assert UP_SHARE * products[1] * (1 - 1e-9) <= products[0] <= products[1]
    assert simulate(again).seconds <= simulate(ahead).seconds * (1 + 1e-9)


def test_equal_messages_and_products_hide_all_but_the_first_and_the_last() -> None:
    one, none = Line(0.0, 1.0), Line(0.0, 0.0)
    measured = ExecutionCosts(one, none, Line(0.0, 2.0), Line(0.0, 2.0), Line(0.0, 2.0), none, 0.0)
    work = LayerWork(8.0, 8.0)
    # whole: 8 there, 16 of products, 8 back; in four chunks: 2 there, 16, 2 back
    assert [simulate(forward_tasks(measured, work, degree)).seconds for degree in (1, 4)] == [32.0, 20.0]
    # the gradients of the weights, 16, hide the way back
    assert [simulate(backward_tasks(measured, work, degree)).seconds for degree in (1, 4)] == [40.0, 34.0]


def test_what_stays_is_computed_while_others_are_waited_for() -> None:
    one, none = Line(0.0, 1.0), Line(0.0, 0.0)
    measured = ExecutionCosts(one, none, Line(0.0, 2.0), Line(0.0, 2.0), Line(0.0, 2.0), none, 0.0)
    work = LayerWork(8.0, 8.0, staying=4.0)
    # in two chunks: products of 4 under the first 4 there, of 8, and of 4 under the last 4 back
    assert [simulate(forward_tasks(measured, work, degree)).seconds for degree in (1, 2)] == [32.0, 16.0]
    names = [span.task.name for span in simulate(forward_tasks(measured, work, 2)).spans if span.task.resource == COMPUTE]
    assert names == ["experts here 1", "experts 1", "experts 2", "experts here 2"]
    # products of 8 under those that come, 8 of what came, and 16 of gradients of the weights; nothing is waited for
    assert [simulate(backward_tasks(measured, work, degree)).seconds for degree in (1, 2)] == [40.0, 32.0]


def test_links_between_and_within_nodes_carry_at_the_same_time() -> None:
    one, none = Line(0.0, 1.0), Line(0.0, 0.0)
    measured = ExecutionCosts(one, none, one, one, one, none, 0.0, inside=one, relay=none)
    work = LayerWork(8.0, 8.0, 8.0)
    assert [simulate(forward_tasks(measured, work, degree)).seconds for degree in (1, 8)] == [40.0, 18.0]
    # in eight chunks the link within nodes is busy for 16, behind the first dispatch and before the last combine
    names = [span.task.name for span in simulate(forward_tasks(measured, work, 3)).spans if span.task.resource == WITHIN]
    assert names == ["gather 1", "gather 2", "scatter 1", "gather 3", "scatter 2", "scatter 3"]


def test_what_costs_nothing_in_chunks_stays_whole() -> None:
    measured = ExecutionCosts(*(Line(1.0, 1e-9) for _ in range(6)), announce_s=0.0)
    assert plan_layer(measured, LayerWork(8.0, 8.0), tokens=100).degrees == WHOLE
    assert (
        plan_layer(replace(measured, exchange=Line(0.0, 1.0), forward=Line(0.0, 2.0)), LayerWork(8.0, 8.0), 1).degrees == WHOLE
    )


def test_the_work_of_a_layer_is_that_of_its_busiest_rank() -> None:
    """Two ranks, two experts, top-1: of 30 tokens a rank gives, on average, so many as the other's expert has."""
    plan = Plan(without_copies(even_owners(2, 2), 2))
    work = layer_work(plan, np.array([40.0, 20.0]), Topology(2, 1), 1, 8, "messages")
    assert work.entries == 40.0 and work.row_bytes == pytest.approx(20 * 8) and work.staying == 20.0
    assert work.differs(replace(work, entries=30.0), 0.2) and not work.differs(replace(work, entries=39.0), 0.2)


def test_over_two_levels_a_row_goes_to_a_node_once() -> None:
    """Random choices of all ranks, counted, against what their mean loads let expect."""
    topology, top_k, experts, tokens = Topology(6, 3), 4, 48, 4000
    plan = Plan(without_copies(even_owners(experts, 6), 6))
    random = np.random.default_rng(0)
    rank_WTK = random.random((6, tokens, experts)).argsort(axis=2)[:, :, :top_k] // 8
    loads_E = np.full(experts, 6 * tokens * top_k / experts)
    work = layer_work(plan, loads_E, topology, top_k, 1, "two_level")
    served = [[{int(rank) for rank in row} for row in rank_TK] for rank_TK in rank_WTK]
    crossing = [sum(any(rank // 3 != me // 3 for rank in row) for row in rows) for me, rows in enumerate(served)]
    inside = [sum(rank // 3 == 0 and rank != me % 3 for row in rows for rank in row) for me, rows in enumerate(served)]
    assert work.row_bytes == pytest.approx(np.mean(crossing), rel=0.1)  # choices do not know of each other in what is expected
    relayed = [inside[place] + inside[place + 3] for place in range(3)]  # by the first node's ranks, to others there
    assert work.inside_bytes == pytest.approx(np.mean(relayed), rel=0.1)
    assert layer_work(plan, loads_E, topology, top_k, 1, "messages").row_bytes > work.row_bytes


def test_every_degree_divides_the_finest_parts() -> None:
    assert all(FINEST % degree == 0 for degree in DEGREES)


def test_what_each_chunk_costs_beside_its_parts_keeps_layers_whole_where_it_is_more_than_they_hide() -> None:
    """Rows 6 each way, experts 12 forward; backward 12 and weights 12."""
    one, none = Line(0.0, 1.0), Line(0.0, 0.0)
    measured = ExecutionCosts(one, none, Line(0.0, 12.0), Line(0.0, 12.0), Line(0.0, 12.0), none, 0.0)
    work = LayerWork(6.0, 1.0)
    assert plan_layer(measured, work, 100).degrees.forward > 1
    costly = replace(measured, chunk_s=3.0)
    assert simulate(forward_tasks(costly, work, 3)).seconds == pytest.approx(2 + 4 + 3 + 4 + 3 + 4 + 2)  # first, experts, last
    assert plan_layer(costly, work, 100).degrees.forward == 2
    assert plan_layer(replace(measured, chunk_s=40.0), work, 100).degrees == WHOLE


@given(costs, works(), st.sampled_from(DEGREES), st.floats(0.0, 1.0))
def test_no_layer_is_faster_for_it(measured: ExecutionCosts, work: LayerWork, degree: int, chunk_s: float) -> None:
    costly = replace(measured, chunk_s=chunk_s)
    for tasks_of in (forward_tasks, backward_tasks):
        before, after = (simulate(tasks_of(one, work, degree)).seconds for one in (measured, costly))
        cut_of = forward_cut if tasks_of is forward_tasks else backward_cut
        more = len(cut_of(degree, apart=work.staying > 0)) - 1
        assert before * (1 - 1e-12) <= after <= (before + more * chunk_s) * (1 + 1e-9)


@given(costs, works(), st.lists(st.floats(0.5, 2.0), min_size=4, max_size=4), st.integers(1, 40), st.floats(0.0, 5.0))
def test_how_long_a_layer_took_counts_where_it_was_measured(
    measured: ExecutionCosts, work: LayerWork, factors: list[float], tokens: int, attention_s: float
) -> None:
    known = replace(measured, times=tuple(zip((0, 1, 2, 4), factors, strict=True)))
    for way, factor in zip((OFF, WHOLE, Degrees(2, 2), Degrees(4, 4)), factors, strict=True):
        assert layer_seconds(known, work, way) == pytest.approx(factor * layer_seconds(measured, work, way))
    assert known.factor(3) == pytest.approx((known.factor(2) + known.factor(4)) / 2) and known.factor(16) == known.factor(4)
    found = plan_layer(known, work, tokens, around=Around(attention_s))
    for tasks_of, degree in ((forward_tasks, found.degrees.forward), (backward_tasks, found.degrees.backward)):
        more_s = attention_s if tasks_of is forward_tasks else 2 * attention_s  # as long, however the layer runs
        tried = {
            one: more_s + simulate(tasks_of(known, work, one)).seconds * known.factor(one) for one in DEGREES if one <= tokens
        }
        assert tried[degree] <= (1 + NEARLY) * min(tried.values()) * (1 + 1e-9)
    planned_s = layer_seconds(replace(known, announce_s=0.0), work, found.degrees) + 3 * attention_s
    assert found.seconds == pytest.approx(planned_s)
    assert found.whole_s == pytest.approx(layer_seconds(replace(known, announce_s=0.0), work, WHOLE) + 3 * attention_s)
