"""The benchmarks of learning: real runs, those of a tiny policy, and what is said of their differences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import yaml

from kernels.errors import UserError
from launch.bench import main
from launch.benchmarks.learning import DEFAULTS, Comparison, Curve, FinalRewards, LearningOptions, Mode, difference, table
from launch.benchmarks.options import read_options
from rl.evaluation import Estimate
from rl.rewards.lists import Countdown
from tests.models import tiny_model
from trainer.config.run import TokenizerConfig
from trainer.model.hf import save_pretrained
from trainer.model.transformer import LanguageModel
from trainer.records import read_records
from trainer.tokenizer import train_tokenizer

SMALL = [
    "warmup.steps=2", "warmup.batch_rows=2", "rollout.groups=2", "rollout.samples_per_group=2", "rollout.max_new_tokens=8",
    "rollout.engine_slots=4", "rollout.advance_tokens=2", "loop.sequence_length=64", "loop.eval_every=1", "reward.workers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the Hugging Face layout."""
    folder, task = tmp_path_factory.mktemp("model"), Countdown(seed=0)
    text = " ".join("".join((prompt.text, answer)) for prompt, answer in map(task.demonstration, range(50)))
    tokenizer = train_tokenizer([text], TokenizerConfig(vocab_size=300, train_mib=1), folder / "cache", print)
    model = LanguageModel.initialize(tiny_model(vocab_size=tokenizer.vocab_size), seed=0)
    save_pretrained(model, folder / "export", tokenizer)
    return folder / "export"


def warmed_up(runs: Path) -> Path:
    """The folder of the run that ends with its warm-up: it has no metrics."""
    (folder,) = (one for one in runs.glob("rl-*") if not (one / "metrics.jsonl").exists())
    assert (folder / "checkpoints" / "step_000000" / "meta.json").is_file()
    return folder


def test_modes_learn_from_the_same_weights_and_the_file_has_their_rounds(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, runs = tmp_path / "learning.json", tmp_path / "runs"
    modes = "sync,april+rollout.over_provision=1.5"
    arguments = [f"checkpoint={checkpoint}", f"modes={modes}", "seeds=3", "rounds=2", "prompts=6", f"common={','.join(SMALL)}"]
    assert main(["learning", *arguments, f"out={out}", f"runs_dir={runs}"]) == 0
    printed = capfd.readouterr().out
    (case,) = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [mode["name"] for mode in case["modes"]] == modes.split(",")
    starts = list[tuple[str, int, float]]()
    for mode in case["modes"]:
        (run,) = mode["runs"]
        records = read_records(Path(run["folder"]) / "metrics.jsonl")
        assert run["tokens"] == [record["rollout/new_tokens"] for record in records[1:]] and len(run["tokens"]) == 2
        assert [done for done, _ in run["evaluations"]] == [0, 1, 2]
        assert 0 <= run["final"]["training"]["mean"] <= 1 and run["final"]["held_out"]["prompts"] <= 6
        config = yaml.safe_load((Path(run["folder"]) / "config.yaml").read_text(encoding="utf-8"))
        starts.append((config["checkpoint"], config["warmup"]["steps"], run["evaluations"][0][1]))
        assert f"{run['final']['held_out']['mean']:.3f}" in printed
    assert starts[0] == starts[1] and starts[0][:2] == (str(warmed_up(runs)), 0), "the same weights, the same noise"
    sync, april = (mode["runs"][0] for mode in case["modes"])
    assert sync["stale"] == [0, 0] and april["oldest"] <= 1
    assert case["decode_steps"] == min(sum(sync["decode_steps"]), sum(april["decode_steps"]))


def test_mistakes_are_said_before_anything_starts(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["learning", f"checkpoint={checkpoint}", f"runs_dir={tmp_path}", f"out={tmp_path / 'x.json'}"]
    assert main([*arguments, "modes=sync,aprils"]) == 2
    assert "did you mean rollout=april?" in capsys.readouterr().err
    assert main([*arguments, "modes=sync+rollout.over_provison=2"]) == 2
    assert "did you mean rollout.over_provision?" in capsys.readouterr().err
    with pytest.raises(UserError, match="must not repeat"):
        read_options(LearningOptions, {**DEFAULTS["cpu"], "out": tmp_path / "x.json"}, ["modes=sync,sync"])
    assert not list(tmp_path.iterdir())


def curve(held_out: float, training: float, decode_steps: float) -> Curve:
    final = FinalRewards(Estimate(held_out, 0.05, 8), Estimate(training, 0.01, 82))
    return Curve(
        seed=0,
        folder="",
        final=final,
        evaluations=((0, 0.2), (1, 0.4), (2, 0.8)),
        trained=(0.5, 0.5),
        tokens=(1.0, 1.0),
        decode_steps=(decode_steps, decode_steps),
        rollout_s=(1.0, 1.0),
        update_s=(1.0, 1.0),
        stale=(0.5, 0.5),
        oldest=1,
        mismatch=0.1,
        length_ratio=1.0,
    )


def test_differences_are_paired_by_seed() -> None:
    found = difference([0.5, 0.8, 0.9], [0.4, 0.6, 0.9])
    assert found.mean == pytest.approx(0.1) and found.error == pytest.approx(0.1 / 3**0.5)
    assert str(found) == "+0.100 ± 0.058" and str(difference([0.5], [0.7])) == "-0.200 ± nan"


def test_rewards_at_equal_steps_lie_between_evaluations() -> None:
    one = curve(0.8, 0.9, decode_steps=10)
    assert [one.reward_after(steps) for steps in (0, 5, 10, 15, 20)] == pytest.approx([0.2, 0.3, 0.4, 0.6, 0.8])


def test_the_table_has_a_row_for_each_mode() -> None:
    sync = Mode("sync", (curve(0.8, 0.9, 10), replace(curve(0.7, 0.9, 10), seed=1)))
    april = Mode("april", (curve(0.7, 0.9, 5), curve(0.7, 0.8, 5)))
    shown = table(Comparison("", (sync, april), 10.0))
    cells = {str(column.header): list(column.cells) for column in shown.columns}
    assert cells["held-out"] == ["0.750", "0.700"] and cells["each seed"] == ["0.800, 0.700", "0.700, 0.700"]
    assert cells["after 10 steps"] == ["0.400", "0.800"], "as many steps, twice the rounds"


def test_a_tiny_policy_learns_and_old_tokens_that_are_left_out_are_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "old_tokens.json"
    modes = "sync,april,april+algorithm.off_policy=mask"
    assert main(["old_tokens", f"modes={modes}", "lr=0.01", "seeds=2", "rounds=12", "prompts=60", f"out={out}"]) == 0
    (case,) = json.loads(out.read_text(encoding="utf-8"))["cases"]
    rewards = {mode["name"]: mean(run["last"] for run in mode["runs"]) for mode in case["modes"]}
    sync, april, mask = (next(mode for mode in case["modes"] if mode["name"] == name)["runs"][0] for name in modes.split(","))
    assert sync["stale"] == 0 and april["stale"] > 0.3 and april["decode_steps"] < sync["decode_steps"]
    assert sync["mismatch"] < 1e-5 and mask["mismatch"] < 1e-5 < april["mismatch"], "packed rows are what was generated"
    assert min(rewards["sync"], rewards["april"]) > rewards[modes.split(",")[2]] + 0.1
    assert f"{rewards['april']:.3f}" in capsys.readouterr().out
