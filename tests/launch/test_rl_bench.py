"""The benchmark of an iteration: its stages are all there, and the engine generates with what the trainer has learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels.errors import UserError
from launch.bench import main
from launch.benchmarks.april import forced_engine
from launch.benchmarks.models import model_config
from launch.benchmarks.options import read_options
from launch.benchmarks.rl import DEFAULTS, STAGES, IterationOptions, transformers_generation

SMALL = ["groups=2", "samples=2", "slots=4", "median=3", "longest=12", "prompt=4", "advance=2", "warm_rounds=1", "rounds=2"]


def test_the_table_shows_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rl.json"
    assert main(["rl", *SMALL, "micro_rows=1", "workers=1", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    (case,) = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [stage["name"] for stage in case["stages"]] == list(STAGES) and not case["failures"]
    for stage in case["stages"]:
        assert stage["seconds"] > 0 and f"{stage['seconds']:.4f}" in printed
        assert (stage["ceiling"] is None) == (stage["name"] == "reward")
        assert stage["ceiling"] is None or 0 < stage["work"] / stage["seconds"] < stage["ceiling"]
    by_name = {stage["name"]: stage for stage in case["stages"]}
    assert by_name["update"]["work"] > by_name["logprob"]["work"], "a backward pass costs two forward passes"
    assert by_name["update"]["tokens"] > by_name["reward"]["tokens"] > 0, "prompts go through the trainer, too"


def test_the_peer_generates_with_the_same_sizes() -> None:
    pytest.importorskip("transformers")
    options = read_options(IterationOptions, {**DEFAULTS["cpu"], "out": "x.json"}, [*SMALL, "peer_response=3"])
    model = model_config(options, "tiny", 17)
    assert transformers_generation()(model, options, torch.device("cpu")) > 0


def test_the_engine_has_room_for_the_longest() -> None:
    options = read_options(IterationOptions, {**DEFAULTS["cpu"], "out": "x.json"}, SMALL)
    with pytest.raises(UserError, match="max_positions"):
        forced_engine(options, model_config(options, "tiny", 8), 4, torch.device("cpu"), torch.float32)
