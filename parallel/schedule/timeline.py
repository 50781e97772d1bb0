"""Exact event simulation of tasks on resources: a few links and the device's compute, each of which does one thing at a time.

Deterministic: the same tasks give the same timeline, on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush


@dataclass(frozen=True)
class Task:
    """Keeps its resource busy for this many seconds without a break, once the tasks `after` which it comes have ended."""

    name: str
    resource: str
    seconds: float
    after: tuple[int, ...] = ()  # places in the list of tasks, before its own


@dataclass(frozen=True)
class Span:
    """When a task ran."""

    task: Task
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """One span for each task, in the order of the tasks."""

    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        return max((span.end_s for span in self.spans), default=0.0)

    def busy_s(self, resource: str) -> float:
        return sum(span.task.seconds for span in self.spans if span.task.resource == resource)


def simulate(tasks: Sequence[Task]) -> Timeline:
    """When each task runs if no resource idles while one of its tasks could start.

    A free resource takes, of its tasks that may start, the one that stands first in the list.

    Raises:
        ValueError: a task takes less than no time, or comes after one that does not stand before it.
    """
    followers = _followers(tasks)
    waits_for = [len(task.after) for task in tasks]
    able: dict[str, list[int]] = {task.resource: [] for task in tasks}  # heaps of places in the list
    for place, task in enumerate(tasks):
        if not task.after:
            able[task.resource].append(place)
    for heap in able.values():
        heapify(heap)
    starts_s, ends_s = [0.0] * len(tasks), [0.0] * len(tasks)
    idle = set(able)
    running: list[tuple[float, int]] = []
    now = 0.0
    while True:
        for resource in [resource for resource in idle if able[resource]]:
            place = heappop(able[resource])
            starts_s[place], ends_s[place] = now, now + tasks[place].seconds
            idle.remove(resource)
            heappush(running, (ends_s[place], place))
        if not running:
            break
        now = running[0][0]
        while running and running[0][0] == now:  # all that end now, before anything starts
            _, ended = heappop(running)
            idle.add(tasks[ended].resource)
            for place in followers[ended]:
                waits_for[place] -= 1
                if waits_for[place] == 0:
                    heappush(able[tasks[place].resource], place)
    return Timeline(tuple(Span(task, start, end) for task, start, end in zip(tasks, starts_s, ends_s, strict=True)))


def _followers(tasks: Sequence[Task]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in tasks]
    for place, task in enumerate(tasks):
        if not task.seconds >= 0:
            raise ValueError(f"task {task.name} takes {task.seconds} seconds")
        for before in task.after:
            if not 0 <= before < place:
                raise ValueError(f"task {task.name}, at place {place}, comes after place {before}, which is not before it")
            found[before].append(place)
    return found
