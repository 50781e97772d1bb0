"""Timelines are legal: nothing overlaps on a resource or starts before what it waits for, and nothing idles needlessly."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.schedule.timeline import Task, Timeline, simulate

RESOURCES = ("compute", "near", "far")


@st.composite
def task_lists(draw: st.DrawFn) -> list[Task]:
    count = draw(st.integers(0, 14))
    tasks = []
    for place in range(count):
        after = draw(st.sets(st.integers(0, place - 1), max_size=3)) if place else set()
        tasks.append(
            Task(f"task {place}", draw(st.sampled_from(RESOURCES)), float(draw(st.integers(0, 9))), tuple(sorted(after)))
        )
    return tasks


def lanes(timeline: Timeline) -> dict[str, list[tuple[float, float]]]:
    spans = [(span.task.resource, span.start_s, span.end_s) for span in timeline.spans]
    return {one: sorted((start, end) for resource, start, end in spans if resource == one) for one in RESOURCES}


@given(task_lists())
def test_every_timeline_is_legal(tasks: list[Task]) -> None:
    timeline = simulate(tasks)
    assert [span.task for span in timeline.spans] == tasks
    for span in timeline.spans:
        assert span.end_s == span.start_s + span.task.seconds
        assert all(timeline.spans[before].end_s <= span.start_s for before in span.task.after)
    for lane in lanes(timeline).values():
        assert all(end <= start for (_, end), (start, _) in pairwise(lane))
    assert timeline == simulate(tasks)


@given(task_lists())
def test_no_resource_idles_while_a_task_could_start(tasks: list[Task]) -> None:
    timeline = simulate(tasks)
    for span in timeline.spans:
        able_s = max((timeline.spans[before].end_s for before in span.task.after), default=0.0)
        # From the moment it may start to its start, its resource is busy throughout.
        at_s = able_s
        for start, end in lanes(timeline)[span.task.resource]:
            if start <= at_s < end and start < span.start_s:
                at_s = end
        assert at_s >= span.start_s


def ticking(tasks: list[Task]) -> list[float]:
    """When each task starts, found by looking at every whole second in turn."""
    starts: dict[int, float] = {}
    second = 0.0
    while len(starts) < len(tasks):
        ended = {place for place, start in starts.items() if start + tasks[place].seconds <= second}
        busy = {tasks[place].resource for place in starts.keys() - ended}
        for place, task in enumerate(tasks):
            if place not in starts and task.resource not in busy and ended.issuperset(task.after):
                starts[place] = second
                busy.add(task.resource)
        second += 1
    return [starts[place] for place in range(len(tasks))]


@given(task_lists())
def test_every_start_is_that_of_a_simulation_second_by_second(tasks: list[Task]) -> None:
    tasks = [replace(task, seconds=task.seconds + 1) for task in tasks]
    assert [span.start_s for span in simulate(tasks).spans] == ticking(tasks)


@given(task_lists())
def test_time_is_between_its_bounds(tasks: list[Task]) -> None:
    timeline = simulate(tasks)
    longest: list[float] = []
    for task in tasks:
        longest.append(task.seconds + max((longest[before] for before in task.after), default=0.0))
    assert timeline.seconds <= sum(task.seconds for task in tasks)
    assert timeline.seconds >= max(longest, default=0.0)
    assert all(timeline.seconds >= timeline.busy_s(resource) for resource in RESOURCES)


def test_the_first_in_the_list_goes_first() -> None:
    tasks = [Task("long", "far", 2.0), Task("later", "near", 1.0, (0,)), Task("soon", "near", 3.0), Task("last", "near", 1.0)]
    starts = [span.start_s for span in simulate(tasks).spans]
    assert starts == [0.0, 3.0, 0.0, 4.0], "a free link takes what is there, and of what is there the first"


@pytest.mark.parametrize(("task", "said"), [(Task("b", "x", 1.0, (1,)), "not before"), (Task("b", "x", -1.0), "-1.0 seconds")])
def test_what_is_no_list_of_tasks_is_refused(task: Task, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        simulate([Task("a", "x", 1.0), task])
