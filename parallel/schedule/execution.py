"""What chunked_experts.py does with a layer, as tasks: in how many chunks it had better run, forward and backward apart. Pure.

One link carries the rows of a rank, to all others at once: all dispatches, then the combines as they come. The device computes
chunk after chunk, and the gradients of the weights behind the last one, which hides what is still on its way back. Degrees are
chosen by trying all of them in an exact simulation (timeline.py).

What lies around the layer and shares its link is in generalised.py.

Source: FSMoE, arXiv 2501.10714, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.flows import Plan, flows
from parallel.layer_cost import LayerCosts, Link, Setting, exchanged
from parallel.placement import Budget, Floats, Topology
from parallel.schedule.cost import Line
from parallel.schedule.generalised import ALONE, LINK, Around, backward_around, forward_around
from parallel.schedule.pipeline import COMPUTE, MOST_CHUNKS, WHOLE, Degrees
from parallel.schedule.timeline import Task, Timeline, simulate

NEARLY = 0.03


@dataclass(frozen=True)
class ExecutionCosts:
    """Lines through times measured on this machine; the slowest rank's."""

    exchange: Line  # of rows, one way; amounts are bytes that a rank sends to others, or receives
    copy: Line  # of these rows, to where the message is sent from, or from where it arrives; amounts are the same bytes
    forward: Line  # amounts are entries: of a chunk
    backward: Line  # of a chunk, without the gradients of the weights
    weights: Line  # of these, for all entries of a layer
    attention: Line  # forward, of what lies before the layer; amounts are tokens of a rank
    announce_s: float  # what tells each rank what will come


@dataclass(frozen=True)
class LayerWork:
    """Of the busiest rank in each respect."""

    row_bytes: float
    entries: float

    def differs(self, other: LayerWork, share: float) -> bool:
        """By more than this share of it."""
        pairs = ((self.row_bytes, other.row_bytes), (self.entries, other.entries))
        return any(abs(one - two) > share * two for one, two in pairs)


def layer_work(plan: Plan, loads_E: Floats, topology: Topology, top_k: int, row_bytes: int) -> LayerWork:
    """Of a layer under a plan and the entries of each expert on all ranks. `row_bytes`: of one token's row."""
    nothing = Link(0.0, 0.0)
    costs = LayerCosts(0.0, 0.0, row_bytes, 0.0, 0.0, nothing, nothing, *(0.0 for _ in range(5)))
    found = flows(plan, topology, loads_E)
    sent = exchanged(found, Setting(topology, top_k, Budget(0, 0), False, costs))
    return LayerWork(sent.within_bytes + sent.across_bytes, float(found.entries_D.max()))


def forward_tasks(costs: ExecutionCosts, work: LayerWork, degree: int) -> list[Task]:
    return _tasks(costs, work, degree, costs.forward.seconds(work.entries / degree), 0.0)


def backward_tasks(costs: ExecutionCosts, work: LayerWork, degree: int) -> list[Task]:
    rows_s = costs.backward.seconds(work.entries / degree)
    return _tasks(costs, work, degree, rows_s, costs.weights.seconds(work.entries))


def _tasks(costs: ExecutionCosts, work: LayerWork, degree: int, rows_s: float, weights_s: float) -> list[Task]:
    """In the order of the program, in which each resource takes them: nothing overtakes what stands before it."""
    exchange_s, copy_s = (line.seconds(work.row_bytes / degree) for line in (costs.exchange, costs.copy))
    numbers = [f" {chunk + 1}" if degree > 1 else "" for chunk in range(degree)]
    tasks: list[Task] = []
    last: dict[str, int] = {}  # the place of each resource's last task

    def add(names: list[str], resource: str, seconds: float, before: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """One task a chunk; what takes no time has none, and hands on what it waits for."""
        if seconds == 0:
            return before
        places: list[tuple[int, ...]] = []
        for name, after in zip(names, before, strict=True):
            waits = {*after, *([last[resource]] if resource in last else [])}
            last[resource] = len(tasks)
            places.append((len(tasks),))
            tasks.append(Task(name, resource, seconds, tuple(sorted(waits))))
        return places

    packed = add([f"pack{number}" for number in numbers], COMPUTE, copy_s, [()] * degree)
    arrived = add([f"dispatch{number}" for number in numbers], LINK, exchange_s, packed)
    computed = add([f"experts{number}" for number in numbers], COMPUTE, rows_s, arrived)
    returned = add([f"combine{number}" for number in numbers], LINK, exchange_s, computed)
    add(["weights"], COMPUTE, weights_s, computed[-1:])
    add([f"collect{number}" for number in numbers], COMPUTE, copy_s, returned)
    return tasks


@dataclass(frozen=True)
class LayerPlan:
    """Timelines of the two passes, without what tells each rank what will come, and those of the layer in one chunk."""

    degrees: Degrees
    forward: Timeline
    backward: Timeline
    whole_s: float

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds


def plan_layer(
    costs: ExecutionCosts, work: LayerWork, tokens: int, present: Degrees = WHOLE, around: Around = ALONE
) -> LayerPlan:
    """The fewest chunks that are nearly the fastest, none of them empty: what more would gain is less than the times are sure
    of. Degrees at present that are nearly the fastest too stay. What lies `around` the layer is in its timelines."""
    degrees = degrees_of(tokens)
    ahead = [simulate(forward_around(forward_tasks(costs, work, degree), around)) for degree in degrees]
    back = [simulate(backward_around(backward_tasks(costs, work, degree), around)) for degree in degrees]
    forward, backward = _nearly_fastest(ahead, present.forward), _nearly_fastest(back, present.backward)
    whole_s = ahead[0].seconds + back[0].seconds
    return LayerPlan(Degrees(forward, backward), ahead[forward - 1], back[backward - 1], whole_s)


def degrees_of(tokens: int) -> range:
    """That leave no chunk of so many tokens empty."""
    return range(1, min(MOST_CHUNKS, max(tokens, 1)) + 1)


def _nearly_fastest(timelines: list[Timeline], present: int) -> int:
    enough_s = (1 + NEARLY) * min(one.seconds for one in timelines)
    if present <= len(timelines) and timelines[present - 1].seconds <= enough_s:
        return present
    return next(degree for degree, one in enumerate(timelines, start=1) if one.seconds <= enough_s)


def bound_s(costs: ExecutionCosts, work: LayerWork) -> float:
    """What no degree can beat: the experts alone, or the messages alone, forward and backward."""
    computed_s = (
        costs.forward.seconds(work.entries) + costs.backward.seconds(work.entries) + costs.weights.seconds(work.entries)
    )
    return max(computed_s, 4 * costs.exchange.seconds(work.row_bytes))
