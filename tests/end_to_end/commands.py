"""Starting the commands as a person would, in processes of their own, and reading what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from tests.models import tiny_model
from trainer.config.run import TokenizerConfig
from trainer.model.hf import save_pretrained
from trainer.model.transformer import LanguageModel
from trainer.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).parents[2]
WAIT_S = 250  # other tests run at the same time


def start(
    module: str, *arguments: str, stdout: IO[str] | int = subprocess.PIPE, at_a_terminal: bool = False
) -> subprocess.Popen[str]:
    """`python -m launch.<module> arguments`, with the threads of this machine and not the one of the test session.

    `at_a_terminal`: `press_ctrl_c` reaches it, also where this session was started in the background.
    """
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", f"launch.{module}", *arguments]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        process_group=0 if at_a_terminal else None,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL) if at_a_terminal else None,
    )


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    """As a terminal does: all processes of the command's group get it."""
    os.killpg(process.pid, signal.SIGINT)


def run(module: str, *arguments: str) -> str:
    """Runs to the end; returns the output of a successful command, fails with it otherwise."""
    return finish(start(module, *arguments))


def finish(process: subprocess.Popen[str], timeout_s: float = 600) -> str:
    """Waits for a command; returns the output of a successful one, fails with it otherwise."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl, also while it is being written."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def series(run_dir: Path, key: str) -> dict[int, float]:
    """step -> value, where it was recorded; no step twice."""
    found = [(record["step"], record[key]) for record in records(run_dir) if key in record]
    assert len(found) == len(dict(found)), "a step was recorded twice"
    return dict(found)


def untrained(folder: Path) -> Path:
    """A tiny model that knows nothing, and its tokenizer, in the Hugging Face layout; RL can begin with it."""
    texts = [Path(__file__).read_text(encoding="utf-8")]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=300, train_mib=1), folder, lambda text: None)
    model = LanguageModel.initialize(tiny_model(vocab_size=tokenizer.vocab_size), seed=0)
    save_pretrained(model.to(torch.device("cpu"), torch.float32), folder / "model", tokenizer)
    return folder / "model"


def wait_for_text(log: Path, text: str, process: subprocess.Popen[str], times: int = 1) -> None:
    """Waits until a running command has said so."""
    deadline = time.monotonic() + WAIT_S
    while log.read_text().count(text) < times:
        assert process.poll() is None and time.monotonic() < deadline, f"not said: {text}\n{log.read_text()}"
        time.sleep(0.1)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not any(record["step"] >= step for record in records(run_dir)):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, f"step {step} was not reached in {WAIT_S} s"
        time.sleep(0.02)


def wait_for_memory(run_dir: Path, process: subprocess.Popen[str], after: int = 0) -> None:
    """Waits until a step behind `after` says that a checkpoint in memory has become whole."""
    deadline = time.monotonic() + WAIT_S
    while max(series(run_dir, "time/memory_checkpoint_whole_s"), default=0) <= after:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, f"no checkpoint in memory became whole in {WAIT_S} s"
        time.sleep(0.02)
