"""What chunked_experts.py does with a layer, as tasks; and the number of chunks, separately for forward and backward. Pure.

One link carries the rows of a rank, to all others at once: all dispatches, then the combines as they come. Meanwhile the rank
computes what stays (parallel/cuts.py). Over two levels that
link is the one between nodes, and another one carries rows within them: gathers and scatters in turns, because a chunk is
relayed before the one ahead of it is computed. The device computes chunk after chunk, and the gradients of the weights after
the last one, which hides what is still on its way back. Degrees are chosen by trying all of them in an exact simulation
(timeline.py).

What lies around the layer and shares its link is in generalised.py.

Source: FSMoE, arXiv 2501.10714, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from parallel.cuts import Cut, backward_cut, forward_cut, stay_apart
from parallel.flows import Plan, flows
from parallel.layer_cost import LayerCosts, Link, Setting, exchanged
from parallel.placement import Budget, Floats, Topology, TransportKind
from parallel.schedule.cost import BACKWARD_PRODUCTS, Line
from parallel.schedule.generalised import ALONE, LINK, Around, backward_around, forward_around
from parallel.schedule.pipeline import ACROSS, COMPUTE, EXPERTS, EXPERTS_HERE, MOST_CHUNKS, WHOLE, WITHIN, Degrees
from parallel.schedule.timeline import Task, Timeline, simulate

NEARLY = 0.03
UP_SHARE = 2 / 3  # of an expert's products forward: gate and up, of gate, up and down
NOTHING = Line(0.0, 0.0)


@dataclass(frozen=True)
class ExecutionCosts:
    """Lines through times measured on this machine; the slowest rank's."""

    exchange: Line  # of rows on the first leg, one way; amounts are bytes that a rank sends to others, or receives
    copy: Line  # of these rows, to where the message is sent from, or from where it arrives; amounts are the same bytes
    forward: Line  # amounts are entries: of a chunk
    backward: Line  # of a chunk, without the gradients of the weights
    weights: Line  # of these, for all entries of a layer
    attention: Line  # forward, of what lies before the layer; amounts are tokens of a rank
    announce_s: float  # what tells each rank what will come
    inside: Line = NOTHING  # of rows on the leg within nodes, where there are two; amounts as of the exchange
    relay: Line = NOTHING  # of these rows, to where their message is sent from, or summed where it arrives; the same amounts
    attention_back: float = BACKWARD_PRODUCTS  # the time of its backward pass over that of its forward pass
    chunk_s: float = 0.0  # of each chunk of a pass after the first, beside its parts: until the host has started them
    # (chunks, how many times as long both passes took in this many as all this says; 0 chunks: with nothing overlapping)
    times: tuple[tuple[int, float], ...] = ()

    def around(self, tokens: int) -> Around:
        """What lies around a layer of this many tokens, without copies and slices."""
        return Around(self.attention.seconds(tokens), attention_back=self.attention_back)

    def factor(self, degree: int) -> float:
        """For a pass in this many chunks; between those that were measured on a line, and after the last as there."""
        if not self.times:
            return 1.0
        degrees, factors = zip(*self.times, strict=True)
        return float(np.interp(degree, degrees, factors))


@dataclass(frozen=True)
class LayerWork:
    """Of the busiest rank in each respect."""

    row_bytes: float
    entries: float
    inside_bytes: float = 0.0  # on the leg within nodes, where there are two
    staying: float = 0.0  # of the entries those of its own tokens, where they are apart (parallel/cuts.py)

    def differs(self, other: LayerWork, share: float) -> bool:
        """By more than this share of it."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return any(abs(one - two) > share * two for one, two in pairs)


def layer_work(plan: Plan, loads_E: Floats, topology: Topology, top_k: int, row_bytes: float, kind: TransportKind) -> LayerWork:
    """Of a layer under a plan and the entries of each expert on all ranks. `row_bytes`: of one token's row."""
    found = flows(plan, topology, loads_E)
    entries = float(found.entries_D.max())
    nothing = Link(0.0, 0.0)
    costs = LayerCosts(0.0, 0.0, row_bytes, 0.0, 0.0, nothing, nothing, *(0.0 for _ in range(6)))
    sent = exchanged(found, Setting(topology, top_k, Budget(0, 0), False, costs, kind))
    if kind == "two_level":
        return LayerWork(float(sent.across_bytes), entries, float(sent.within_bytes))
    apart = stay_apart(topology.devices, two_level=False)
    staying = float(found.staying_D[found.entries_D.argmax()]) if apart else 0.0
    return LayerWork(float(sent.within_bytes + sent.across_bytes), entries, staying=staying)


def forward_tasks(costs: ExecutionCosts, work: LayerWork, degree: int) -> list[Task]:
    return _tasks(costs, work, forward_cut(degree, apart=work.staying > 0), costs.forward, 0.0)


def again_tasks(costs: ExecutionCosts, work: LayerWork, degree: int) -> list[Task]:
    """A forward pass for the backward pass that follows: products of the first matrices only, and nothing is given back."""
    rows = Line(costs.forward.alpha_s, UP_SHARE * costs.forward.beta_s)
    return _tasks(costs, work, forward_cut(degree, apart=work.staying > 0), rows, 0.0, back=False)


def backward_tasks(costs: ExecutionCosts, work: LayerWork, degree: int) -> list[Task]:
    cut = backward_cut(degree, apart=work.staying > 0)
    return _tasks(costs, work, cut, costs.backward, costs.weights.seconds(work.entries))


def _tasks(costs: ExecutionCosts, work: LayerWork, cut: Cut, rows: Line, weights_s: float, *, back: bool = True) -> list[Task]:
    degree, given = cut.degree, 1.0 if back else 0.0
    here_s = rows.seconds(work.staying / cut.staying) if cut.staying else 0.0
    rows_s = rows.seconds((work.entries - work.staying * (cut.staying > 0)) / degree)
    exchange_s, copy_s = (line.seconds(work.row_bytes / degree) for line in (costs.exchange, costs.copy))
    inside_s, relay_s = (line.seconds(work.inside_bytes / degree) for line in (costs.inside, costs.relay))
    program = _Program(degree)
    link = ACROSS if inside_s else LINK
    chunks = range(degree)
    packed = [program.add("pack", chunk, COMPUTE, copy_s) for chunk in chunks]
    dispatched = [program.add("dispatch", chunk, link, exchange_s, packed[chunk]) for chunk in chunks]
    gathered: list[Places] = []
    scattered: list[Places] = []
    returned: list[Places] = []
    if cut.staying:
        program.add(EXPERTS_HERE, 0, COMPUTE, here_s)
    for chunk in chunks:
        while len(gathered) < min(chunk + 2, degree):  # a chunk ahead of the experts
            ahead = len(gathered)
            relayed = program.add("relay", ahead, COMPUTE, relay_s, dispatched[ahead])
            gathered.append(program.add("gather", ahead, WITHIN, inside_s, relayed))
        program.add("start", chunk, COMPUTE, costs.chunk_s if chunk or cut.staying else 0.0)
        computed = program.add(EXPERTS, chunk, COMPUTE, rows_s, gathered[chunk])
        scattered.append(program.add("scatter", chunk, WITHIN, given * inside_s, computed))
        while len(returned) < (chunk if chunk + 1 < degree else degree):  # a chunk after them
            behind = len(returned)
            summed = program.add("sum", behind, COMPUTE, given * relay_s, scattered[behind])
            returned.append(program.add("combine", behind, link, given * exchange_s, summed))
    if cut.staying > 1:
        program.add("start", degree, COMPUTE, costs.chunk_s)
        program.add(EXPERTS_HERE, 1, COMPUTE, here_s)
    program.add("weights", None, COMPUTE, weights_s, computed)
    if cut.staying:
        whole_s = given * costs.copy.seconds(work.row_bytes)
        program.add("collect", None, COMPUTE, whole_s, tuple(last for one in returned for last in one))
        return program.tasks
    for chunk in chunks:
        program.add("collect", chunk, COMPUTE, given * copy_s, returned[chunk])
    return program.tasks


Places = tuple[int, ...]  # of tasks, in their list


class _Program:
    """Tasks in the order in which each resource takes them: nothing overtakes what stands before it."""

    def __init__(self, degree: int) -> None:
        self.tasks: list[Task] = []
        self._degree = degree
        self._last: dict[str, int] = {}  # the place of each resource's last task

    def add(self, name: str, chunk: int | None, resource: str, seconds: float, after: Places = ()) -> Places:
        """Appends a task; what takes no time is none, and hands on what it waits for."""
        if seconds == 0:
            return after
        waits = {*after, *([self._last[resource]] if resource in self._last else [])}
        self._last[resource] = len(self.tasks)
        number = f" {chunk + 1}" if chunk is not None and self._degree > 1 else ""
        self.tasks.append(Task(f"{name}{number}", resource, seconds, tuple(sorted(waits))))
        return (self._last[resource],)


@dataclass(frozen=True)
class LayerPlan:
    """Timelines of the two passes, without what tells each rank what will come; `whole_s` is of the layer in one chunk."""

    degrees: Degrees
    forward: Timeline
    backward: Timeline
    seconds: float  # of both, as many times as long as layers took that were measured
    whole_s: float


def plan_layer(
    costs: ExecutionCosts, work: LayerWork, tokens: int, present: Degrees = WHOLE, around: Around = ALONE
) -> LayerPlan:
    """The fewest chunks that are nearly the fastest, none of them empty: what more would gain is less than the times are sure
    of. Of these, degrees in which a layer was measured come first: of others it is guessed what they take beside its parts.
    Degrees at present that are nearly the fastest too stay. What lies `around` the layer is in its timelines."""
    degrees = degrees_of(tokens)
    ahead, back = ([tasks_of(costs, work, degree) for degree in degrees] for tasks_of in (forward_tasks, backward_tasks))
    forward = [simulate(forward_around(tasks, around)) for tasks in ahead]
    backward = [simulate(backward_around(tasks, around)) for tasks in back]
    forward_s, backward_s = _as_measured(costs, ahead, forward), _as_measured(costs, back, backward)
    measured = [degree for degree, _ in costs.times]
    one, other = (
        _nearly_fastest(seconds, now, measured)
        for seconds, now in ((forward_s, present.forward), (backward_s, present.backward))
    )
    return LayerPlan(
        Degrees(one, other),
        forward[one - 1],
        backward[other - 1],
        seconds=forward_s[one - 1] + backward_s[other - 1],
        whole_s=forward_s[0] + backward_s[0],
    )


def _as_measured(costs: ExecutionCosts, layers: list[list[Task]], timelines: list[Timeline]) -> list[float]:
    """Seconds of timelines, by their degrees from 1 on: the layers in them take as many times as long as was measured."""
    if not costs.times:
        return [one.seconds for one in timelines]
    return [
        timeline.seconds + (costs.factor(degree) - 1) * simulate(layer).seconds
        for degree, (layer, timeline) in enumerate(zip(layers, timelines, strict=True), start=1)
    ]


def degrees_of(tokens: int) -> range:
    """That leave no chunk of this many tokens empty."""
    return range(1, min(MOST_CHUNKS, max(tokens, 1)) + 1)


def _nearly_fastest(seconds: list[float], present: int, measured: Sequence[int]) -> int:
    enough_s = (1 + NEARLY) * min(seconds)
    near = [degree for degree, one in enumerate(seconds, start=1) if one <= enough_s]
    return present if present in near else next((degree for degree in near if degree in measured), near[0])


def in_sequence(tasks: Sequence[Task]) -> list[Task]:
    """Nothing overlaps: each task waits for the one before."""
    return [replace(task, after=(place - 1,) if place else ()) for place, task in enumerate(tasks)]


def in_sequence_s(costs: ExecutionCosts, work: LayerWork) -> float:
    """Of both passes of a whole layer in which nothing overlaps."""
    return sum(task.seconds for tasks_of in (forward_tasks, backward_tasks) for task in tasks_of(costs, work, 1))


def layer_seconds(costs: ExecutionCosts, work: LayerWork, degrees: Degrees) -> float:
    """Of both passes of a layer alone, with what tells each rank what will come."""
    if degrees.in_sequence:
        return costs.factor(0) * (costs.announce_s + in_sequence_s(costs, work))
    ahead_s = costs.announce_s + simulate(forward_tasks(costs, work, degrees.forward)).seconds
    back_s = simulate(backward_tasks(costs, work, degrees.backward)).seconds
    return costs.factor(degrees.forward) * ahead_s + costs.factor(degrees.backward) * back_s
