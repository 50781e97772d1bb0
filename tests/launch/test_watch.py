"""The view shows what the folder holds, while it is written and afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from launch import watch
from launch.cli import load
from launch.watch import BARS, Curves, messages, picture, sparkline
from trainer.config.rl import RLConfig
from trainer.config.run import PretrainConfig, RunConfig
from trainer.metrics import seconds_left
from trainer.run_dir import RunDir

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    config = load(
        PretrainConfig, "pretrain", [f"runs_dir={tmp_path}", "run_name=base", "train.steps=40", "optimizer.warmup_steps=2"]
    )
    return opened(config, "pretrain")


def opened(config: RunConfig, kind: str) -> RunDir:
    run = RunDir.open(config, kind)
    run.log_file("driver").parent.mkdir(parents=True)
    return run


def add(run: RunDir, first: int, last: int, **more: float) -> None:
    with open(run.metrics_file, "a") as out:
        for step in range(first, last):
            values = {"train/loss": 7 - step / 10, "time/step_s": 2.0, "perf/tokens_per_s": 9000.0, "moe/load": [[1.0]], **more}
            out.write(json.dumps({"stage": run.kind, "step": step, **values}) + "\n")


def text(run: RunDir, curves: Curves) -> str:
    curves.update()
    console = Console(width=140, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(picture(run.path, curves, time.time()))
    return capture.get()


def test_a_running_run_shows_progress_numbers_and_warnings(run: RunDir) -> None:
    add(run, 1, 11, **{"moe/max_vio": 0.25})
    run.log_file("driver").write_text(
        "   0:00  new run\n   0:01  step    8 rows x 64 tokens\n   0:02  starting Ray\n"
        "   0:20  step 10/40  loss 6\n   0:21  trainer/1 died; restart 1 of 2\n"
    )
    run.log_file("trainer/0").write_text(
        "2026-01-01 10:00:00,1 WARNING tessera: update 7 is refused\n2026 INFO tessera: fine\n"
    )
    shown = text(run, Curves(run.metrics_file))
    for part in ("base", "running, attempt 1", "step 10 of 40, ETA 1:00", "7 is refused", "restart 1 of 2"):
        assert part in shown, shown
    for part in ("loss", "6.9000", "6.0000", "MaxVio", "0.250", "tokens/s", "9,000"):
        assert part in shown, shown
    assert "fine" not in shown and "step 10/40" not in shown
    assert "starting Ray" in shown and "8 rows" not in shown, "what was planned is shown until a step is made"


def test_what_is_planned_is_shown_until_a_step_is_made(run: RunDir) -> None:
    run.log_file("driver").write_text("   0:00  new run\n   0:01  step    8 rows x 64 tokens\n   0:02  starting Ray\n")
    assert [line for line in messages(run.path, 1) if "8 rows" in line]


def test_a_run_without_records_is_shown_too(run: RunDir) -> None:
    assert "step 0 of 40" in text(run, Curves(run.metrics_file))


def test_an_rl_run_shows_reward_and_staleness(tmp_path: Path) -> None:
    run = opened(load(RLConfig, "rl", [f"runs_dir={tmp_path}", "checkpoint=a", "loop.rounds=8"]), "rl")
    add(run, 0, 5, **{"reward/mean": 0.5, "rollout/stale_token_share": 0.25, "rollout/staleness_max": 2.0})
    shown = text(run, Curves(run.metrics_file))
    assert all(part in shown for part in ("round 4 of 8", "reward", "0.500", "stale", "25%", "staleness")), shown


def test_what_is_added_is_read_and_what_is_cut_back_is_forgotten(run: RunDir) -> None:
    curves = Curves(run.metrics_file)
    add(run, 1, 6)
    curves.update()
    with open(run.metrics_file, "a") as out:
        out.write('{"stage": "pretrain", "step": 6, "train/lo')
    curves.update()
    assert curves.step == 5
    with open(run.metrics_file, "a") as out:
        out.write('ss": 1.0}\n')
    curves.update()
    assert (curves.step, curves.values["train/loss"][-1], len(curves.values["train/loss"])) == (6, 1.0, 6)
    run.rewind(3)
    curves.update()
    assert (curves.step, len(curves.values["train/loss"])) == (3, 3)


def test_a_long_silence_is_said(run: RunDir) -> None:
    add(run, 1, 3)
    os.utime(run.metrics_file, (time.time() - 300, time.time() - 300))
    assert "last record 5:00 ago" in text(run, Curves(run.metrics_file))


def test_the_view_ends_when_the_run_does(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "REFRESH_S", 0.05)
    add(run, 1, 3)
    thread = threading.Thread(target=watch.watch, args=(run.path, False))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    run.close("finished")
    thread.join(10)
    assert not thread.is_alive()


def test_the_command_shows_a_finished_run_and_refuses_what_is_none(run: RunDir, tmp_path: Path) -> None:
    add(run, 1, 41)
    run.close("finished")
    command = [sys.executable, "-m", "launch.watch"]
    done = subprocess.run([*command, str(run.path), "--once"], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "step 40 of 40" in done.stdout and "finished" in done.stdout, done.stderr
    wrong = subprocess.run([*command, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert wrong.returncode == 2 and "is not a run folder" in wrong.stderr


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    config = load(PretrainConfig, "pretrain", ["run_name=base"]).model_copy(update={"runs_dir": tmp_path / "[old] [" / "x]"})
    run = opened(config, "pretrain")
    assert "[old] [/x]/base" in text(run, Curves(run.metrics_file))


def test_messages_are_the_last_ones(run: RunDir) -> None:
    run.log_file("trainer/0").write_text("".join(f"2026 WARNING tessera: number {n}\n" for n in range(50)))
    told = messages(run.path, 1)
    assert told[-1].endswith("number 49") and len(told) <= watch.MESSAGES


@given(st.lists(st.floats(-1e9, 1e9), max_size=200), st.integers(1, 60))
@example([0.0, 5e-324], 2)  # one over their difference is more than a float holds
def test_a_curve_has_its_extremes_and_its_width(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values)) and set(line) <= set(BARS)
    if len(values) <= width and values and max(values) > min(values):
        assert line[values.index(min(values))] == BARS[0] and line[values.index(max(values))] == BARS[-1]


def test_the_time_left_goes_by_the_last_steps() -> None:
    assert seconds_left([100.0] + [2.0] * 20, 10, 40) == 60
    assert seconds_left([], 10, 40) is None
    assert seconds_left([2.0], 40, 40) is None
