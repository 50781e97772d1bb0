"""An MoE layer in chunks, as tasks: while one chunk is computed, others travel.

Source: FSMoE, arXiv 2501.10714, section 4: dispatch, gather, experts, scatter, combine of each chunk; links between nodes,
links within nodes and the device work at the same time. Between nodes all dispatches go first, then a slice of the dense
gradients, then the combines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parallel.schedule.cost import Chunk
from parallel.schedule.timeline import Task, simulate

COMPUTE, WITHIN, ACROSS = "compute", "within a node", "between nodes"
MOST_CHUNKS = 16
EXPERTS, EXPERTS_HERE = "experts", "experts here"  # of rows that came to this rank, and of those that stay
ATTENTION, COPIES, GRADIENTS = "attention", "copies", "gradients"  # names of tasks; those of chunks end in their number
# In no plan, but seen: what is computed while the last results, or the first gradients, travel: shared experts, and the layer
# again where activations are recomputed.
BESIDE = "beside"


@dataclass(frozen=True)
class Degrees:
    """In how many chunks a layer runs."""

    forward: int
    backward: int
    in_sequence: bool = False  # every message is waited for where it is sent


WHOLE = Degrees(1, 1)
OFF = Degrees(1, 1, in_sequence=True)  # nothing overlaps


def add_layer(
    tasks: list[Task],
    chunk: Chunk,
    degree: int,
    *,
    gradients_s: float = 0.0,
    tokens_after: tuple[int, ...] = (),
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Appends a layer of `degree` chunks.

    Args:
        gradients_s: the slice of dense gradients.
        tokens_after: tasks before the first stage.

    Returns:
        (the products, the tasks with which the layer ends).
    """

    def stage(name: str, resource: str, seconds: float, before: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """One task a chunk; a stage that takes no time has none, and hands on what it waits for."""
        if seconds == 0:
            return before
        first = len(tasks)
        names = [f"{name} {number}" for number in range(1, degree + 1)] if degree > 1 else [name]
        tasks.extend(Task(one, resource, seconds, after) for one, after in zip(names, before, strict=True))
        return [(first + number,) for number in range(degree)]

    def exchange(name: str, before: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        across, within = stage(name, ACROSS, chunk.across_s, before), stage(name, WITHIN, chunk.within_s, before)
        return [tuple(dict.fromkeys((*far, *near))) for far, near in zip(across, within, strict=True)]

    arrived = exchange("dispatch", [tokens_after] * degree)
    slice_of = [len(tasks)] if gradients_s else []
    if gradients_s:
        tasks.append(Task(GRADIENTS, ACROSS, gradients_s, tokens_after))
    gathered = stage("gather", WITHIN, chunk.gather_s, arrived)
    computed = stage("experts", COMPUTE, chunk.expert_s, gathered)
    summed = stage("scatter", WITHIN, chunk.scatter_s, computed)
    ended = exchange("combine", summed)
    return tuple(place for one in computed for place in one), (*(place for one in ended for place in one), *slice_of)


def layer_tasks(chunk: Chunk, degree: int, gradients_s: float = 0.0) -> list[Task]:
    tasks: list[Task] = []
    add_layer(tasks, chunk, degree, gradients_s=gradients_s)
    return tasks


@dataclass(frozen=True)
class Pipelined:
    """A layer in `degree` chunks, as a function of the dense gradients that it takes along."""

    degree: int
    link_s: float  # the links between nodes are busy with its tokens
    free_s: float  # it takes without gradients

    def seconds(self, gradients_s: float) -> float:
        """Exact: all dispatches can go at the start, back to back, and the slice after them; what the combines wait for does
        not depend on it. So either the link is never idle, or the slice fits where it is."""
        return max(self.link_s + gradients_s, self.free_s)


def pipelined(chunk_of: Callable[[int], Chunk], degree: int) -> Pipelined:
    """`chunk_of` gives what a chunk takes if the layer is cut into this many."""
    chunk = chunk_of(degree)
    return Pipelined(degree, 2 * degree * chunk.across_s, simulate(layer_tasks(chunk, degree)).seconds)


def every_degree(chunk_of: Callable[[int], Chunk], most: int = MOST_CHUNKS) -> tuple[Pipelined, ...]:
    return tuple(pipelined(chunk_of, degree) for degree in range(1, most + 1))


def best(options: tuple[Pipelined, ...], gradients_s: float = 0.0) -> Pipelined:
    """The fastest; of equals the one with fewest chunks."""
    return min(options, key=lambda one: (one.seconds(gradients_s), one.degree))


@dataclass(frozen=True)
class Copies:
    """Seconds that copies of experts, or the gradients of copies, are on their way."""

    across_s: float
    within_s: float
