"""The rollout benchmark: what it prints is what its file holds, and the floor counts the bytes by definition."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.errors import UserError
from launch.bench import bench, main
from launch.benchmarks.april import response_length, sweep
from launch.benchmarks.models import floor_bytes, model_config, random_weights
from launch.benchmarks.options import read_options
from launch.benchmarks.peers import Generation, GenerationPeer
from launch.benchmarks.rollout import DEFAULTS, Rollout, RolloutOptions, measure, table
from launch.benchmarks.timing import Ceilings, WorkClock


def test_the_table_shows_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rollout.json"
    assert main(["rollout", "batch=1,3", "response=5", "over_provision=", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [case["batch"] for case in cases] == [1, 3]
    for case in cases:
        assert case["step_ms"] > 0 and case["prefill_ms"] > 0 and f"{case['step_ms']:.3f}" in printed
        assert f"{case['batch'] / case['step_ms'] * 1000:,.0f}" in printed


def test_peers_generate_as_many_tokens_in_the_same_run_and_stand_in_the_table() -> None:
    arguments = ["batch=2,3", "response=5", "over_provision="]
    options = read_options(RolloutOptions, {**DEFAULTS["cpu"], "out": "x.json"}, arguments)
    asked: list[Generation] = []

    def quick() -> GenerationPeer:
        return lambda model, generation, device: asked.append(generation) or 1234.0  # type: ignore[func-returns-value]

    cases = list(measure(options, {"quick": quick}, torch.device("cpu"), Ceilings("", 1.0, "", 1.0)))
    assert [(one.sequences, one.prompt, one.response) for one in asked] == [(2, 16, 5), (3, 16, 5)]
    for case in cases:
        assert isinstance(case, Rollout) and case.peers_tokens_per_s == {"quick": 1234.0}
        assert str(table(case).columns[-1].header) == "quick tokens/s" and list(table(case).columns[-1].cells) == ["1,234"]


def test_the_floor_is_every_weight_once_and_every_key_and_value() -> None:
    options = read_options(RolloutOptions, {**DEFAULTS["cpu"], "out": "x.json"}, [])
    config = model_config(options, "tiny", 145)
    model = random_weights(config, torch.device("cpu"), torch.float32, seed=0)
    weights = sum(tensor.numel() for name, tensor in model.state().items() if name != "bias")
    keys = 2 * 2 * 2 * 16 * 100_000 * 7  # keys and values, layers, heads, head_dim, rows, length
    assert floor_bytes(config, 100_000, 700_000, 4) == pytest.approx((weights + keys) * 4)  # so many rows leave no expert out
    one_row = floor_bytes(config, 1, 0, 4) / 4
    assert one_row == pytest.approx(weights - 2 * (8 - 2) * 3 * 64 * 32), "one row reads its two experts of eight"


ROUNDS = ["groups=3", "samples=2", "slots=6", "median=3", "longest=24", "advance=2", "warm_rounds=2", "rounds=4", "batch="]


def round_options(*changes: str) -> RolloutOptions:
    return read_options(RolloutOptions, {**DEFAULTS["cpu"], "out": "x.json"}, [*ROUNDS, *changes])


def test_lengths_are_long_tailed_and_a_prompts_responses_alike() -> None:
    drawn = np.array([[response_length(group << 16 | own, 256, 4096, seed=0) for own in range(8)] for group in range(512)])
    assert drawn.min() >= 1 and drawn.max() == 4096, "the cut is reached now and then"
    assert 230 < np.median(drawn) < 280 and 380 < drawn.mean() < 460  # exp(1/2) = 1.65 times the median, less what is cut
    logs = np.log(drawn)
    assert 0.4 < logs.mean(axis=1).var() < 0.7 and 0.4 < logs.var(axis=1, ddof=1).mean() < 0.6
    longest = np.median(drawn[: 32 * 16].reshape(-1, 256).max(axis=1))
    assert longest / np.median(drawn) > 10


def test_a_response_has_its_own_length_however_often_it_was_interrupted() -> None:
    options = round_options("max_staleness=20")
    weights = random_weights(model_config(options, "tiny", 145), torch.device("cpu"), torch.float32, seed=0)
    (sync, april) = sweep(options, "tiny", weights, 6, torch.device("cpu"), torch.float32, 0.01)
    for number, one in enumerate(sync.rounds, start=1):  # after one warm round
        groups = range(3 * number, 3 * number + 3)
        assert one.trained_tokens == sum(response_length(g << 16 | own, 3, 24, 0) for g in groups for own in range(2))
        assert one.generated_tokens == one.trained_tokens and one.waiting_tokens == one.recomputed_tokens == one.staleness == 0
    assert april.submitted_groups == 6 and april.discarded_tokens == 0
    assert any(one.stale_share > 0 and one.recomputed_tokens > 0 for one in april.rounds), "some were interrupted"
    assert all(0 <= share < 1 for case in (sync, april) for share in (case.idle_share, case.idle_of_steps))
    assert april.sync_rate == sync.trained_rate
    for one in (*sync.rounds, *april.rounds):  # the one device of this machine is the host, which does the rest besides
        assert 0 < one.device_seconds < one.seconds
    assert april.engine_idle == 1 - sum(one.device_seconds for one in april.rounds) / april.seconds


class Stream:
    """Of a GPU that takes 4 ms for what is given to it in a block, while the host goes on: times in ms."""

    def __init__(self) -> None:
        self.host = self.done = 0.0

    def event(self, enable_timing: bool) -> StreamEvent:
        return StreamEvent(self)


class StreamEvent:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = max(self.stream.host, self.stream.done)

    def query(self) -> bool:
        return self.at <= self.stream.host

    def synchronize(self) -> None:
        self.stream.host = max(self.stream.host, self.at)

    def elapsed_time(self, later: StreamEvent) -> float:
        return later.at - self.at


def test_a_device_works_from_when_it_gets_to_a_block_until_it_is_done_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    clock = WorkClock(torch.device("cuda"))
    for began in (0, 1, 20, 21, 22):  # two steps without a gap, a wait for the host, three more
        stream.host = began
        with clock:
            stream.done = max(stream.host, stream.done) + 4
    assert clock.seconds == pytest.approx(0.020) == clock.seconds and stream.host == 32
    on_host = WorkClock(torch.device("cpu"))
    began = time.perf_counter()
    with on_host:
        time.sleep(0.02)
    time.sleep(0.02)
    assert 0.02 <= on_host.seconds <= time.perf_counter() - began - 0.02


def test_every_generated_token_is_trained_waits_or_is_counted_as_discarded() -> None:
    options = round_options("max_staleness=0")
    weights = random_weights(model_config(options, "tiny", 145), torch.device("cpu"), torch.float32, seed=0)
    *_, april = sweep(options, "tiny", weights, 6, torch.device("cpu"), torch.float32, 0.01)
    assert april.discarded_tokens > 0 and all(one.staleness == 0 for one in april.rounds)


def test_rounds_are_printed_as_the_file_holds_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rollout.json"
    assert main(["rollout", *ROUNDS, "over_provision=1.5,1", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [case["over_provision"] for case in cases] == [1, 1.5], "synchronous rounds run first, and once"
    for case in cases:
        seconds = sum(one["seconds"] for one in case["rounds"])
        rate = sum(one["trained_tokens"] for one in case["rounds"]) / seconds
        assert f"{rate:,.0f}" in printed and f"{rate / case['sync_rate']:.2f}x" in printed


def test_a_missing_size_is_an_error() -> None:
    with pytest.raises(UserError, match="batch"):
        bench("rollout", ["batch=0"])
