"""The rollout benchmark: what it prints is what its file holds, and the floor counts the bytes by definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels.errors import UserError
from launch.bench import bench, main
from launch.benchmarks.options import read_options
from launch.benchmarks.rollout import DEFAULTS, RolloutOptions, floor_bytes, model_config, random_weights


def test_the_table_shows_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rollout.json"
    assert main(["rollout", "batch=1,3", "response=5", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [case["batch"] for case in cases] == [1, 3]
    for case in cases:
        assert case["step_ms"] > 0 and case["prefill_ms"] > 0 and f"{case['step_ms']:.3f}" in printed
        assert f"{case['batch'] / case['step_ms'] * 1000:,.0f}" in printed


def test_the_floor_is_every_weight_once_and_every_key_and_value() -> None:
    options = read_options(RolloutOptions, {**DEFAULTS["cpu"], "out": "x.json"}, [])
    config = model_config(options, "tiny")
    model = random_weights(config, torch.device("cpu"), torch.float32, seed=0)
    weights = sum(tensor.numel() for name, tensor in model.state().items() if name != "bias")
    keys = 2 * 2 * 2 * 16 * 100_000 * 7  # keys and values, layers, heads, head_dim, rows, length
    assert floor_bytes(config, 100_000, 7, 4) == pytest.approx((weights + keys) * 4)  # so many rows leave no expert out
    one_row = floor_bytes(config, 1, 0, 4) / 4
    assert one_row == pytest.approx(weights - 2 * (8 - 2) * 3 * 64 * 32), "one row reads its two experts of eight"


def test_a_missing_size_is_an_error() -> None:
    with pytest.raises(UserError, match="batch"):
        bench("rollout", ["batch=0"])
