"""One case of a benchmark: ours against each competitor on the same inputs, and the resulting record."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from launch.benchmarks.timing import Call, Ceilings, Memory, Timing, captured, interleaved, memory_of

OURS = "tessera"
PIECE_ROWS = 8192  # of which float64 copies exist at once
Work = Callable[..., Tensor]  # takes the tensors of an `Inputs` by name, returns the output that is pulled back
Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")


@dataclass(frozen=True)
class Inputs:
    """Arguments of a work, and the gradient of its output. Tensors that require a gradient get one."""

    tensors: dict[str, Tensor]
    pull: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def forward(self, work: Work) -> Tensor:
        """For training: autograd keeps what the backward pass needs."""
        return work(**self.tensors)

    def backward(self, output: Tensor) -> dict[str, Tensor]:
        leaves = self.leaves
        return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), self.pull), strict=True))


@dataclass(frozen=True)
class Amount:
    """What a pass has to do at least: operations or bytes, and the rate that this device can reach."""

    count: dict[Direction, float]
    unit: Literal["TF/s", "TB/s"]

    def rate(self, direction: Direction, milliseconds: float) -> float:
        return self.count[direction] / milliseconds / 1e9

    def ceiling(self, ceilings: Ceilings) -> float:
        return ceilings.tflops if self.unit == "TF/s" else ceilings.copy_tbytes


@dataclass(frozen=True)
class Side:
    """One competitor in one direction."""

    time: Timing
    rate: float  # in the case's unit
    memory: Memory | None  # None on a CPU
    errors: dict[str, float]  # relative Frobenius norm of the difference from float32: the output and every gradient

    def error(self, direction: Direction) -> float:
        """That of the output, or the largest of the gradients; NaN is larger than any number."""
        if direction == "forward":
            return self.errors["output"]
        gradients = [error for name, error in self.errors.items() if name != "output"]
        return max(gradients, key=lambda error: math.inf if math.isnan(error) else error)


@dataclass(frozen=True)
class Row:
    work: str
    direction: Direction
    peer: str
    theirs: Side
    ours: Side
    ratio: float  # their median time over ours: above 1, ours is faster
    ceiling_fraction: float  # our rate over what the device reaches


@dataclass(frozen=True)
class Case:
    """What one table shows and one element of the JSON file's cases holds."""

    work: str
    sizes: dict[str, int | str]
    unit: str
    counted: dict[Direction, float]  # operations or bytes
    input_sets: int  # more than one where the inputs would fit into the GPU's cache
    rows: list[Row]
    failures: dict[str, str]  # peers that could not do this case, and why
    notes: Sequence[str] = ()  # lines below the table


def compete(
    work: str,
    sizes: Mapping[str, int | str],
    amount: Amount,
    ours: Work,
    peers: Mapping[str, Callable[[], Work]],
    sets: Sequence[Inputs],
    errors_of: Callable[[Work], dict[str, float]],
    matrices: set[str],
    ceilings: Ceilings,
    repeats: int | None,
    graphs: bool = False,
) -> Case:
    """Checks, measures and times all competitors. A peer that cannot do it is reported and left out; ours has to.

    `graphs`: on a GPU what is timed is the replay of a graph, for work so short that launching it takes longer.
    """
    device = sets[0].pull.device
    works: dict[str, Work] = {OURS: ours}
    errors = {OURS: errors_of(ours)}
    memory = {OURS: _memory(ours, sets[0], matrices)}
    failures: dict[str, str] = {}
    for name, load in peers.items():
        try:
            peer = load()
            errors[name], memory[name] = errors_of(peer), _memory(peer, sets[0], matrices)
        except Exception as error:  # somebody else's code: whatever it raises is a result, and is shown as one
            failures[name] = _said(error)
        else:
            works[name] = peer
    rows = []
    for direction in DIRECTIONS:
        calls = {name: _call(one, sets, direction) for name, one in works.items()}
        if graphs and device.type == "cuda":
            calls = {name: captured(call, len(sets)) for name, call in calls.items()}
        times = interleaved(calls, device, repeats)
        sides = {
            name: Side(time, amount.rate(direction, time.median_ms), memory[name], errors[name]) for name, time in times.items()
        }
        best = sides.pop(OURS)
        fraction = best.rate / amount.ceiling(ceilings)
        rows += [
            Row(work, direction, name, side, best, side.time.median_ms / best.time.median_ms, fraction)
            for name, side in sides.items()
        ]
    return Case(work, dict(sizes), amount.unit, amount.count, len(sets), rows, failures)


def _call(work: Work, sets: Sequence[Inputs], direction: Direction) -> Call:
    if direction == "forward":
        return lambda number: sets[number % len(sets)].forward(work)

    def both(number: int) -> dict[str, Tensor]:
        inputs = sets[number % len(sets)]
        return inputs.backward(inputs.forward(work))

    return both


def _memory(work: Work, inputs: Inputs, matrices: set[str]) -> Memory | None:
    inputs.backward(inputs.forward(work))  # the first call at this size compiles and tunes, in the way too much memory
    if inputs.pull.device.type != "cuda":
        return None
    return memory_of(lambda: inputs.forward(work), inputs.backward, matrices)


def _said(error: Exception) -> str:
    """The kind of error, its first line, and where it arose."""
    lines = str(error).strip().splitlines() or [""]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {lines[0]} ({Path(place.filename).name}:{place.lineno})"


class Difference:
    """Relative Frobenius norm of a difference, summed piece by piece in float64."""

    def __init__(self) -> None:
        self.error = 0.0
        self.reference = 0.0

    def add(self, result: Tensor, reference: Tensor) -> None:
        for some, same in zip(result.split(PIECE_ROWS), reference.split(PIECE_ROWS), strict=True):
            self.error += float((some.double() - same.double()).square().sum())
            self.reference += float(same.double().square().sum())

    @property
    def relative(self) -> float:
        return (self.error / self.reference) ** 0.5
