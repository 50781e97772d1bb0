"""Traces of steps, as asked for beforehand (`trace.range`) or while a run goes on (`python -m launch.trace RUN`).

    traces/steps_000012-000013/
        node_0.json.gz             what the ranks of a node did, one file that Perfetto and chrome://tracing open
        rank_0.memory.pickle       what the allocator of a GPU did, for pytorch.org/memory_viz; nothing here reads it

The driver decides between two steps, so all ranks trace the same ones. Ranks of a node share a clock; nodes do not, so each has
a file. Tracing slows the steps that it shows.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch.profiler import ProfilerActivity, profile

from trainer.config.record import Record
from trainer.config.run import TraceConfig
from trainer.run_dir import RunDir, shown

REQUEST = "trace_request.json"  # in the run's folder
MOST_STEPS = 100
MEMORY_EVENTS = 200_000  # of an allocator; older ones are forgotten
Ask = Callable[..., list[Any]]  # asks all ranks for the same thing, as trainer.cluster.Processes.call does


class TraceRequest(Record):
    """What the request file holds."""

    steps: int = Field(gt=0, le=MOST_STEPS)
    ranks: Literal["all"] | tuple[int, ...]
    memory: bool


# ---------------------------------------------------------------- on a rank


@dataclass(frozen=True)
class Traced:
    """What a rank has written."""

    rank: int
    node: int
    events: Path
    memory: bool  # whether there is a snapshot


class Tracing:
    """One rank's trace under way, from `Tracing(...)` to `end`."""

    def __init__(self, device: torch.device, memory: bool) -> None:
        on_gpu = device.type == "cuda"
        self.memory = memory and on_gpu  # only CUDA's allocator keeps a history
        if self.memory:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self.profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        self.profile.start()

    def end(self, folder: Path, rank: int, node: int) -> Traced:
        """Writes what was seen into a folder that exists. Raises OSError if that cannot be."""
        self.profile.stop()
        if self.memory:
            try:
                torch.cuda.memory._dump_snapshot(str(folder / f"rank_{rank}.memory.pickle"))
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
        events = folder / f"rank_{rank}.json"
        self.profile.export_chrome_trace(str(events))
        return Traced(rank, node, events, self.memory)


# ---------------------------------------------------------------- in the driver


class Traces:
    """What a run traces; `say` tells where it is."""

    def __init__(self, config: TraceConfig, run: RunDir, ranks: int, say: Callable[[str], None]) -> None:
        self.run, self.ranks, self.say = run, ranks, say
        self.planned: tuple[int, TraceRequest] | None = None  # the first step, and what is wanted
        if config.range is not None:
            first, last = config.range
            self.planned = first, TraceRequest(steps=last - first + 1, ranks=config.ranks, memory=config.memory)
        self.running: tuple[int, int, TraceRequest] | None = None  # the first and the last step

    def before(self, ask: Ask, step: int) -> None:
        """Before each step, numbered from 1."""
        if self.running is None and (wanted := self._wanted(step)) is not None:
            self.running = step, step + wanted.steps - 1, wanted
            ask("start_trace", wanted.ranks, wanted.memory)

    def behind(self, ask: Ask, step: int, last: bool) -> None:
        """Behind each step. `last`: no other follows, so a trace ends here."""
        if self.running is not None and (step == self.running[1] or last):
            (first, _, wanted), self.running = self.running, None
            self._finish(ask, first, step, wanted)

    def _wanted(self, step: int) -> TraceRequest | None:
        if self.planned is not None and self.planned[0] == step:
            return self.planned[1]
        file = self.run.path / REQUEST
        if not file.is_file():
            return None
        try:
            wanted = TraceRequest.model_validate_json(file.read_bytes())
        except ValidationError as error:
            self.say(f"{shown(file)} is no request for a trace: {error.errors(include_url=False)[0]['msg']}")
            return None
        finally:
            file.unlink()
        if wanted.ranks != "all" and not set(wanted.ranks) <= set(range(self.ranks)):
            self.say(f"a trace of ranks {list(wanted.ranks)} was asked for; there are ranks 0 to {self.ranks - 1}")
            return None
        return wanted

    def _finish(self, ask: Ask, first: int, last: int, wanted: TraceRequest) -> None:
        folder = self.run.traces / f"steps_{first:06d}-{last:06d}"
        staging = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            answers = ask("end_trace", staging)
            failure = next((answer for answer in answers if isinstance(answer, str)), None)
            if failure is None:
                written = [answer for answer in answers if answer is not None]
                merge_nodes(written, staging)
                shutil.rmtree(folder, ignore_errors=True)  # of an attempt before this one
                staging.replace(folder)
        except OSError as error:
            failure = str(error)
        if failure is not None:
            shutil.rmtree(staging, ignore_errors=True)
            self.say(f"the trace {shown(folder)} cannot be written: {failure}. The run goes on without it")
            return
        self.say(f"traced steps {first} to {last}: {shown(folder)}/node_*.json.gz, for ui.perfetto.dev")
        if wanted.memory:
            self.say(_about_memory(folder, written))


def _about_memory(folder: Path, written: Sequence[Traced]) -> str:
    with_memory = [one.rank for one in written if one.memory]
    if not with_memory:
        return "there is no memory snapshot: only a GPU's allocator keeps a history, and these ranks are on CPUs"
    return f"memory snapshots of ranks {with_memory}: {shown(folder)}/rank_*.memory.pickle, for pytorch.org/memory_viz"


# ---------------------------------------------------------------- one file for a node


def merge_nodes(written: Sequence[Traced], folder: Path) -> None:
    """Replaces the files of ranks by one of each node, node_N.json.gz in `folder`."""
    for node in sorted({one.node for one in written}):
        files = {one.rank: one.events for one in written if one.node == node}
        merge(files, folder / f"node_{node}.json.gz")
        for file in files.values():
            file.unlink()


def merge(files: Mapping[int, Path], out: Path) -> None:
    """Chrome traces of ranks with one clock, in one: every rank's processes are its own, and all times count from one moment.

    One rank's events are in memory at a time.
    """
    base_ns: int | None = None
    pids: dict[tuple[int, Any], int] = {}
    with gzip.open(out, "wt", encoding="utf-8", compresslevel=3) as merged:
        merged.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for index, (rank, file) in enumerate(sorted(files.items())):
            trace = json.loads(file.read_text(encoding="utf-8"))
            base_ns = trace["baseTimeNanoseconds"] if base_ns is None else base_ns
            later_us = (trace["baseTimeNanoseconds"] - base_ns) / 1000
            events = [_of_rank(event, rank, later_us, pids, (index, len(files))) for event in trace["traceEvents"]]
            merged.write(",\n" * (index > 0) + ",\n".join(map(json.dumps, events)))
        merged.write("\n]}\n")


def _of_rank(
    event: dict[str, Any], rank: int, later_us: float, pids: dict[tuple[int, Any], int], turn: tuple[int, int]
) -> dict[str, Any]:
    """The event under numbers that no other rank has. `turn`: which of how many ranks this is."""
    process = rank, event["pid"]
    event = {**event, "pid": pids.setdefault(process, len(pids) + 1)}
    if "ts" in event:
        event["ts"] += later_us
    if isinstance(event.get("id"), int):  # of arrows from launches to kernels
        event["id"] = event["id"] * turn[1] + turn[0]
    if event["ph"] == "M" and event["name"] == "process_name":
        event["args"] = {"name": f"rank {rank}: {event['args']['name']}"}
    if event["ph"] == "M" and event["name"] == "process_sort_index":
        event["args"] = {"sort_index": event["pid"]}
    return event
