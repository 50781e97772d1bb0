"""A rank that stands still is named, with what the other one waits in, and the run restarts: over NCCL and in peer memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.commands import finish, series, start, wait_for_step
from tests.end_to_end.kills import wait_for_process
from tests.gpu.needs import gpus, hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    gpus(2),
    hopper(),
]


@pytest.mark.parametrize("transport", ["messages", "auto"])
def test_the_run_restarts_without_the_rank_that_stood_still(transport: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(
        *("pretrain", "experiment=smoke", f"runs_dir={tmp_path}", "run_name=run", "cluster.ranks=2", "train.steps=60"),
        *("train.checkpoint_every=5", "cluster.collective_timeout_s=30", f"parallel.transport={transport}", "logger.wandb=off"),
    )
    wait_for_step(run, 12, process)
    stopped = wait_for_process("trainer/1", process.pid)
    stopped.suspend()
    output = finish(process, timeout_s=600)
    assert "trainer/1 hangs (it wrote no stack, so its whole process or machine stands still); trainer/0 waits in" in output
    assert "restart 1 of" in output and "continuing after step" in output, output
    assert not stopped.is_running(), "the rank that stood still is still there"
    assert sorted(series(run, "train/loss")) == list(range(1, 61))
