"""How long a device waits: by the clock on a CPU; on a GPU by events, so that the host does not wait."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

import torch


class Stopwatch:
    """Adds up the time of `with stopwatch:` blocks, or from `start` to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._started, self._seconds, self._laps = 0.0, 0.0, 0
        self._events: list[torch.cuda.Event] = []  # start and end in turns
        self._spare: list[torch.cuda.Event] = []  # to be recorded again, which costs the host less than new ones

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        if self._on_gpu:
            self._mark()
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        self._laps += 1
        if self._on_gpu:
            self._mark()
        else:
            self._seconds += time.perf_counter() - self._started

    def _mark(self) -> None:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def take(self) -> float:
        """Seconds since the last call; waits for the GPU to reach the last block."""
        if self._events:
            self._events[-1].synchronize()
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            self._seconds += sum(start.elapsed_time(end) for start, end in pairs) / 1000
            self._spare, self._events = [*self._spare, *self._events], []
        seconds, self._seconds, self._laps = self._seconds, 0.0, 0
        return seconds

    def forget(self) -> None:
        """What was measured so far is nobody's; waits for nothing: events that are under way may be recorded again."""
        self._seconds, self._laps = 0.0, 0
        self._spare, self._events = [*self._spare, *self._events], []

    def take_mean(self) -> float:
        """Seconds of a block since the last call; 0 if there was none."""
        laps = max(self._laps, 1)
        return self.take() / laps


@dataclass(frozen=True)
class Mark:
    name: str
    at_s: float  # since the first one


class Marks:
    """When a device came by, by name: its stream that is the current one, or on a CPU the thread."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._times: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event]] = []

    def __call__(self, name: str) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((name, event))
        else:
            self._times.append((name, time.perf_counter()))

    def take(self) -> list[Mark]:
        """All of them; waits for the GPU to reach each."""
        for _, event in self._events:
            event.synchronize()
        seconds = [(name, self._events[0][1].elapsed_time(event) / 1000) for name, event in self._events]
        return [Mark(name, at_s) for name, at_s in seconds or [(name, at - self._times[0][1]) for name, at in self._times]]
