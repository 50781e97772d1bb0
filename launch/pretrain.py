"""Pretrains a sparse MoE language model: `python -m launch.pretrain [group=choice ...] [name=value ...]`, see --help."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from kernels.errors import UserError
from launch.cli import main, print_plan
from launch.report import conclude
from trainer.cluster import check_cluster, choose_ranks, rank_choices, run_attempts
from trainer.config.run import PretrainConfig
from trainer.data import prepare
from trainer.estimate import budget_lines
from trainer.loop import Pretraining
from trainer.memory_checkpoints import MemoryCheckpoints
from trainer.run_dir import RunDir
from trainer.starting_point import begun_with, tokenizer_of
from trainer.state import choose_dtype
from trainer.stopping import StopRequest
from trainer.tracking import Tracker
from trainer.worker import check_division


def pretrain(config: PretrainConfig) -> Path | None:
    """Runs a whole pretraining and returns its run folder; None after a dry run."""
    config, start_from, choices = settle(config)
    ranks = choices[0]
    if config.dry_run:
        print_plan(config, config.model, ranks)
        return None
    check_cluster(config.cluster, ranks)
    tokenizer = config.tokenizer
    if start_from is not None:
        tokenizer = tokenizer.model_copy(update={"file": start_from / "tokenizer.json"})
    corpus = prepare(config.data, tokenizer, say=print)  # a mistake in the data leaves no run folder behind
    run = RunDir.open(config, "pretrain")
    price = config.cluster.dollars_per_gpu_hour
    with StopRequest() as stop, Tracker(run, "pretrain", config.logger, config.train.steps, ranks, price) as tracker:
        model = config.model
        if start_from is None:
            model = model.model_copy(update={"vocab_size": corpus.tokenizer.vocab_size})
        dtype, reason = choose_dtype(config.train.dtype)
        for line in budget_lines(config, model, ranks, dtype, reason, torch.cuda.is_available()):
            tracker.say(line)
        memory = MemoryCheckpoints(config.train.memory_checkpoint_every, tracker.say)
        training = Pretraining(config, model, start_from, corpus, choices, dtype, run, tracker, stop, memory)
        at_stop = training.checkpoints.bring_to_disk
        run_attempts(config.cluster, ranks, training.attempt, lambda: tracker.began, stop, at_stop, tracker.say)
    conclude(run.path)
    return run.path


def settle(config: PretrainConfig) -> tuple[PretrainConfig, Path | None, tuple[int, ...]]:
    """`with_checkpoint`, and how many ranks there may be, the number that is wanted first. UserError where they do not fit."""
    config, start_from = with_checkpoint(config)
    check = partial(check_division, config.model, config.train.batch_rows)
    return config, start_from, rank_choices(config.cluster, choose_ranks(config.cluster), check)


def with_checkpoint(config: PretrainConfig) -> tuple[PretrainConfig, Path | None]:
    """With the model of its checkpoint, and the folder of the weights and the tokenizer; as it is, and None, without one."""
    if config.checkpoint is None:
        return config, None
    path, folder, model = begun_with(config.checkpoint, config, "pretrain")
    config = config.model_copy(update={"checkpoint": path, "model": model})
    try:
        config.check_model()
    except ValueError as error:
        raise UserError(f"checkpoint={path}: {error}") from None
    tokenizer_of(folder, model)
    return config, folder


if __name__ == "__main__":
    sys.exit(main(pretrain, PretrainConfig, "pretrain"))
