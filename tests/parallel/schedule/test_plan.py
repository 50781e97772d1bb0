"""Gradients in slices: exact, causal, complete; a model's schedule is what its simulation takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule.cost import Chunk, EspCosts, Line
from parallel.schedule.gradients import Slot, dense_slot, free_bytes, partition
from parallel.schedule.pipeline import ACROSS, ATTENTION, COMPUTE, GRADIENTS, Pipelined, add_layer, every_degree
from parallel.schedule.plan import Block, plan
from parallel.schedule.timeline import Task, simulate
from tests.parallel.schedule.chunks import layers

Layer = tuple[Callable[[int], Chunk], Callable[[int], Chunk], EspCosts]
whole = st.integers(0, 30).map(float)
options = st.lists(st.builds(Pipelined, st.integers(1, 16), whole, whole), min_size=1, max_size=3).map(tuple)
slot_lists = st.lists(st.builds(Slot, options, st.integers(0, 3)), min_size=1, max_size=4)
reduces = st.builds(Line, st.integers(0, 5).map(float), st.integers(1, 5).map(float))


def seconds_of(slots: list[Slot], taken: tuple[int, ...], last_bytes: int, reduce: Line) -> float | None:
    """What this partition takes; None if a slot takes what is not complete yet."""
    pending, total = 0, 0.0
    for slot, amount in zip(slots, taken, strict=True):
        pending += slot.ready_bytes - amount
        if pending < 0:
            return None
        total += min(one.seconds(reduce.seconds(amount)) for one in slot.options)
    return total + reduce.seconds(pending + last_bytes)


@settings(max_examples=150)
@given(slot_lists, st.integers(0, 3), reduces)
def test_no_partition_is_better(slots: list[Slot], last_bytes: int, reduce: Line) -> None:
    """Against every partition into single bytes."""
    total = sum(slot.ready_bytes for slot in slots) + last_bytes
    found = partition(slots, last_bytes, reduce, units=max(total, 1))
    tried = [seconds_of(slots, taken, last_bytes, reduce) for taken in product(range(total + 1), repeat=len(slots))]
    assert found.seconds == min(one for one in tried if one is not None)
    assert found.seconds == seconds_of(slots, found.taken_S, last_bytes, reduce)


@given(slot_lists, st.integers(0, 10**6), reduces, st.integers(1, 40))
def test_coarse_units_stay_causal_and_lose_no_byte(slots: list[Slot], last_bytes: int, reduce: Line, units: int) -> None:
    slots = [Slot(slot.options, slot.ready_bytes * 12_347) for slot in slots]
    found = partition(slots, last_bytes, reduce, units)
    assert sum(found.taken_S) + found.exposed_bytes == sum(slot.ready_bytes for slot in slots) + last_bytes
    assert found.seconds == pytest.approx(seconds_of(slots, found.taken_S, last_bytes, reduce)), (
        "nothing goes before it is there"
    )
    for slot, amount, degree in zip(slots, found.taken_S, found.degrees_S, strict=True):
        chosen = min(one.seconds(reduce.seconds(amount)) for one in slot.options if one.degree == degree)
        assert chosen == min(one.seconds(reduce.seconds(amount)) for one in slot.options)


def test_what_is_free_is_filled_first() -> None:
    slots = [dense_slot(10.0, 6), dense_slot(3.0, 4), dense_slot(1.0, 0)]
    found = partition(slots, 0, Line(0.0, 1.0), units=10)
    assert found.taken_S[0] <= 6 and found.seconds == 14.0 and found.exposed_bytes == 0


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Layer], list[Block], Line]:
    drawn = [draw(layers()) for _ in range(draw(st.integers(1, 3)))]
    seconds, size = st.floats(1e-4, 1e-2), st.integers(0, 2**28)
    blocks = [
        Block(every_degree(forward), every_degree(backward), draw(seconds), draw(seconds), draw(size))
        for forward, backward, _ in drawn
    ]
    return drawn, blocks, draw(st.builds(Line, st.floats(1e-6, 1e-3), st.floats(1e-12, 1e-9)))


@settings(max_examples=30)
@given(models(), st.integers(0, 2**28))
def test_a_schedule_takes_what_its_simulation_takes(model: tuple[list[Layer], list[Block], Line], head_bytes: int) -> None:
    drawn, blocks, reduce = model
    found = plan(blocks, head_bytes, reduce, units=32)
    tasks: list[Task] = []
    ended: tuple[int, ...] = ()
    for layer in reversed(range(len(blocks))):
        degree = found.backward_degree_L[layer]
        slice_s = reduce.seconds(found.layer_bytes_L[layer])
        _, ended = add_layer(tasks, drawn[layer][1](degree), degree, gradients_s=slice_s, tokens_after=ended)
        dense = Task(ATTENTION, COMPUTE, blocks[layer].dense_backward_s, ended)
        beside = Task(GRADIENTS, ACROSS, reduce.seconds(found.dense_bytes_L[layer]), ended)
        tasks += [dense, beside]
        ended = (len(tasks) - 2, len(tasks) - 1)
    tasks.append(Task(GRADIENTS, ACROSS, reduce.seconds(found.exposed_bytes), ended))
    assert simulate(tasks).seconds == pytest.approx(found.backward_s)
    total = head_bytes + sum(block.gradient_bytes for block in blocks)
    assert sum(found.layer_bytes_L) + sum(found.dense_bytes_L) + found.exposed_bytes == total
    assert found.seconds == found.forward_s + found.backward_s


@settings(max_examples=40)
@given(models(), st.sampled_from([1, 2, 4, 8]), st.sampled_from(["layer", "dense", "behind"]), st.integers(1, 40))
def test_no_fixed_degree_is_better(model: tuple[list[Layer], list[Block], Line], degree: int, where: str, units: int) -> None:
    """With one degree everywhere, and all complete gradients in the next layer, under the next dense layers, or at the end."""
    _, blocks, reduce = model
    found = plan(blocks, 0, reduce, units)
    seconds = sum(block.forward[degree - 1].free_s + block.dense_forward_s for block in blocks)
    pending = 0
    for block in reversed(blocks):
        in_layer, under = {"layer": (pending, 0), "dense": (0, pending), "behind": (0, 0)}[where]
        seconds += block.backward[degree - 1].seconds(reduce.seconds(in_layer))
        seconds += max(block.dense_backward_s, reduce.seconds(under))
        pending += block.gradient_bytes - in_layer - under
    assert found.seconds <= (seconds + reduce.seconds(pending)) * (1 + 1e-9)


@given(slot_lists, st.integers(0, 10**6), reduces, st.integers(1, 40))
def test_the_papers_first_step_takes_what_is_free_and_is_never_better(
    slots: list[Slot], last_bytes: int, reduce: Line, units: int
) -> None:
    slots = [Slot(slot.options, slot.ready_bytes * 3) for slot in slots]
    taken = free_bytes(slots, reduce)
    for slot, amount in zip(slots, taken, strict=True):
        assert min(one.seconds(reduce.seconds(amount)) for one in slot.options) == min(one.seconds(0) for one in slot.options)
    assert partition(slots, last_bytes, reduce, units).seconds <= seconds_of(slots, taken, last_bytes, reduce) * (1 + 1e-12)
