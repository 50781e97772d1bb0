"""Where the time goes, from the events of a Chrome trace: which kernels take it, before which of them the device is idle, and
where the host waits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = ("Synchronize", "cudaMemcpy")  # in names of calls that may keep the host; cudaMemcpyAsync does from pageable memory
MOST = 40  # of each kind, the slowest
SHOWN, IDLE_SHOWN = 15, 8  # of kernels, and of what ended idle times
NAME_LENGTH = 160


@dataclass(frozen=True)
class Taken:
    """All events of one name."""

    name: str
    count: int
    ms: float


@dataclass(frozen=True)
class KernelTimes:
    """`kernels` run on the GPU, or on a CPU are torch's operators, each without those that it calls."""

    seconds: float  # from the first event to the last
    busy_s: float  # in which one of `kernels` ran, at least
    kernels: tuple[Taken, ...]
    host_waits: tuple[Taken, ...]  # calls to the driver in which the host may have waited
    launches: int  # of kernels
    kernels_s: float  # of all of them, those that are not listed too
    idle: tuple[Taken, ...]  # times in which none ran, by the kernel that ended them

    def lines(self, what: str) -> list[str]:
        """The slowest, for a person; `what` rank 0 did."""
        waited, waits = sum(one.ms for one in self.host_waits) / 1e3, sum(one.count for one in self.host_waits)
        found = [
            f"rank 0, {what} under the profiler: {self.seconds:.3f} s, {self.launches:,} kernels at work for "
            f"{self.busy_s / self.seconds:.0%} of it, {waited:.3f} s in {waits:,} calls in which the host may wait"
        ]
        for one in self.kernels[:SHOWN]:
            part = one.ms / 1e3 / self.kernels_s
            found.append(f"{one.ms:9.2f} ms {part:6.1%} {one.count:7,} x {one.name[:NAME_LENGTH]}")
        for one in self.idle[:IDLE_SHOWN]:
            found.append(f"{one.ms:9.2f} ms idle   {one.count:7,} x before {one.name[:NAME_LENGTH]}")
        return found


def kernel_times(events: Sequence[Mapping[str, Any]]) -> KernelTimes:
    """`events` as torch's profiler exports them, times in microseconds."""
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    on_device = [(e["name"], e["ts"], e["dur"]) for e in spans if e.get("cat") in ON_DEVICE]
    operators = [e for e in spans if e.get("cat") == "cpu_op"]
    kernels = on_device or [(e["name"], e["ts"], own) for e, own in zip(operators, without_nested(operators), strict=True)]
    runtime = [e for e in spans if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    waits = [(e["name"], e["ts"], e["dur"]) for e in runtime if any(word in e["name"] for word in WAITS)]
    busy = on_device or [(e["name"], e["ts"], e["dur"]) for e in operators]
    first, last = min(e["ts"] for e in spans), max(e["ts"] + e["dur"] for e in spans)
    total_s = sum(duration for _, _, duration in kernels) / 1e6
    seconds, idle = (last - first) / 1e6, list(idle_times(busy))
    span_s = (max(start + duration for _, start, duration in busy) - min(start for _, start, _ in busy)) / 1e6
    busy_s = span_s - sum(duration for _, _, duration in idle) / 1e6
    return KernelTimes(seconds, busy_s, by_name(kernels), by_name(waits), len(kernels), total_s, by_name(idle))


def by_name(spans: Iterable[tuple[str, float, float]]) -> tuple[Taken, ...]:
    taken: dict[str, list[float]] = defaultdict(list)
    for name, _, duration in spans:
        taken[name].append(duration)
    found = [Taken(name, len(durations), sum(durations) / 1e3) for name, durations in taken.items()]
    return tuple(sorted(found, key=lambda one: -one.ms)[:MOST])


def idle_times(spans: Iterable[tuple[str, float, float]]) -> Iterator[tuple[str, float, float]]:
    """(name of what ended it, start, duration) of each time between the first and the last in which none was under way."""
    until: float | None = None
    for name, start, duration in sorted(spans, key=lambda span: span[1]):
        if until is not None and start > until:
            yield name, until, start - until
        until = start + duration if until is None else max(until, start + duration)


def without_nested(spans: Sequence[Mapping[str, Any]]) -> list[float]:
    """The duration of each less that of the spans right within it, thread by thread."""
    own = [float(span["dur"]) for span in spans]
    threads: dict[Any, list[int]] = defaultdict(list)
    for index, span in enumerate(spans):
        threads[span["pid"], span["tid"]].append(index)
    for indices in threads.values():
        around: list[int] = []  # those under way, the outermost first
        for index in sorted(indices, key=lambda i: (spans[i]["ts"], -spans[i]["dur"])):
            while around and spans[around[-1]]["ts"] + spans[around[-1]]["dur"] <= spans[index]["ts"]:
                around.pop()
            if around:
                own[around[-1]] -= spans[index]["dur"]
            around.append(index)
    return own
