"""An engine on a GPU dies, then one hangs: another takes its place and its memory, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.commands import finish, run, series, start, wait_for_step
from tests.end_to_end.kills import wait_for_process
from tests.gpu.needs import gpus, hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    gpus(1),
    hopper(),
]


def test_engines_come_back_on_their_gpu(tmp_path: Path) -> None:
    run("pretrain", "experiment=smoke", f"runs_dir={tmp_path}", "run_name=start", "cluster.ranks=1", "logger.wandb=off")
    process = start(
        *("rl", f"checkpoint={tmp_path}/start", "experiment=smoke", f"runs_dir={tmp_path}", "run_name=rl", "loop.rounds=60"),
        *("cluster.ranks=1", "rollout.engines=2", "rollout=sync", "cluster.engine_timeout_s=60", "loop.checkpoint_every=30"),
    )
    wait_for_step(tmp_path / "rl", 3, process)
    wait_for_process("engine/0", process.pid).kill()
    wait_for_step(tmp_path / "rl", 20, process)
    wait_for_process("engine/1", process.pid).suspend()
    output = finish(process, timeout_s=600)
    assert "engine/0 died" in output and "engine/1 hangs" in output and "restart" not in output, output
    assert sum(series(tmp_path / "rl", "rollout/engines_lost").values()) == 2
    assert sum(series(tmp_path / "rl", "rollout/engines_returned").values()) >= 1
