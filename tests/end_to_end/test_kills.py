"""Processes of every role of RL are killed at random moments, and the run learns what an undisturbed one learns, bit for bit.

So it has seen the same data: no prompt is lost, none is learned twice.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.end_to_end.commands import finish, records, start
from tests.end_to_end.kills import APART, SEED, kill_at_random, shuffled
from tests.models import tiny_model
from trainer.config.run import TokenizerConfig
from trainer.model.hf import save_pretrained
from trainer.model.transformer import LanguageModel
from trainer.tokenizer import train_tokenizer

ROLES = shuffled(["driver", "trainer/0", "engine/0", "reward/0"])
ROUNDS = APART * (len(ROLES) + 1)
EXACT = ("reward/mean", "reward/eval_mean", "train/loss", "train/grad_norm", "rollout/new_tokens", "rollout/length_mean")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model that knows nothing."""
    texts = [Path(__file__).read_text(encoding="utf-8")]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=300, train_mib=1), tmp_path, lambda text: None)
    tokenizer.save(tmp_path / "tokenizer.json")
    model = LanguageModel.initialize(tiny_model(vocab_size=tokenizer.vocab_size), seed=0)
    save_pretrained(model.to(torch.device("cpu"), torch.float32), tmp_path / "model", tmp_path / "tokenizer.json")
    return tmp_path / "model"


@pytest.mark.timeout(600 + 90 * len(ROLES))
def test_rl_whose_driver_rank_engine_and_scorer_are_killed_learns_the_same(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # this small model is for CPUs
    command = [
        *("rl", f"checkpoint={checkpoint}", "experiment=smoke", "rollout=sync", "warmup=none", f"runs_dir={tmp_path}/runs"),
        *(
            "task.name=tests.rl.scorers:Letters",
            "task.options={}",
            f"loop.rounds={ROUNDS}",
            "loop.checkpoint_every=2",
            "loop.memory_checkpoint_every=1",
        ),
        *("rollout.max_new_tokens=24", "rollout.groups=3", "loop.eval_every=3", "loop.sequence_length=64", "logger.wandb=off"),
        *("parallel.policy=hecate", "parallel.overlap=2", "parallel.memory=2"),  # plans that do not depend on measured times
        # Threads add up a norm in another order, and a rank with engines in places of their own gets fewer of them.
        *("cluster.ranks=1", "cluster.threads_per_rank=1", f"cluster.max_restarts={len(ROLES)}", "resume=auto"),
    ]
    finish(start(*command, "rollout.engines=2", "run_name=whole"), timeout_s=300 + 30 * len(ROLES))
    killed_run = [*command, "run_name=killed"]
    more = [*killed_run, "rollout.engines=3", "rollout.placement=separate"]  # resumed with more engines, and elsewhere
    said = kill_at_random([*killed_run, "rollout.engines=2"], tmp_path / "runs" / "killed", ROLES, again=more)
    whole, killed = records(tmp_path / "runs" / "whole"), records(tmp_path / "runs" / "killed")
    context = f"TESSERA_KILLS_SEED={SEED}: {', '.join(ROLES)}\n{said}"
    assert [record["step"] for record in killed] == [record["step"] for record in whole] == list(range(ROUNDS + 1)), context
    for expected, found in zip(whole, killed, strict=True):
        told = [key for key in EXACT if key in expected]
        assert {key: found[key] for key in told} == {key: expected[key] for key in told}, f"round {found['step']}, {context}"
    assert all(record["train/grad_norm"] > 0 for record in whole[1:]), "there was something to learn"
    assert said.count("trainer/0 died") == ROLES.count("trainer/0"), context
    assert ("1 trainer rank and 3 engines in places of their own" in said) == ("driver" in ROLES), context
    assert ("engine/0 died" in said) == ("engine/0" in ROLES), context
