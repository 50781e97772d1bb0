"""What a run begins with is needed until it has a checkpoint of its own, and no longer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.errors import UserError
from launch import rl
from launch.cli import load
from launch.pretrain import with_checkpoint
from launch.submit import check_run
from parallel.topology import World
from tests import checkpoints
from tests.models import tiny_model
from trainer import checkpoint
from trainer.checkpoint import CheckpointMeta
from trainer.checkpoint_files import folder_name
from trainer.config.rl import RLConfig
from trainer.config.run import PretrainConfig, TokenizerConfig
from trainer.metrics import Stage
from trainer.model.transformer import LanguageModel
from trainer.run_dir import RunDir, continued
from trainer.tokenizer import train_tokenizer
from trainer.worker import named_tensors

ALONE = World(0, 1, torch.device("cpu"), ranks_per_node=1)


def write(parent: Path, kind: Stage, step: int) -> Path:
    """A checkpoint of a tiny model with its tokenizer."""
    tokenizer = train_tokenizer(["def f(x): return x"], TokenizerConfig(vocab_size=260, train_mib=1), parent, print)
    model = LanguageModel.initialize(tiny_model(vocab_size=tokenizer.vocab_size), seed=step)
    meta = CheckpointMeta(kind, step, step, model.config.model_dump(mode="json"), "unknown", {})
    folder = parent / folder_name(step)
    checkpoints.write(folder, named_tensors(model), meta, {"tokenizer.json": tokenizer.layout}, ALONE)
    return folder


def pretraining(options: list[str]) -> tuple[PretrainConfig, Path | None]:
    return with_checkpoint(load(PretrainConfig, "pretrain", options))


def reinforcement(options: list[str]) -> tuple[RLConfig, Path]:
    return rl.settle(load(RLConfig, "rl", options))[:2]


@pytest.mark.parametrize(("kind", "begin"), [("pretrain", pretraining), ("rl", reinforcement)])
def test_a_run_goes_on_without_the_checkpoint_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Stage, begin: Callable[[list[str]], tuple]
) -> None:
    first = write(tmp_path / "first", "pretrain", 3)
    options = [f"checkpoint={first}", f"runs_dir={tmp_path}/runs", "run_name=mine", "cluster.ranks=1"]
    config, start_from = begin(options)
    assert start_from == first
    run = RunDir.open(config, kind)
    run.close("stopped")
    assert begin([*options, "resume=auto"])[1] == first, "it has none of its own"
    own = [write(run.checkpoints, kind, step) for step in (1, 2)]
    shutil.rmtree(first)
    config, start_from = begin([*options, "resume=auto"])
    assert start_from == own[1] and continued(config, kind) == run.path
    check_run(config)
    assert "is not there" not in capsys.readouterr().out
    (own[1] / "tokenizer.json").write_text("{}")
    assert begin([*options, "resume=auto"])[1] == own[0], "the newest that is whole"
    (own[0] / "meta.json").write_text("{}")
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match=rf"checkpoint={first} does not exist"):
            begin([*options, f"resume={resume}"])


def test_a_growing_run_may_be_what_another_has_begun_with(tmp_path: Path) -> None:
    """It has newer checkpoints by then, with paths of their own."""
    write(tmp_path / "first" / "checkpoints", "pretrain", 3)
    options = [f"checkpoint={tmp_path}/first", f"runs_dir={tmp_path}/runs", "run_name=mine"]
    run = RunDir.open(pretraining(options)[0], "pretrain")
    run.close("stopped")
    write(tmp_path / "first" / "checkpoints", "pretrain", 4)
    assert continued(pretraining([*options, "resume=auto"])[0], "pretrain") == run.path


def test_a_run_without_a_checkpoint_is_not_continued_with_one(tmp_path: Path) -> None:
    first = write(tmp_path / "first", "pretrain", 3)
    (tmp_path / "latest").symlink_to(first)
    options = [f"runs_dir={tmp_path}/runs", "run_name=mine"]
    RunDir.open(load(PretrainConfig, "pretrain", options), "pretrain").close("stopped")
    config, _ = pretraining([*options, "resume=auto", f"checkpoint={tmp_path}/latest"])
    with pytest.raises(UserError, match=rf"checkpoint: null in the run, \"{first}\" now"):
        continued(config, "pretrain")


def test_a_record_whose_files_are_too_small_for_its_model_is_damaged(tmp_path: Path) -> None:
    folder = write(tmp_path, "pretrain", 1)
    shutil.rmtree(folder / "state")
    with pytest.raises(checkpoint.Damaged, match=r"makes a model of [\d,]+ parameters, but its files have 0 bytes"):
        checkpoint.model_of(folder, checkpoint.read_meta(folder))
