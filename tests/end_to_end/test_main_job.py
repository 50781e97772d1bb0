"""The main job does what it is for: the model learns to read, its experts get balanced, and RL improves it, for three seeds.

Shorter than the demo, with the same commands and configuration.
"""

from __future__ import annotations

import signal
from pathlib import Path
from statistics import fmean

import pytest

from tests.end_to_end.commands import records, run, series, start, wait_for_step

ROUNDS = 14
EXACT = ("reward/mean", "train/loss", "train/grad_norm", "rollout/new_tokens", "rollout/stale_token_share")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main_job") / "runs"


@pytest.fixture(scope="module")
def pretrained(runs: Path) -> Path:
    run("pretrain", f"runs_dir={runs}", "run_name=pretrained", "train.steps=120", "train.checkpoint_every=60")
    return runs / "pretrained"


def rl_arguments(runs: Path, pretrained: Path, name: str, seed: int) -> list[str]:
    return [
        *(f"checkpoint={pretrained}", f"runs_dir={runs}", f"run_name={name}", f"seed={seed}", f"loop.rounds={ROUNDS}"),
        *("loop.checkpoint_every=4", "loop.eval_every=7", "logger.wandb=off"),
    ]


def test_pretraining_learns_and_balances(pretrained: Path) -> None:
    bits = series(pretrained, "eval/bits_per_byte")
    assert bits[120] < 2 / 3 * bits[0]
    violations = series(pretrained, "moe/max_vio")
    assert fmean(violations[s] for s in range(101, 121)) < 0.6 * fmean(violations[s] for s in range(1, 21))
    assert (pretrained / "report.html").stat().st_size > 10_000
    assert list(pretrained.glob("wandb/offline-run-*/*.wandb")), "no offline W&B run"
    assert {p.name for p in (pretrained / "logs" / "attempt_1").iterdir()} == {"driver.log", "trainer_0.log", "trainer_1.log"}


@pytest.fixture(scope="module")
def first_seed(runs: Path, pretrained: Path) -> Path:
    run("rl", *rl_arguments(runs, pretrained, "rl-0", 0))
    return runs / "rl-0"


def check_improvement(tuned: Path) -> None:
    held_out = series(tuned, "reward/eval_mean")
    assert held_out[ROUNDS] >= held_out[0] + 0.2
    rewards = series(tuned, "reward/mean")
    assert fmean(rewards[r] for r in range(ROUNDS - 2, ROUNDS + 1)) >= rewards[1] + 0.2
    assert sum(series(tuned, "rollout/resumed_samples").values()) > 0, "no partial rollout was continued"
    assert max(series(tuned, "rollout/stale_token_share").values()) > 0.1
    assert series(tuned, "policy/mismatch_abs")[1] < 1e-4, "engine and trainer disagree on fresh tokens"


def test_rl_improves_the_reward_seed_0(first_seed: Path) -> None:
    check_improvement(first_seed)


@pytest.mark.parametrize("seed", [1, 2])
def test_rl_improves_the_reward(runs: Path, pretrained: Path, seed: int) -> None:
    run("rl", *rl_arguments(runs, pretrained, f"rl-{seed}", seed))
    check_improvement(runs / f"rl-{seed}")


def test_rl_killed_and_resumed_goes_on_exactly(runs: Path, pretrained: Path, first_seed: Path) -> None:
    """The buffer of unfinished samples, the prompt cursor and the optimizer are in the checkpoint."""
    arguments = rl_arguments(runs, pretrained, "rl-killed", 0)
    process = start("rl", *arguments)
    wait_for_step(runs / "rl-killed", 6, process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert "continuing after round 4" in run("rl", *arguments, "resume=auto")
    whole, resumed = records(first_seed), records(runs / "rl-killed")
    assert [r["step"] for r in resumed] == [r["step"] for r in whole] == list(range(ROUNDS + 1))
    for expected, found in zip(whole[1:], resumed[1:], strict=True):
        assert {key: found[key] for key in EXACT} == {key: expected[key] for key in EXACT}, f"round {found['step']}"
