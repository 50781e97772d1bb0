"""The benchmark of checkpoints: both kinds are really written and cost what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.bench import main
from launch.benchmarks.checkpoints import Cost

SMALL = ["hidden=32", "expert_hidden=16", "vocabulary=128", "layers=1", "rows=1", "length=16", "every=2", "repeats=2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks on a CPU")
def test_the_table_shows_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "checkpoints.json"
    assert main(["checkpoints", *SMALL, f"folder={tmp_path}", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    disk, memory = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert (disk["way"], memory["way"]) == ("disk", "memory") and disk["nbytes"] == memory["nbytes"] > 0
    for case in (disk, memory):
        assert len(case["costs_s"]) == 2 and 0 < case["paused_s"] < case["whole_s"]
        assert f"{case['step_s']:.3f}" in printed and f"{case['whole_s']:.3f}" in printed
    assert [path for path in tmp_path.iterdir() if path != out] == [], "what was written is removed"


def test_a_cost_says_how_often_checkpoints_may_come() -> None:
    cost = Cost("", "disk", 0, step_s=2.0, paused_s=0.1, whole_s=3.0, costs_s=(0.5, 9.0, 0.6), every=20)
    assert cost.cost_s == 0.6 and cost.share == pytest.approx(0.015) and cost.least_every == 10
    assert cost.least_every * cost.step_s * 0.03 >= cost.cost_s
