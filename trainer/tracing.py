"""Traces of steps, as asked for beforehand (`trace.range`) or while a run goes on (`python -m launch.trace RUN`).

    traces/steps_000012-000013/
        node_HOST.json.gz          ranks and engines of a node, one file for Perfetto or chrome://tracing
        rank_0.memory.pickle       the allocator of a GPU, for pytorch.org/memory_viz; nothing here reads it
        engine_0.memory.pickle

The driver decides between two steps, so all ranks trace the same ones. For an engine the trace covers only the first tokens
that it generates in these steps: a whole round would be gigabytes. Processes of a node share a clock; nodes do not, so each has
a file of its own. Tracing slows down what it shows.
"""

from __future__ import annotations

import gzip
import json
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch.profiler import ProfilerActivity, profile

from trainer.config.record import Record
from trainer.config.rl import MOST_TRACED_TOKENS, EngineTraceConfig
from trainer.config.run import TraceConfig
from trainer.run_dir import RunDir, shown

REQUEST = "trace_request.json"  # in the run's folder
MOST_STEPS = 100
MEMORY_EVENTS = 200_000  # of an allocator; older ones are forgotten
Ask = Callable[..., list[Any]]  # asks all ranks and engines for the same thing, as trainer.cluster.Processes.call does
Who = Literal["all"] | tuple[int, ...]


class TraceRequest(Record):
    """What the request file holds."""

    steps: int = Field(gt=0, le=MOST_STEPS)
    ranks: Who
    engines: Who
    tokens: int = Field(gt=0, le=MOST_TRACED_TOKENS)  # decoding steps of an engine
    memory: bool


# ---------------------------------------------------------------- on a rank or an engine


@dataclass(frozen=True)
class Traced:
    """What a process has written."""

    role: str  # rank_0, engine_1
    host: str
    events: Path
    memory: bool  # whether there is a snapshot


class Tracing:
    """A process's trace under way, from `Tracing(...)` to `end`; of an engine to its first `tokens` decoding steps."""

    def __init__(self, device: torch.device, memory: bool, tokens: int | None = None) -> None:
        self.tokens = tokens  # that are left
        self.stopped = False
        on_gpu = device.type == "cuda"
        self.memory = memory and on_gpu  # only CUDA's allocator keeps a history
        if self.memory:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self.profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        self.profile.start()

    def decoded(self, tokens: int) -> None:
        """An engine has made this many decoding steps more."""
        assert self.tokens is not None, "the trace of a rank counts no tokens"
        self.tokens -= tokens
        if self.tokens <= 0:
            self._stop()

    def end(self, folder: Path, role: str) -> Traced | str:
        """Writes what was seen into a folder that exists; why it cannot be, if so."""
        self._stop()
        try:
            if self.memory:
                torch.cuda.memory._dump_snapshot(str(folder / f"{role}.memory.pickle"))
            events = folder / f"{role}.json"
            self.profile.export_chrome_trace(str(events))
        except OSError as error:
            return f"{role}: {error}"
        finally:
            if self.memory:
                torch.cuda.memory._record_memory_history(enabled=None)
        return Traced(role, socket.gethostname(), events, self.memory)

    def _stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            self.profile.stop()


class Traceable:
    """A process that the driver can ask for a trace: a rank, an engine. These calls are not collective."""

    tracing: Tracing | None = None

    def traced_as(self) -> tuple[str, torch.device]:
        """(role, such as rank_0 or engine_1; where it computes)."""
        raise NotImplementedError

    def start_trace(self, wanted: TraceRequest) -> None:
        """From here on it notes what it does, if it is wanted."""
        role, device = self.traced_as()
        kind, _, number = role.partition("_")
        asked = wanted.ranks if kind == "rank" else wanted.engines
        if asked == "all" or int(number) in asked:
            self.tracing = Tracing(device, wanted.memory, wanted.tokens if kind == "engine" else None)

    def end_trace(self, folder: Path) -> Traced | str | None:
        """Writes it to the folder; why it cannot be, or None where nothing was traced."""
        if self.tracing is None:
            return None
        tracing, self.tracing = self.tracing, None
        return tracing.end(folder, self.traced_as()[0])


# ---------------------------------------------------------------- in the driver


class Traces:
    """What a run of this many ranks traces; `say` tells where it is, `engines` the numbers of those that take part."""

    def __init__(
        self,
        config: TraceConfig,
        run: RunDir,
        ranks: int,
        say: Callable[[str], None],
        engines: Callable[[], Sequence[int]] = lambda: (),
    ) -> None:
        self.run, self.say, self.ranks, self.engines = run, say, range(ranks), engines
        self.planned = _planned(config)  # the first step, and what is wanted
        self.running: tuple[int, int, TraceRequest] | None = None  # the first and the last step

    def before(self, ask: Ask, step: int) -> None:
        """Before each step, numbered from 1."""
        if self.planned is not None and step > self.planned[0]:
            self._say_passed(step)
        if self.running is None and (wanted := self._wanted(step)) is not None:
            self.running = step, step + wanted.steps - 1, wanted
            ask("start_trace", wanted)

    def after(self, ask: Ask, step: int, last: bool) -> None:
        """After each step. `last`: no other follows, so a trace ends here."""
        if self.running is not None and (step == self.running[1] or last):
            (first, _, wanted), self.running = self.running, None
            self._finish(ask, first, step, wanted)

    def _wanted(self, step: int) -> TraceRequest | None:
        if self.planned is not None and self.planned[0] == step:
            planned, self.planned = self.planned[1], None
            return planned
        file = self.run.path / REQUEST
        if not file.is_file():
            return None
        try:
            wanted = TraceRequest.model_validate_json(file.read_bytes())
        except ValidationError as error:
            self.say(f"{shown(file)} is not a request for a trace: {error.errors(include_url=False)[0]['msg']}")
            return None
        except OSError as error:  # another user's, or just now taken back
            self.say(f"the trace that {shown(file)} asks for cannot be made: {error.strerror}")
            return None
        finally:
            file.unlink(missing_ok=True)
        for kind, asked, found in (("rank", wanted.ranks, self.ranks), ("engine", wanted.engines, self.engines())):
            if asked != "all" and not set(asked) <= set(found):
                self.say(f"a trace of {kind}s {list(asked)} was asked for; there are {_numbered(kind, found)}")
                return None
        return wanted

    def _say_passed(self, step: int) -> None:
        """Unless an attempt before this one has traced it."""
        assert self.planned is not None
        (first, wanted), self.planned = self.planned, None
        if not any(self.run.traces.glob(f"steps_{first:06d}-*")):
            self.say(
                f"trace.range [{first}, {first + wanted.steps - 1}] is not traced: it began before step {step}, where this "
                f"attempt goes on, or in another trace. `python -m launch.trace {shown(self.run.path)}` asks for the next steps"
            )

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
        except (OSError, ValueError) as error:  # a full disk cuts what the profiler writes, which does not say so
            failure = str(error)
        if failure is not None:
            shutil.rmtree(staging, ignore_errors=True)
            self.say(f"the trace {shown(folder)} cannot be written: {failure}. The run goes on without it")
            return
        self.say(f"traced steps {first} to {last}: {shown(folder)}/node_*.json.gz, for ui.perfetto.dev")
        if wanted.memory:
            self.say(_about_memory(folder, written))


def _numbered(kind: str, found: Sequence[int]) -> str:
    if not found:
        return "none"
    whole = list(found) == list(range(len(found)))
    return f"{kind}s 0 to {found[-1]}" if whole else f"{kind}s {', '.join(map(str, found))}"


def _planned(config: TraceConfig) -> tuple[int, TraceRequest] | None:
    if config.range is None:
        return None
    first, last = config.range
    engines, tokens = (config.engines, config.tokens) if isinstance(config, EngineTraceConfig) else ((), 1)
    wanted = TraceRequest(steps=last - first + 1, ranks=config.ranks, engines=engines, tokens=tokens, memory=config.memory)
    return first, wanted


def _about_memory(folder: Path, written: Sequence[Traced]) -> str:
    with_memory = [one.role for one in written if one.memory]
    if not with_memory:
        return "there is no memory snapshot: only a GPU's allocator keeps a history, and these processes are on CPUs"
    return f"memory snapshots of {', '.join(with_memory)}: {shown(folder)}/*.memory.pickle, for pytorch.org/memory_viz"


# ---------------------------------------------------------------- one file for a node


def merge_nodes(written: Sequence[Traced], folder: Path) -> None:
    """Replaces the files of processes by one of each node, node_HOST.json.gz in `folder`."""
    for host in dict.fromkeys(one.host for one in written):
        files = {one.role: one.events for one in written if one.host == host}
        merge(files, folder / f"node_{host}.json.gz")
        for file in files.values():
            file.unlink()


def merge(files: Mapping[str, Path], out: Path) -> None:
    """Chrome traces of processes with one clock, role -> file, in one. Every role's processes are its own, and stand in the
    order given; all times count from one moment.

    The events of one role are in memory at a time.
    """
    base_ns: int | None = None
    pids: dict[tuple[str, Any], int] = {}
    with gzip.open(out, "wt", encoding="utf-8", compresslevel=3) as merged:
        merged.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for index, (role, file) in enumerate(files.items()):
            trace = json.loads(file.read_text(encoding="utf-8"))
            base_ns = trace["baseTimeNanoseconds"] if base_ns is None else base_ns
            later_us = (trace["baseTimeNanoseconds"] - base_ns) / 1000
            events = [_of_role(event, role, later_us, pids, (index, len(files))) for event in trace["traceEvents"]]
            merged.write(",\n" * (index > 0) + ",\n".join(map(json.dumps, events)))
        merged.write("\n]}\n")


def _of_role(
    event: dict[str, Any], role: str, later_us: float, pids: dict[tuple[str, Any], int], turn: tuple[int, int]
) -> dict[str, Any]:
    """The event under numbers that no other role has. `turn`: which of how many roles this is."""
    process = role, event["pid"]
    event = {**event, "pid": pids.setdefault(process, len(pids) + 1)}
    if "ts" in event:
        event["ts"] += later_us
    if isinstance(event.get("id"), int):  # of arrows from launches to kernels
        event["id"] = event["id"] * turn[1] + turn[0]
    if event["ph"] == "M" and event["name"] == "process_name":
        event["args"] = {"name": f"{role.replace('_', ' ')}: {event['args']['name']}"}
    if event["ph"] == "M" and event["name"] == "process_sort_index":
        event["args"] = {"sort_index": event["pid"]}
    return event
