"""The main job does what it is for: the model learns to read, its experts get balanced, and RL improves it.

Shorter than the demo, with the same commands and configuration. RL with more seeds than the first:

TESSERA_SEEDS=3 python -m pytest tests/end_to_end/test_main_job.py -k improves
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from pathlib import Path
from statistics import fmean

import pytest
import torch
import transformers

from launch.cli import CTRL_C
from launch.convert import convert
from tests.end_to_end.commands import WAIT_S, finish, press_ctrl_c, records, run, series, start, untrained, wait_for_step
from tests.listening import beyond_loopback
from tests.rl.completion_server import CompletionServer
from trainer import checkpoint
from trainer.metrics import LENGTHS, LOAD, Stage, metrics_of
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.hf import load_pretrained
from trainer.ports import free_port
from trainer.tokenizer import Tokenizer
from trainer.worker import read_model

STEPS, ROUNDS = 200, 16
SEEDS = range(int(os.environ.get("TESSERA_SEEDS", "1")))
EXACT = ("reward/mean", "train/loss", "train/grad_norm", "rollout/new_tokens", "rollout/stale_token_share")
PPO = ("policy/kl_reference", "value/loss", "value/explained_variance")
pytestmark = pytest.mark.timeout(900)  # runs side by side take minutes, and longer while other tests run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main_job") / "runs"


@pytest.fixture(scope="module")
def pretrained(runs: Path) -> Path:
    run("pretrain", f"runs_dir={runs}", "run_name=pretrained", f"train.steps={STEPS}", "trace.range=[3,4]")
    return runs / "pretrained"


def logged(run_dir: Path) -> set[str]:
    return {key for record in records(run_dir) for key in record} - {"stage", "step", LOAD, LENGTHS}


def declared(stage: Stage) -> set[str]:
    return {metric.key for metrics in metrics_of(stage).values() for metric in metrics}


def traced_roles(run_dir: Path) -> set[str]:
    """Of the only trace, which all processes of this machine share."""
    (file,) = run_dir.glob("traces/*/node_*.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = [event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == "process_name"]
    return {name.partition(":")[0] for name in named}


def test_a_traced_step_is_in_the_run_folder(pretrained: Path) -> None:
    assert [folder.name for folder in (pretrained / "traces").iterdir()] == ["steps_000003-000004"]
    assert traced_roles(pretrained) == {"rank 0", "rank 1"}


def test_pretraining_learns_and_balances(pretrained: Path) -> None:
    bits = series(pretrained, "eval/bits_per_byte")
    assert bits[STEPS] < 2 / 3 * bits[0]
    violations = series(pretrained, "moe/max_vio")
    assert fmean(violations[s] for s in range(STEPS - 19, STEPS + 1)) < 0.6 * fmean(violations[s] for s in range(1, 21))
    assert (pretrained / "report.html").stat().st_size > 10_000
    assert logged(pretrained) <= declared("pretrain"), "W&B's workspace has a curve for all that is logged"
    assert list(pretrained.glob("wandb/offline-run-*/*.wandb")), "no offline W&B run"
    assert {p.name for p in (pretrained / "logs" / "attempt_1").iterdir()} == {"driver.log", "trainer_0.log", "trainer_1.log"}


@pytest.fixture(scope="module")
def tuned(runs: Path, pretrained: Path) -> None:
    """RL with all seeds side by side, a rank and an engine each: much of a run is waiting for processes to start."""
    common = [f"checkpoint={pretrained}", f"runs_dir={runs}", f"loop.rounds={ROUNDS}", "cluster.ranks=1"]
    started = [start("rl", *common, f"run_name=rl-{seed}", f"seed={seed}", "cluster.threads_per_rank=1") for seed in SEEDS]
    for process in started:
        finish(process, timeout_s=800)


@pytest.mark.parametrize("seed", SEEDS)
def test_rl_improves_the_reward(runs: Path, tuned: None, seed: int) -> None:
    name = f"rl-{seed}"
    held_out = series(runs / name, "reward/eval_mean")
    assert fmean([held_out[ROUNDS - 4], held_out[ROUNDS]]) >= held_out[0] + 0.2
    # The first round takes the groups that finish first, which are short and easy, so the trained reward starts too high.
    rewards = series(runs / name, "reward/mean")
    assert fmean(rewards[r] for r in range(ROUNDS - 3, ROUNDS + 1)) >= rewards[1] + 0.1
    assert sum(series(runs / name, "rollout/resumed_samples").values()) > 0, "no partial rollout was continued"
    assert max(series(runs / name, "rollout/stale_token_share").values()) > 0.1
    assert logged(runs / name) <= declared("rl")
    assert series(runs / name, "policy/mismatch_abs")[1] == 0, "engine and trainer agree bit for bit on fresh tokens"


@pytest.fixture(scope="module")
def exported(runs: Path, pretrained: Path) -> Path:
    convert(pretrained, runs / "exported")
    return runs / "exported"


def test_what_goes_out_loads_in_transformers_and_gives_the_same_logits(pretrained: Path, exported: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(exported)
    tokens = torch.tensor([words.encode("def main(argv: list[str]) -> int:", add_special_tokens=False)])
    documents = torch.zeros(tokens.shape, dtype=torch.int32)
    ours = read_model(checkpoint.resolve(pretrained))
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours.logits(tokens, positions_of(documents), documents >= 0, PackedAttention(documents, documents.device))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_pretraining_begins_with_a_checkpoint_or_an_export(runs: Path, pretrained: Path, exported: Path) -> None:
    """With its weights, model and tokenizer: held-out text costs what it cost in the end, and as much after two small steps."""
    common = [f"runs_dir={runs}", "cluster.ranks=1", "cluster.threads_per_rank=1"]  # two runs beside each other
    common += ["optimizer.warmup_steps=0", "optimizer.lr=1e-4"]
    common += ["train.steps=2", "train.eval_every=2"]
    begun = {name: start("pretrain", *common, f"checkpoint={path}", f"run_name={name}") for name, path in
             (("more", pretrained), ("more-exported", exported))}  # fmt: skip
    before = series(pretrained, "eval/bits_per_byte")[STEPS]
    for name, process in begun.items():
        assert "loading" in finish(process)
        bits = series(runs / name, "eval/bits_per_byte")
        assert bits[0] == pytest.approx(before, rel=1e-4) and bits[2] == pytest.approx(before, rel=0.02), name
        assert read_model(checkpoint.resolve(runs / name)).config == read_model(checkpoint.resolve(pretrained)).config


def test_rl_at_a_completion_server_that_gets_the_weights_after_every_round(runs: Path, exported: Path) -> None:
    with CompletionServer(load_pretrained(exported, torch.float32), Tokenizer.load(exported / "tokenizer.json").eos) as server:
        run(
            *("rl", f"checkpoint={exported}", "experiment=smoke", f"runs_dir={runs}", "run_name=rl-server", "rollout=sync"),
            *(f"rollout.server={server.url}", f"rollout.server_reload={server.root}/update_weights_from_disk"),
        )
        assert [folder.name for folder in server.loaded] == ["version_000000", "version_000001", "version_000002"]
    assert series(runs / "rl-server", "sync/version") == {1: 1, 2: 2}
    assert series(runs / "rl-server", "rollout/staleness_max") == {1: 0, 2: 0}
    assert max(series(runs / "rl-server", "policy/mismatch_abs").values()) < 1e-5, "it samples from the trainer's weights"
    assert not list((runs / "rl-server" / "logs").glob("*/engine_*.log")), "no engine of ours was started"


def test_rl_stopped_killed_and_resumed_goes_on_exactly(runs: Path, tmp_path: Path) -> None:
    """The buffer of unfinished samples, the prompt cursor, the optimizers and the value head are in the checkpoint, and the
    reference policy in the run. Starts from an export, which is gone later, of a tiny model: what is compared are bits, and no
    skill is needed."""
    begun = untrained(tmp_path)
    common = [
        *(f"checkpoint={begun}", "experiment=smoke", "algorithm=ppo_gae", f"runs_dir={runs}"),
        *("loop.rounds=8", "loop.checkpoint_every=2", "loop.eval_every=4"),
        *("task.name=tests.rl.scorers:Letters", "task.options={}"),  # which this model writes more or less of
        *("rollout.groups=4", "rollout.engine_slots=16", "rollout.max_new_tokens=24"),
        'rollout.stop=["1","e"]',  # ends samples at all lengths, whatever this policy has learned, so that some are unfinished
        *("parallel.policy=hecate", "parallel.overlap=2", "parallel.memory=2"),  # plans that do not depend on measured times
        *("loop.dtype=bfloat16", "optimizer.lr=1e-4"),  # so that an update leaves most bits of the weights as they are
    ]
    run("rl", *common, "run_name=rl-whole", "trace.range=[2,2]")
    assert traced_roles(runs / "rl-whole") == {"rank 0", "rank 1", "engine 0"}
    common += ["sync=delta", "sync.anchor_every=3", "sync.check=true"]  # the same weights, of which only the changes travel
    common.append(f"rollout.metrics_port={free_port('127.0.0.1')}")
    process = start("rl", *common, "run_name=rl-killed", at_a_terminal=True)
    wait_for_step(runs / "rl-killed", 1, process)
    assert beyond_loopback(process.pid) == {}, "ranks, engines, scorers, Ray and Prometheus"
    shutil.rmtree(begun)
    press_ctrl_c(process)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == CTRL_C and "stopped by Ctrl-C after round" in output, output
    assert "Ctrl-C: waiting for the end of this round and its checkpoint; Ctrl-C again ends at once" in output
    process = start("rl", *common, "run_name=rl-killed", "resume=auto")
    wait_for_step(runs / "rl-killed", 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert "continuing after round" in run("rl", *common, "run_name=rl-killed", "resume=auto")
    whole, resumed = records(runs / "rl-whole"), records(runs / "rl-killed")
    assert [r["step"] for r in resumed] == [r["step"] for r in whole] == list(range(9))
    assert sum(r["rollout/resumed_samples"] for r in whole[1:]) > 0
    assert len([r for r in resumed if "sync/changed_share" in r]) >= 3
    for expected, found in zip(whole[1:], resumed[1:], strict=True):
        told = [key for key in (*EXACT, *PPO) if key in expected]
        assert {key: found[key] for key in told} == {key: expected[key] for key in told}, f"round {found['step']}"
    assert set(PPO) <= whole[1].keys() and whole[-1]["policy/kl_reference"] > 0
