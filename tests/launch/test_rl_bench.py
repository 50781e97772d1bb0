"""The benchmark of an iteration: its stages are all there, over ranks and engines as a run has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.errors import UserError
from launch.bench import main
from launch.benchmarks.april import forced_engine
from launch.benchmarks.iteration import STAGES, IterationOptions
from launch.benchmarks.kernel_times import kernel_times
from launch.benchmarks.models import model_config
from launch.benchmarks.options import read_options
from launch.benchmarks.peers import GENERATION_PEERS, Generation, generation_rates
from launch.benchmarks.rl import DEFAULTS, measure
from launch.benchmarks.timing import Ceilings

SMALL = ["groups=2", "samples=2", "slots=4", "median=3", "longest=12", "prompt=4", "advance=2", "warm_rounds=1", "rounds=2"]


LAYOUTS = {"shared": ["ranks=1"], "apart": ["ranks=2", "engines=1", "overlap=true"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a layout of processes on a CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_shows_what_the_file_holds(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, profile = tmp_path / "rl.json", tmp_path / "profile.json"
    profiled = [f"profile={profile}"] if layout == "apart" else []
    assert main(["rl", *SMALL, *LAYOUTS[layout], "micro_rows=1", "workers=1", *profiled, f"out={out}"]) == 0
    printed = capsys.readouterr().out
    (case,) = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [stage["name"] for stage in case["stages"]] == list(STAGES) and not case["failures"]
    for stage in case["stages"]:
        assert f"{stage['seconds']:.4f}" in printed and (stage["seconds"] > 0 or stage["name"] == "rest")
        assert (stage["ceiling"] is None) == (stage["name"] in ("reward", "rest"))
        assert stage["ceiling"] is None or 0 < stage["work"] / stage["busy_s"] / stage["devices"] < stage["ceiling"]
    by_name = {stage["name"]: stage for stage in case["stages"]}
    assert by_name["update"]["work"] > by_name["logprob"]["work"], "a backward pass costs two forward passes"
    assert by_name["update"]["tokens"] > by_name["reward"]["tokens"] > 0, "prompts go through the trainer, too"
    devices = [by_name[name]["devices"] for name in ("generate", "update")]
    assert (devices, case["devices"]) == (([1, 1], 1) if layout == "shared" else ([1, 2], 3))
    assert sum(stage["seconds"] for stage in case["stages"]) < 2 * case["seconds"], "medians of the parts of an iteration"
    if profiled:
        assert case["stages"][0]["busy_s"] > 0 and "kernels at work" in printed
        names = {one["name"] for one in json.loads(profile.read_text(encoding="utf-8"))["kernels"]}
        assert any("mm" in name for name in names)


def test_a_profile_counts_what_runs_and_what_waits() -> None:
    def event(name: str, kind: str, start: float, duration: float, thread: int = 1) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": kind, "ts": start, "dur": duration, "pid": 1, "tid": thread}

    host = [event("aten::mm", "cpu_op", 0, 100), event("aten::copy_", "cpu_op", 10, 30), event("aten::mm", "cpu_op", 200, 50)]
    other = [event("aten::copy_", "cpu_op", 20, 60, thread=2)]
    found = kernel_times([*host, *other, {"ph": "M", "name": "process_name"}])
    assert {one.name: (one.count, one.ms) for one in found.kernels} == {"aten::mm": (2, 0.12), "aten::copy_": (2, 0.09)}
    assert found.seconds == 250e-6 and found.busy_s == pytest.approx(150e-6) and found.host_waits == ()
    device = [event("gemm", "kernel", 50, 40, thread=7), event("gemm", "kernel", 80, 40, thread=8)]
    apart = kernel_times([*device, event("add", "kernel", 125, 5, thread=7), event("gemm", "kernel", 131, 1, thread=7)])
    assert [(one.name, one.count, one.ms) for one in apart.idle] == [("add", 1, 0.005), ("gemm", 1, 0.001)]
    assert "0.01 ms idle" in apart.lines("it")[-2] and apart.lines("it")[-2].endswith("1 x before add")
    waits = [event("cudaStreamSynchronize", "cuda_runtime", 100, 20), event("cudaLaunchKernel", "cuda_runtime", 5, 1)]
    found = kernel_times([*host, *device, *waits])
    assert [(one.name, one.count, one.ms) for one in found.kernels] == [("gemm", 2, 0.08)] and found.launches == 2
    assert found.busy_s == pytest.approx(70e-6) and [one.name for one in found.host_waits] == ["cudaStreamSynchronize"]
    summary, slowest, *_ = found.lines("an update")
    assert (
        "gemm" in slowest and "rank 0, an update under the profiler" in summary and "2 kernels at work for 28% of it" in summary
    )


def test_ranks_and_engines_are_counted_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    options = read_options(IterationOptions, {**DEFAULTS["cpu"], "out": "x.json"}, [*SMALL, "ranks=2", "engines=1"])
    with pytest.raises(UserError, match=r"ranks=2 and rollout.engines=1 .* need 3 GPUs, and this machine has 2"):
        next(measure(options, {}, torch.device("cpu"), Ceilings("", 1.0, "", 1.0)))


def test_the_peer_generates_with_the_same_sizes() -> None:
    pytest.importorskip("transformers")
    options = read_options(IterationOptions, {**DEFAULTS["cpu"], "out": "x.json"}, SMALL)
    model = model_config(options, "tiny", 17)

    def broken() -> Callable[..., float]:
        raise RuntimeError("no kernels here")

    asked, cpu = Generation(sequences=2, prompt=4, response=3, seed=0), torch.device("cpu")
    rates, failures = generation_rates({**GENERATION_PEERS, "other": broken}, model, asked, cpu)
    assert rates.keys() == {"transformers"} and rates["transformers"] > 0
    assert failures == {"other": "RuntimeError: no kernels here"}


def test_the_engine_has_room_for_the_longest() -> None:
    options = read_options(IterationOptions, {**DEFAULTS["cpu"], "out": "x.json"}, SMALL)
    with pytest.raises(UserError, match="max_positions"):
        forced_engine(options, model_config(options, "tiny", 8), 4, torch.device("cpu"), torch.float32)
