"""Engines on GPUs of their own: they get the ranks' weights bit for bit, and generate while these learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.end_to_end.commands import run, series

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_a_rank_and_an_engine_that_have_a_gpu_each(tmp_path: Path) -> None:
    run("pretrain", "experiment=smoke", f"runs_dir={tmp_path}", "run_name=start", "cluster.ranks=1", "logger.wandb=off")
    common = ["rl", f"checkpoint={tmp_path}/start", "experiment=smoke", f"runs_dir={tmp_path}", "cluster.ranks=1"]
    common += ["rollout.placement=separate", "sync.check=true", "logger.wandb=off", "loop.rounds=4"]
    said = run(*common, "rollout=sync", "run_name=sync")
    assert "starting 1 trainer rank and 1 engine in places of their own" in said
    assert "weights go to the engines directly" in said
    found = series(tmp_path / "sync", "policy/mismatch_abs")
    assert len(found) == 4 and set(found.values()) == {0.0}, "every weight has arrived, and its tokens are the rank's"
    run(*common, "rollout=async", "run_name=async")
    assert max(series(tmp_path / "async", "rollout/stale_token_share").values()) > 0
