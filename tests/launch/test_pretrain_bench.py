"""The benchmark of whole updates: what it prints is what it writes, and it does the work that it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.bench import main
from launch.benchmarks.models import model_config
from launch.benchmarks.options import read_options
from launch.benchmarks.pretrain import DEFAULTS, PretrainOptions, _batch, _updates, _work
from launch.benchmarks.pretrain import Measured as ByRanks
from launch.benchmarks.timing import Ceilings, Timing
from trainer.estimate import training_flops

SMALL = ["hidden=32", "expert_hidden=16", "vocabulary=128", "layers=1", "rows=2", "micro_rows=1", "length=24", "repeats=2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks on a CPU")
def test_the_table_shows_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, profile = tmp_path / "pretrain.json", tmp_path / "profile.json"
    assert main(["pretrain", *SMALL, "ranks=2", "document=7", f"profile={profile}", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    (case,) = json.loads(out.read_text(encoding="utf-8"))["cases"]
    ours = case["updates"]["tessera"]
    assert ours["time"]["samples"] == 2 and ours["peak_gib"] is None
    assert ours["tokens_per_second"] == pytest.approx(2 * 24 / ours["time"]["median_ms"] * 1e3)
    assert f"{ours['time']['median_ms']:.1f}" in printed and f"{ours['tokens_per_second']:,.0f}" in printed
    kernels = json.loads(profile.read_text(encoding="utf-8"))
    assert kernels["launches"] > 0 and f"an update under the profiler: {kernels['seconds']:.3f} s" in printed
    assert main(["pretrain", *SMALL, "micro_rows=3"]) == 2
    assert "rows = 2 do not divide into micro-batches of micro_rows = 3" in capsys.readouterr().err


def test_work_is_that_of_the_tokens_and_of_what_they_see() -> None:
    options = read_options(PretrainOptions, {**DEFAULTS["cpu"], "out": "x.json"}, SMALL)
    model, ceilings = model_config(options, "tiny", options.length), Ceilings("", 2.0, "", 1.0)
    found = _updates(ByRanks(Timing(500.0, 500.0, 0.0, 1), None), model, options, ceilings)
    assert found.tokens_per_second == 96
    assert found.of_ceiling == pytest.approx(training_flops(model, 48, 2 * 24 * 25 / 2) / 0.5 / 2e12)
    documents = options.model_copy(update={"document": 4})
    assert _updates(ByRanks(Timing(500.0, 500.0, 0.0, 1), None), model, documents, ceilings).of_ceiling < found.of_ceiling
    lengths = torch.bincount(_batch(documents.model_copy(update={"rows": 100}), 128, 0).documents_BS[0].long())
    assert len(lengths) > 2 and "documents of 4 on average" in _work("tiny", documents)
