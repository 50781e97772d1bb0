"""Time and memory of competing calls.

On a GPU each call is between two events of its stream, so the time is the device's; the host runs ahead, as in training. The
competitors take turns within one run and change their order from round to round, so that clocks and temperature affect all
alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

WARM_UP_ROUNDS = 3  # compilation, tuning and the allocator's first requests stay out of the numbers
LEAST_ROUNDS, MOST_ROUNDS = 20, 1000
LEAST_SECONDS = 1.0
MOST_SETS = 16

Call = Callable[[int], object]  # takes the number of the round


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one competitor's calls."""

    median_ms: float
    min_ms: float
    spread: float  # distance of the quartiles over the median
    samples: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the device beyond what was there before the call."""

    saved: int  # after the forward pass, less the output: what waits for the backward pass
    peak: int  # the most during forward and backward pass, all gradients included
    matrix_gradients: int  # of `peak`, the gradients of the weight matrices


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches here and now with the work that suits it best."""

    product: str
    tflops: float
    copy: str
    copy_tbytes: float  # TB/s, bytes read plus bytes written


class WorkClock:
    """How long a device had something to do that was given to it in `with clock:` blocks, one behind the other.

    On a GPU between two events of its stream, so without the time in which a launch waits for what runs before it; on a CPU the
    time of the blocks.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = self._began = 0.0
        self._open = deque[tuple[torch.cuda.Event, torch.cuda.Event]]()  # not added up yet

    def __enter__(self) -> None:
        if not self._on_gpu:
            self._began = time.perf_counter()
            return
        while self._open and self._open[0][1].query():  # so that few are open
            self._add(*self._open.popleft())
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        self._open.append((first, last))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._on_gpu:
            self._open[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def _add(self, first: torch.cuda.Event, last: torch.cuda.Event) -> None:
        last.synchronize()
        self._seconds += first.elapsed_time(last) / 1000

    @property
    def seconds(self) -> float:
        """Of all blocks, after the device is done with them."""
        while self._open:
            self._add(*self._open.popleft())
        return self._seconds


def interleaved(
    calls: Mapping[str, Call], device: torch.device, repeats: int | None, before: Callable[[], None] | None = None
) -> dict[str, Timing]:
    """Times every call `repeats` times in turns; None: at least 20 rounds, and more until a second is full.

    `before` is called ahead of every call, and not timed.
    """
    for number in range(WARM_UP_ROUNDS if device.type == "cuda" else 1):
        for call in calls.values():
            call(number)
    started = time.perf_counter()
    _round(calls, 0, device, before)
    wait_for(device)
    round_seconds = time.perf_counter() - started
    rounds = repeats or min(MOST_ROUNDS, max(LEAST_ROUNDS, math.ceil(LEAST_SECONDS / round_seconds)))
    taken = [_round(calls, number, device, before) for number in range(rounds)]
    wait_for(device)
    return {name: _summary([one[name]() for one in taken]) for name in calls}


def _round(
    calls: Mapping[str, Call], number: int, device: torch.device, before: Callable[[], None] | None
) -> dict[str, Callable[[], float]]:
    """One call of each, beginning with another in every round; returns how to read the milliseconds once all is done."""
    names = list(calls)
    first = number % len(names)
    taken: dict[str, Callable[[], float]] = {}
    for name in names[first:] + names[:first]:
        if before is not None:
            before()
        taken[name] = _timed(calls[name], number, device)
    return taken


def _timed(call: Call, number: int, device: torch.device) -> Callable[[], float]:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(number)
        end.record()
        return lambda: float(start.elapsed_time(end))
    began = time.perf_counter()
    call(number)
    milliseconds = (time.perf_counter() - began) * 1e3
    return lambda: milliseconds


def captured(call: Call, sets: int) -> Call:
    """The same call as the replay of a CUDA graph, one for each set of inputs. It must not wait for the GPU."""
    graphs = []
    for number in range(sets):
        with torch.cuda.stream(torch.cuda.Stream()):
            call(number)  # compiles, in a stream of its own as a capture wants it
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            call(number)
    return lambda number: graphs[number % sets].replay()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(milliseconds: Sequence[float]) -> Timing:
    median = statistics.median(milliseconds)
    quartiles = statistics.quantiles(milliseconds, n=4) if len(milliseconds) > 1 else [median] * 3
    return Timing(median, min(milliseconds), (quartiles[2] - quartiles[0]) / median, len(milliseconds))


def memory_of(forward: Callable[[], Tensor], backward: Callable[[Tensor], Mapping[str, Tensor]], matrices: set[str]) -> Memory:
    """Counts a forward and a backward pass on the GPU; `backward` returns gradients by name, `matrices` names weights."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = forward()
    saved = torch.cuda.memory_allocated() - before - nbytes([output])
    gradients = backward(output)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return Memory(saved, peak, nbytes([gradient for name, gradient in gradients.items() if name in matrices]))


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sets_needed(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs to go around so that none is still in the GPU's cache when its turn comes. One on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, 1 + math.ceil(2 * cache / set_bytes)) if set_bytes < 2 * cache else 1


def measure_ceilings(device: torch.device) -> Ceilings:
    """A square matrix product and a copy on the device, on random numbers (zeros would draw less power and run faster)."""
    on_gpu = device.type == "cuda"
    size, dtype, count = (8192, torch.bfloat16, 1 << 30) if on_gpu else (1024, torch.float32, 1 << 24)
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    left, right, product = (
        torch.randn(size, size, **options),
        torch.randn(size, size, **options),
        torch.empty(size, size, **options),
    )
    source = torch.randn(count, **options)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        "product": lambda _: torch.mm(left, right, out=product),
        "copy": lambda _: target.copy_(source),
    }
    timings = interleaved(calls, device, repeats=None if on_gpu else 5)
    return Ceilings(
        product=f"{str(dtype).removeprefix('torch.')} {size}^3",
        tflops=2 * size**3 / timings["product"].median_ms / 1e9,
        copy=f"{nbytes([source]) / 1e9:.2g} GB",
        copy_tbytes=2 * nbytes([source]) / timings["copy"].median_ms / 1e9,
    )
