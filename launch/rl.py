"""Fine-tunes a checkpoint by RL on a verifiable task: `python -m launch.rl checkpoint=RUN [name=value ...]`, see --help."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from launch.cli import main, print_plan
from launch.report import conclude
from rl.engine.settings import check_generates
from rl.loop import Reinforcement
from rl.rewards.tasks import check_task, make_task
from rl.rewards.workers import RewardWorkers
from rl.token_task import TokenTask, check_prompts
from trainer.cluster import check_cluster, choose_ranks, rank_choices, require_port, run_attempts
from trainer.config.model import ModelConfig
from trainer.config.rl import RLConfig
from trainer.estimate import budget_lines
from trainer.memory_checkpoints import MemoryCheckpoints
from trainer.run_dir import RunDir
from trainer.starting_point import begun_with, tokenizer_of
from trainer.state import choose_dtype
from trainer.stopping import StopRequest
from trainer.tokenizer import Tokenizer
from trainer.tracking import Tracker
from trainer.worker import check_division


def reinforce(config: RLConfig) -> Path | None:
    """Runs a whole RL fine-tuning and returns its run folder; None after a dry run."""
    config, start_from, model, tokenizer, choices = settle(config)
    ranks, apart = choices[0], config.rollout.engines_apart
    if config.dry_run:
        print_plan(config, model, ranks)
        return None
    check_cluster(config.cluster, ranks, apart)
    if config.rollout.metrics_port and config.cluster.address is None:  # engines elsewhere say it in their logs
        for port in range(config.rollout.metrics_port, config.rollout.metrics_port + config.rollout.engines):
            require_port(config.cluster.host, port, "rollout.metrics_port", "rollout.metrics_port=0")
    task = make_task(config.task, config.seed)
    check_task(task, config.warmup.steps)
    check_prompts(task, tokenizer, config)
    for name in config.rollout.stop_tokens:
        tokenizer.id_of(name)  # says so before anything is started, if there is none
    run = RunDir.open(config, "rl")
    price = config.cluster.dollars_per_gpu_hour
    with StopRequest() as stop, Tracker(run, "rl", config.logger, config.loop.rounds, ranks + apart, price) as tracker:
        dtype, reason = choose_dtype(config.loop.dtype)
        for line in budget_lines(config, model, ranks, dtype, reason, torch.cuda.is_available()):
            tracker.say(line)
        with RewardWorkers(config.task, config.seed, config.reward, run.log_file, tracker.say) as rewards:
            memory = MemoryCheckpoints(config.loop.memory_checkpoint_every, tracker.say)
            in_tokens = TokenTask(task, tokenizer, rewards, config)
            work = Reinforcement(config, model, in_tokens, start_from, choices, dtype, run, tracker, stop, memory)
            at_stop = work.checkpoints.bring_to_disk
            run_attempts(config.cluster, ranks + apart, work.attempt, lambda: tracker.began, stop, at_stop, tracker.say)
    conclude(run.path)
    return run.path


def settle(config: RLConfig) -> tuple[RLConfig, Path, ModelConfig, Tokenizer, tuple[int, ...]]:
    """With the folder that its checkpoint is now; that of the weights, their model and tokenizer, and how many ranks there may
    be, the number that is wanted first. UserError where they do not fit."""
    path, start_from, model = begun_with(config.checkpoint, config, "rl")
    config = config.model_copy(update={"checkpoint": path})
    check_generates(model)
    tokenizer = tokenizer_of(start_from, model, config.chat.eos)
    ranks = choose_ranks(config.cluster, config.rollout.engines_apart)
    choices = rank_choices(config.cluster, ranks, lambda count: check_division(model, count, count))
    return config, start_from, model, tokenizer, choices


if __name__ == "__main__":
    sys.exit(main(reinforce, RLConfig, "rl"))
