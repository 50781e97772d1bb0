"""What shares the links and the device with an MoE layer: attention, copies of experts, slices of dense gradients. Pure.

Source: FSMoE, arXiv 2501.10714, section 5: an MoE layer and the dense layers before it are one generalised layer. FSSDP's
copies (Hecate, arXiv 2502.02581, section 3.2) travel under the attention, there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from parallel.layer_cost import CopyTimes
from parallel.schedule.cost import BACKWARD_PRODUCTS, Line
from parallel.schedule.gradients import Partition, Slot, partition
from parallel.schedule.pipeline import ACROSS, ATTENTION, COMPUTE, COPIES, GRADIENTS, WITHIN, Copies, Pipelined
from parallel.schedule.timeline import Task, simulate

LINK = "messages"
NO_COPIES = Copies(0.0, 0.0)


@dataclass(frozen=True)
class Around:
    """Seconds."""

    attention_s: float = 0.0  # forward
    copies: Copies = NO_COPIES  # of this layer's experts, under the attention before it
    back: Copies = NO_COPIES  # their gradients, and what else travels then, under the backward pass of the attention
    layer_slice_s: float = 0.0  # dense gradients that travel after the dispatches of the backward pass
    dense_slice_s: float = 0.0  # and after its experts
    attention_back: float = BACKWARD_PRODUCTS  # the time of the attention's backward pass over that of its forward pass

    @property
    def attention_back_s(self) -> float:
        return self.attention_back * self.attention_s

    @property
    def copies_s(self) -> float:
        return self.copies.across_s + self.copies.within_s + self.back.across_s + self.back.within_s


ALONE = Around()


def around_copies(times: CopyTimes[float], around: Around, *, rematerialise: bool) -> Around:
    """With copies under the attention.

    `rematerialise`: they are fetched again for the backward pass, those of the layer before under the attention of this one; as
    many, more or less.
    """
    copies, back = Copies(times.across_s, times.within_s), Copies(times.back_across_s, times.within_s)
    if rematerialise:
        back = Copies(back.across_s + copies.across_s, back.within_s + copies.within_s)
    return replace(around, copies=copies, back=back)


def forward_around(layer: Sequence[Task], around: Around) -> list[Task]:
    """Attention, under which the copies travel (between nodes first), then the layer. Its messages stand after the copies on
    their link, and its experts wait for them."""
    across, within = _links(layer)
    before = [Task(ATTENTION, COMPUTE, around.attention_s)] if around.attention_s else []
    attended = set(range(len(before)))
    arrived: tuple[int, ...] = ()
    for resource, seconds in ((across, around.copies.across_s), (within, around.copies.within_s)):
        if seconds:
            before.append(Task(COPIES, resource, seconds, arrived))
            arrived = (len(before) - 1,)
    last = {task.resource: place for place, task in enumerate(before)}
    shift, tasks = len(before), list[Task]()
    for task in layer:
        after = {place + shift for place in task.after} or set(attended)
        if task.resource in last:
            after.add(last.pop(task.resource))
        if task.name.startswith("experts"):
            after.update(arrived)
        tasks.append(replace(task, after=tuple(sorted(after))))
    return before + tasks


def backward_around(layer: Sequence[Task], around: Around) -> list[Task]:
    """The layer with a slice after its dispatches; then the attention, under which gradients of copies return (within nodes
    first) and, after them, a slice."""
    across, within = _links(layer)
    tasks = _with_slice(layer, across, around.layer_slice_s)
    computed = tuple(place for place, task in enumerate(tasks) if task.name == "weights" or task.name.startswith("experts"))[
        -1:
    ]
    if around.attention_s:
        followed = {place for task in tasks for place in task.after}
        ends = tuple(place for place, task in enumerate(tasks) if place not in followed and task.name != GRADIENTS)
        tasks.append(Task(ATTENTION, COMPUTE, around.attention_back_s, ends))
    under = ((COPIES, within, around.back.within_s), (COPIES, across, around.back.across_s))
    for name, resource, seconds in (*under, (GRADIENTS, across, around.dense_slice_s)):
        if seconds:
            tasks.append(Task(name, resource, seconds, computed))
            computed = (len(tasks) - 1,)
    return tasks


def _links(layer: Sequence[Task]) -> tuple[str, str]:
    """What carries messages between nodes, and within them: of a layer whose tokens travel at once, one link for both."""
    used = {task.resource for task in layer}
    return (ACROSS, WITHIN) if used & {ACROSS, WITHIN} else (LINK, LINK)


def _with_slice(layer: Sequence[Task], link: str, seconds: float) -> list[Task]:
    """Where there are no dispatches the slice is sent at once."""
    if seconds == 0:
        return list(layer)
    place = max((at + 1 for at, task in enumerate(layer) if task.name.startswith("dispatch")), default=0)
    before = [at for at, task in enumerate(layer[:place]) if task.resource == link]
    behind: list[Task] = []
    for task in layer[place:]:
        after = tuple(one if one < place else one + 1 for one in task.after)
        behind.append(replace(task, after=tuple(sorted({*after, place})) if task.resource == link else after))
    return [*layer[:place], Task(GRADIENTS, link, seconds, tuple(before[-1:])), *behind]


# ---------------------------------------------------------------- how many bytes go where


def _as_tasks_say(degree: int) -> float:
    return 1.0


def slots_of(
    backward_of: Callable[[int], list[Task]],
    degrees: Sequence[int],
    around: Around,
    ready: tuple[int, int],
    factor: Callable[[int], float] = _as_tasks_say,
) -> list[Slot]:
    """The two places of a layer: under itself, and under the dense layers before it.

    Args:
        backward_of: the layer's tasks, by its degree.
        ready: bytes that are complete at either place and were not at the place before.
        factor: how many times as long as its tasks say the layer takes, by its degree.
    """
    options = tuple(_pipelined(backward_of(degree), degree, factor(degree)) for degree in degrees)
    back_s = around.back.across_s + around.back.within_s
    dense = Pipelined(1, back_s, max(around.attention_back_s, back_s))
    return [Slot(options, ready[0]), Slot((dense,), ready[1])]


def _pipelined(layer: list[Task], degree: int, factor: float) -> Pipelined:
    """A slice costs nothing while it fits, and its own time where it binds; between the two the first of both is meant."""
    free_s = simulate(layer).seconds
    link_s = simulate(backward_around(layer, Around(layer_slice_s=free_s))).seconds - free_s
    more_s = (factor - 1) * free_s
    return Pipelined(degree, link_s + more_s, free_s + more_s)


def slices_of(slots: Sequence[Slot], last_bytes: int, reduce: Line) -> Partition:
    """The best bytes for each slot; `last_bytes` are complete only after them all."""
    return partition(slots, last_bytes, Line(reduce.alpha_s, max(reduce.beta_s, 1e-15)))
