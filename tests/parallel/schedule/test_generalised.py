"""A layer with what shares its links: nothing is lost, links do one thing at a time, and slices cost what they say."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule.cost import Line
from parallel.schedule.execution import ExecutionCosts, LayerWork, backward_tasks, forward_tasks, plan_layer
from parallel.schedule.generalised import ALONE, LINK, Around, backward_around, forward_around, slices_of, slots_of
from parallel.schedule.pipeline import ATTENTION, COMPUTE, COPIES, GRADIENTS, Copies, Degrees
from parallel.schedule.slices import Piece, messages, pieces, place_of
from parallel.schedule.timeline import Task, simulate

whole = st.integers(0, 20).map(float)
lines = st.builds(Line, whole, st.integers(1, 5).map(float))
costs = st.builds(ExecutionCosts, lines, lines, lines, lines, lines, lines, whole)
works = st.builds(LayerWork, st.integers(0, 16).map(float), st.integers(1, 16).map(float))
copies = st.builds(Copies, whole, whole)
arounds = st.builds(Around, whole, copies, copies, whole, whole, attention_back=st.integers(0, 4))
degrees = st.integers(1, 8)


def total_s(tasks: list[Task]) -> float:
    return sum(task.seconds for task in tasks)


@given(costs, works, degrees, arounds)
def test_what_lies_around_is_added_to_the_layer_and_no_link_does_two_things(
    measured: ExecutionCosts, work: LayerWork, degree: int, around: Around
) -> None:
    for layer_tasks, around_of, added_s in (
        (forward_tasks, forward_around, around.attention_s + around.copies.across_s + around.copies.within_s),
        (
            *(backward_tasks, backward_around),
            around.attention_back_s + around.back.across_s + around.back.within_s + around.layer_slice_s + around.dense_slice_s,
        ),
    ):
        layer = layer_tasks(measured, work, degree)
        tasks = around_of(layer, around)
        assert around_of(layer, ALONE) == layer
        assert total_s(tasks) == pytest.approx(total_s(layer) + added_s)
        timeline = simulate(tasks)
        assert timeline.seconds >= simulate(layer).seconds * (1 - 1e-12)
        for resource in (COMPUTE, LINK):
            spans = sorted((span.start_s, span.end_s) for span in timeline.spans if span.task.resource == resource)
            assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(spans))


@given(costs, works, degrees, arounds)
def test_experts_wait_for_copies_and_combines_for_the_slice(
    measured: ExecutionCosts, work: LayerWork, degree: int, around: Around
) -> None:
    ahead = simulate(forward_around(forward_tasks(measured, work, degree), around)).spans
    attended = [span.end_s for span in ahead if span.task.name == ATTENTION]
    there = [span.end_s for span in ahead if span.task.name == COPIES]
    layer = [span for span in ahead if span.task.name not in (ATTENTION, COPIES)]
    assert all(span.start_s >= max(attended) for span in layer) if attended else True
    assert all(span.start_s >= max(there) for span in layer if span.task.name.startswith("experts")) if there else True
    back = simulate(backward_around(backward_tasks(measured, work, degree), around)).spans
    slices = [span for span in back if span.task.name == GRADIENTS]
    assert len(slices) == (around.layer_slice_s > 0) + (around.dense_slice_s > 0)
    if around.layer_slice_s and work.row_bytes:
        ends = [span.end_s for span in back if span.task.name.startswith("dispatch")]
        starts = [span.start_s for span in back if span.task.name.startswith("combine")]
        assert not ends or max(ends) <= slices[0].start_s
        assert not starts or slices[0].end_s <= min(starts)


@settings(max_examples=50)
@given(costs, works, st.integers(1, 6), arounds, st.tuples(st.integers(0, 50), st.integers(0, 50)), lines, st.integers(0, 50))
def test_slices_are_legal_and_a_layer_with_its_slice_takes_what_its_slot_says(
    measured: ExecutionCosts, work: LayerWork, most: int, around: Around, ready: tuple[int, int], reduce: Line, last: int
) -> None:
    backward_of = partial(backward_tasks, measured, work)
    slots = slots_of(backward_of, range(1, most + 1), around, ready)
    found = slices_of(slots, last, reduce)
    assert 0 <= found.taken_S[0] <= ready[0] and found.taken_S[1] >= 0 and sum(found.taken_S) <= sum(ready)
    assert sum(found.taken_S) + found.exposed_bytes == sum(ready) + last
    for option in slots[0].options:
        for gradients_s in (0.0, 1e6):  # where it is hidden, and where it binds
            taken = simulate(backward_around(backward_of(option.degree), Around(layer_slice_s=gradients_s))).seconds
            assert taken == pytest.approx(option.seconds(gradients_s))


def test_a_slice_that_fills_a_gap_costs_nothing_and_copies_leave_less_of_it() -> None:
    """Rows 2 each way, products 10, weights 10, attention 4 forward and 8 backward; a byte of gradients takes a second."""
    none, one = Line(0.0, 0.0), Line(0.0, 1.0)
    measured = ExecutionCosts(one, none, Line(0.0, 10.0), Line(0.0, 10.0), Line(0.0, 10.0), none, 0.0)
    work = LayerWork(2.0, 1.0)
    backward_of = partial(backward_tasks, measured, work)
    free = slices_of(slots_of(backward_of, [1], Around(4.0), (30, 0)), 0, one)
    assert free.taken_S == (18, 8) and free.exposed_bytes == 4  # 22 without the 4 of the rows; all of the attention
    with_copies = slices_of(slots_of(backward_of, [1], Around(4.0, back=Copies(0.0, 6.0)), (30, 0)), 0, one)
    assert with_copies.taken_S == (18, 2) and with_copies.exposed_bytes == 10
    plan = plan_layer(measured, work, 1, Degrees(1, 1), Around(4.0, Copies(0.0, 7.0), Copies(0.0, 6.0), 18.0, 2.0))
    assert plan.forward.seconds == 7 + 2 + 10 + 2 and plan.backward.seconds == 22 + 8
    names = [span.task.name for span in plan.backward.spans]
    assert names.count(GRADIENTS) == 2 and names.count(COPIES) == 1


@given(st.lists(st.integers(0, 9), max_size=8), st.data())
def test_pieces_of_slices_are_all_numbers_once_and_in_order(sizes: list[int], data: st.DataObject) -> None:
    total = sum(sizes)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    found: list[Piece] = []
    for start, stop in zip([0, *cuts], [*cuts, total], strict=True):
        runs = messages(start, stop, data.draw(st.integers(1, 12)))
        assert [first for first, _ in runs[1:]] == [last for _, last in runs[:-1]]
        found += [piece for run in runs for piece in pieces(sizes, *run)]
    numbers = [(piece.parameter, number) for piece in found for number in range(piece.start, piece.stop)]
    assert numbers == [(parameter, number) for parameter, size in enumerate(sizes) for number in range(size)]


def test_places_stand_in_the_order_of_the_backward_pass() -> None:
    assert [place_of(layer, 3, which) for layer in (2, 1, 0) for which in (0, 1)] == list(range(6))
