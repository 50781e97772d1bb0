"""A trace has the steps, ranks and engines that were asked for, in one file a node that is whole, and never ends a run."""

from __future__ import annotations

import errno
import gzip
import json
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.errors import UserError
from launch.cli import load
from launch.trace import trace
from parallel.topology import World
from trainer.config.run import PretrainConfig, TraceConfig
from trainer.run_dir import RunDir, traces_of
from trainer.tracing import REQUEST, TraceRequest, Traces, merge
from trainer.worker import TrainWorker

UNTRACED = TraceConfig(range=None, ranks="all", memory=False)


class Ranks:
    """Three ranks in this process, two on the first node. PyTorch traces one at a time, so they take turns."""

    def __init__(self) -> None:
        self.workers = [TrainWorker(rank) for rank in range(3)]
        for worker in self.workers:
            worker.world = World(worker.rank, 3, torch.device("cpu"), ranks_per_node=2)
        self.asked: list[str] = []

    def call(self, method: str, *arguments: Any) -> list[Any]:
        self.asked.append(method)
        if method == "start_trace":  # each sees its own work only
            self.wanted = arguments
            return [None] * 3
        return [self._traced(worker, *arguments) for worker in self.workers]

    def _traced(self, worker: TrainWorker, folder: Path) -> Any:
        worker.start_trace(*self.wanted)
        with torch.profiler.record_function(f"work of rank {worker.rank}"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(socket, "gethostname", lambda: f"host{worker.rank // 2}")
            return worker.end_trace(folder)


def request(steps: int, **wanted: Any) -> TraceRequest:
    return TraceRequest.model_validate(
        {"steps": steps, "ranks": "all", "engines": "all", "tokens": 8, "memory": False, **wanted}
    )


@cache
def composed() -> PretrainConfig:
    return load(PretrainConfig, "pretrain", ["run_name=traced"])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    run = RunDir.open(composed().model_copy(update={"runs_dir": tmp_path}), "pretrain")
    run.log_file("driver").parent.mkdir(parents=True)
    yield run
    run.lock.close()


def steps(traces: Traces, ranks: Ranks, first: int, last: int, end: int = 99) -> None:
    for step in range(first, last + 1):
        traces.before(ranks.call, step)
        traces.after(ranks.call, step, last=step == end)


def events(file: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def test_planned_steps_become_one_file_a_node(run: RunDir) -> None:
    ranks, said = Ranks(), list[str]()
    traces = Traces(TraceConfig(range=(2, 3), ranks="all", memory=True), run, 3, said.append)
    steps(traces, ranks, 1, 5)
    assert ranks.asked == ["start_trace", "end_trace"]
    (folder,) = traces_of(run.path)
    assert folder.name == "steps_000002-000003"
    assert {file.name for file in folder.iterdir()} == {"node_host0.json.gz", "node_host1.json.gz"}
    names = [{event["name"] for event in events(folder / f"node_host{node}.json.gz")} for node in (0, 1)]
    assert {"work of rank 0", "work of rank 1", "aten::mm"} <= names[0] and "work of rank 2" not in names[0]
    assert "work of rank 2" in names[1]
    assert "traced steps 2 to 3" in said[0] and "no memory snapshot" in said[1]


def test_processes_of_ranks_stay_apart_and_share_one_clock(run: RunDir) -> None:
    steps(Traces(TraceConfig(range=(1, 1), ranks=(0, 1), memory=False), run, 3, lambda text: None), Ranks(), 1, 1)
    found = events(run.traces / "steps_000001-000001" / "node_host0.json.gz")
    work = {event["name"]: event for event in found if event["name"].startswith("work of rank")}
    assert work.keys() == {"work of rank 0", "work of rank 1"}
    first, second = work["work of rank 0"], work["work of rank 1"]
    assert first["pid"] != second["pid"] and first["ts"] + first["dur"] <= second["ts"]
    named = {event["pid"]: event["args"]["name"] for event in found if event["ph"] == "M" and event["name"] == "process_name"}
    assert named[first["pid"]].startswith("rank 0: ") and named[second["pid"]].startswith("rank 1: ")


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 50)), min_size=1, max_size=4))
def test_merged_times_count_from_the_first_ranks_moment(ranks: list[tuple[int, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for rank, (base_ns, number) in enumerate(ranks):
            files[f"rank_{rank}"] = Path(folder) / f"{rank}.json"
            one = {"ph": "s", "name": "launch", "pid": 7, "tid": 1, "ts": 5.0, "id": number}
            files[f"rank_{rank}"].write_text(json.dumps({"baseTimeNanoseconds": base_ns, "traceEvents": [one]}))
        merge(files, Path(folder) / "out.json.gz")
        found = events(Path(folder) / "out.json.gz")
    assert [event["ts"] for event in found] == [pytest.approx(5 + (base - ranks[0][0]) / 1000) for base, _ in ranks]
    assert len({event["id"] for event in found}) == len({event["pid"] for event in found}) == len(ranks)


def test_a_request_is_obeyed_once(run: RunDir) -> None:
    ranks, traces = Ranks(), Traces(UNTRACED, run, 3, lambda text: None)
    steps(traces, ranks, 1, 1)
    (run.path / REQUEST).write_text(request(2, ranks=(1,)).model_dump_json())
    steps(traces, ranks, 2, 6)
    (folder,) = traces_of(run.path)
    assert folder.name == "steps_000002-000003" and not (run.path / REQUEST).exists()
    assert "work of rank 0" not in {event["name"] for event in events(folder / "node_host0.json.gz")}


def test_planned_steps_that_have_passed_are_said_once_unless_they_were_traced(run: RunDir) -> None:
    config, said = TraceConfig(range=(2, 3), ranks="all", memory=False), list[str]()
    ranks = Ranks()
    steps(Traces(config, run, 3, said.append), ranks, 3, 5)
    assert ranks.asked == [] and len(said) == 1
    assert "trace.range [2, 3] is not traced: it began before step 3" in said[0] and "launch.trace" in said[0]
    (run.path / REQUEST).write_text(request(2, ranks="all").model_dump_json())
    steps(Traces(config, run, 3, said.append), ranks, 1, 4)
    assert ["traced steps 1 to 2" in said[1], "[2, 3] is not traced" in said[2]] == [True, True] and len(said) == 3
    steps(Traces(config, run, 3, said.append), ranks, 2, 4)
    assert "traced steps 2 to 3" in said[3]
    steps(Traces(config, run, 3, said.append), ranks, 3, 5)
    assert len(said) == 4, "an attempt before has traced it"


def test_a_trace_ends_with_the_run(run: RunDir) -> None:
    traces = Traces(TraceConfig(range=(4, 9), ranks="all", memory=False), run, 3, lambda text: None)
    steps(traces, Ranks(), 1, 5, end=5)
    assert [folder.name for folder in traces_of(run.path)] == ["steps_000004-000005"]


@given(
    st.one_of(
        st.binary(max_size=40), st.dictionaries(st.sampled_from(["steps", "ranks", "engines", "memory"]), st.integers(-9, 9))
    )
)
def test_a_request_that_is_none_is_said_and_removed(content: bytes | dict[str, int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        config = composed().model_copy(update={"runs_dir": Path(folder)})
        run, said, ranks = RunDir.open(config, "pretrain"), list[str](), Ranks()
        (run.path / REQUEST).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        steps(Traces(UNTRACED, run, 3, said.append), ranks, 1, 2)
        run.lock.close()
        assert len(said) == 1 and not ranks.asked and not (run.path / REQUEST).exists()


def test_ranks_that_are_not_there_are_said(run: RunDir) -> None:
    said = list[str]()
    (run.path / REQUEST).write_text(request(1, ranks=(3,)).model_dump_json())
    steps(Traces(UNTRACED, run, 3, said.append), Ranks(), 1, 1)
    (run.path / REQUEST).write_text(request(1, engines=(0,)).model_dump_json())
    steps(Traces(UNTRACED, run, 3, said.append), Ranks(), 1, 1)
    (run.path / REQUEST).write_text(request(1, engines=(0, 2)).model_dump_json())
    steps(Traces(UNTRACED, run, 3, said.append, lambda: (0, 1)), Ranks(), 1, 1)
    (run.path / REQUEST).write_text(request(1, engines=(1,)).model_dump_json())
    steps(Traces(UNTRACED, run, 3, said.append, lambda: (0, 2)), Ranks(), 1, 1)
    assert said == [
        "a trace of ranks [3] was asked for; there are ranks 0 to 2",
        "a trace of engines [0] was asked for; there are none",
        "a trace of engines [0, 2] was asked for; there are engines 0 to 1",
        "a trace of engines [1] was asked for; there are engines 0, 2",
    ]


def test_a_trace_that_cannot_be_written_is_said_and_leaves_nothing(run: RunDir) -> None:
    said = list[str]()
    run.traces.write_text("a file where the folder should be")
    steps(Traces(TraceConfig(range=(1, 1), ranks="all", memory=False), run, 3, said.append), Ranks(), 1, 2)
    assert len(said) == 1 and "cannot be written" in said[0] and "goes on" in said[0]
    assert run.traces.is_file()


class CutShort(Ranks):
    """As on a full disk, of which PyTorch's profiler says nothing."""

    def _traced(self, worker: TrainWorker, folder: Path) -> Any:
        traced = super()._traced(worker, folder)
        traced.events.write_bytes(traced.events.read_bytes()[:400])
        return traced


def test_a_trace_that_was_cut_short_is_said_and_leaves_nothing(run: RunDir) -> None:
    said = list[str]()
    steps(Traces(TraceConfig(range=(1, 1), ranks="all", memory=False), run, 3, said.append), CutShort(), 1, 2)
    assert len(said) == 1 and "cannot be written" in said[0] and "goes on" in said[0]
    assert list(run.traces.iterdir()) == []


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), FileNotFoundError(errno.ENOENT, "gone")])
def test_a_request_that_another_user_made_or_has_taken_back_is_said(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(file: Path) -> bytes:
        file.unlink()
        raise error

    ranks, said = Ranks(), list[str]()
    (run.path / REQUEST).write_text(request(1).model_dump_json())
    monkeypatch.setattr(Path, "read_bytes", fail)
    steps(Traces(UNTRACED, run, 3, said.append), ranks, 1, 2)
    assert not ranks.asked and len(said) == 1
    assert said[0].startswith("the trace that ") and said[0].endswith(f"asks for cannot be made: {error.strerror}")


def test_the_command_refuses_a_run_that_is_over(run: RunDir) -> None:
    run.close("finished")
    with pytest.raises(UserError, match="traced is finished; only a run in progress can be traced"):
        trace(run.path, request(1))
    assert not (run.path / REQUEST).exists()


def test_the_command_does_not_wait_for_a_run_that_was_killed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.trace.time.sleep", lambda seconds: run.lock.close())
    with pytest.raises(UserError, match="traced is not going on, though it says so: no command has it open"):
        trace(run.path, request(1))
    assert not (run.path / REQUEST).exists()


def test_the_command_waits_for_the_trace(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    traces, ranks, looks = Traces(UNTRACED, run, 3, lambda text: None), Ranks(), iter(range(1, 9))
    monkeypatch.setattr("launch.trace.time.sleep", lambda seconds: steps(traces, ranks, step := next(looks), step))
    assert trace(run.path, request(2)).name == "steps_000001-000002"


def test_the_command_says_why_there_is_none(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(text: str) -> None:
        with open(run.log_file("driver"), "a") as log:
            log.write(f"   0:01  {text}\n")

    traces = Traces(UNTRACED, run, 3, say)
    monkeypatch.setattr("launch.trace.time.sleep", lambda seconds: steps(traces, Ranks(), 1, 1))
    with pytest.raises(UserError, match=r"a trace of ranks \[7\] was asked for; there are ranks 0 to 2"):
        trace(run.path, request(1, ranks=(7,)))
