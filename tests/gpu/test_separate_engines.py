"""Engines on GPUs of their own: they get the ranks' weights bit for bit, and generate while these learn."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.end_to_end.commands import WAIT_S, finish, run, series, start
from tests.end_to_end.kills import wait_for_process
from tests.gpu.needs import gpus, hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    gpus(2),
    hopper(),
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


@gpus(3)
def test_an_engine_joins_and_is_lost_and_joins_again(tmp_path: Path) -> None:
    """The run begins without it, and gives it the weights of every round bit for bit."""
    run("pretrain", "experiment=smoke", f"runs_dir={tmp_path}", "run_name=start", "cluster.ranks=1", "logger.wandb=off")
    process = start(
        *("rl", f"checkpoint={tmp_path}/start", "experiment=smoke", f"runs_dir={tmp_path}", "run_name=rl", "logger.wandb=off"),
        *("cluster.ranks=1", "rollout=sync", "rollout.placement=separate", "rollout.engines=2", "rollout.min_engines=1"),
        *("sync.check=true", "loop.rounds=200", "loop.checkpoint_every=100"),
    )
    deadline = time.monotonic() + WAIT_S
    while 2 not in series(tmp_path / "rl", "rollout/engines").values():
        assert process.poll() is None and time.monotonic() < deadline, "engine/1 has not joined"
        time.sleep(0.1)
    wait_for_process("engine/1", process.pid).kill()
    output = finish(process, timeout_s=600)
    assert "engine/1 joins: 2 engines take part, of at most 2" in output and "from the last checkpoint" not in output, output
    assert "engine/1 died" in output and "engine/1 is back" in output, output
    assert set(series(tmp_path / "rl", "policy/mismatch_abs").values()) == {0.0}
