"""A run that is killed and resumed learns exactly what an uninterrupted one learns: same rows, same losses, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small text; runs and caches go beside it."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text").mkdir()
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "brew", "ink"]
    generator = random.Random(0)
    for index in range(40):
        text = " ".join(generator.choice(words) for _ in range(400))
        (folder / "text" / f"{index}.txt").write_text(text)
    return folder


def command(workplace: Path, name: str, *extra: str) -> list[str]:
    return [
        *(sys.executable, "-m", "launch.pretrain", "experiment=smoke", "data=text", f"data.paths=[{workplace}/text]"),
        *(f"data.cache_dir={workplace}/cache", f"runs_dir={workplace}/runs", f"run_name={name}", f"train.steps={STEPS}"),
        *("train.checkpoint_every=2", "train.eval_every=100", "logger.wandb=off", *extra),
    ]


def start(workplace: Path, name: str, *extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(workplace, name, *extra), cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def records(workplace: Path, name: str) -> list[dict]:
    file = workplace / "runs" / name / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def losses(workplace: Path, name: str) -> dict[int, float]:
    found = [(r["step"], r["train/loss"]) for r in records(workplace, name) if "train/loss" in r]
    assert len(found) == len(dict(found)), "a step was recorded twice"
    return dict(found)


def wait_for_step(workplace: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(r["step"] >= step for r in records(workplace, name)):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, f"step {step} was not reached in 120 s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(workplace: Path) -> dict[int, float]:
    process = start(workplace, "whole")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    found = losses(workplace, "whole")
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def test_sigkill_of_the_driver_and_resume_give_the_same_losses(workplace: Path, uninterrupted: dict[int, float]) -> None:
    step = random.Random(os.getpid()).randrange(3, STEPS - 2)
    process = start(workplace, "driver")
    wait_for_step(workplace, "driver", step, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    psutil.wait_procs(children, timeout=60)
    left = [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"processes of the killed run are still there: {left}"
    assert len(losses(workplace, "driver")) < STEPS
    resumed = start(workplace, "driver", "resume=auto")
    output, _ = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, output
    assert "continuing after step" in output
    assert losses(workplace, "driver") == uninterrupted, f"killed after step {step}"


def test_sigkill_of_a_rank_is_named_and_the_run_restarts_by_itself_all_on_loopback(
    workplace: Path, uninterrupted: dict[int, float]
) -> None:
    step = random.Random(os.getpid() + 1).randrange(3, STEPS - 2)
    process = start(workplace, "rank")
    wait_for_step(workplace, "rank", step, process)
    listening = {
        address.laddr.ip
        for child in psutil.Process(process.pid).children(recursive=True)
        for address in child.net_connections(kind="inet")
        if address.status == psutil.CONN_LISTEN
    }
    assert listening and listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, f"servers listen beyond loopback: {listening}"
    ranks = [c for c in psutil.Process(process.pid).children(recursive=True) if "TrainWorker" in " ".join(c.cmdline())]
    assert len(ranks) == 2, [c.cmdline() for c in psutil.Process(process.pid).children(recursive=True)]
    ranks[step % 2].kill()
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "restart 1 of" in output
    assert "trainer/0 died" in output or "trainer/1 died" in output, output
    assert losses(workplace, "rank") == uninterrupted, f"killed after step {step}"
