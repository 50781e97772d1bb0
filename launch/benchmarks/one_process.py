"""A run of reinforcement learning in this process, without Ray: one rank and one engine, which take turns."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.topology import World, join
from rl.engine.engine import Engine
from rl.engine.pool import LocalPool
from rl.engine.receipt import sync_metrics
from rl.evaluation import EVAL_GROUP, FINAL_GROUP, Estimate, estimate
from rl.loop import Reinforcement
from rl.rewards.tasks import make_task
from rl.rewards.workers import RewardWorkers
from rl.token_task import TokenTask
from rl.trajectory import Sample
from trainer.cluster import Processes
from trainer.config.rl import RLConfig, SyncConfig
from trainer.memory_checkpoints import MemoryCheckpoints
from trainer.run_dir import RunDir
from trainer.starting_point import begun_with
from trainer.state import choose_dtype
from trainer.stopping import StopRequest
from trainer.tokenizer import Tokenizer
from trainer.tracking import Tracker
from trainer.worker import TrainWorker

TIMEOUT_S = 120.0


@cache
def only_world() -> World:
    """Of this process, for all its runs: DeepSpeed keeps to the first process group."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return join(dist.HashStore(), 0, 1, device, TIMEOUT_S)


class OnlyRank(Processes):
    """The rank of this process, asked as those of Ray are."""

    def __init__(self, worker: TrainWorker) -> None:
        super().__init__({"trainer/0": worker})
        self._worker = worker

    def call(self, method: str, *args: Any) -> list[Any]:
        return [self.call_first(method, *args)]

    def call_first(self, method: str, *args: Any) -> Any:
        return getattr(self._worker, method)(*args)


class OnlyEngine(LocalPool):
    """A `SyncedPool` of one engine, which is in the process of the rank, and so in its traces."""

    engines = ()  # in processes of their own
    places = 0

    def __init__(self, engine: Engine) -> None:
        super().__init__([engine])
        self._engine = engine
        self.busy_s = 0.0

    def advance(self, tokens: int) -> list[Sample]:
        started = time.perf_counter()
        done = super().advance(tokens)
        self.busy_s += time.perf_counter() - started
        return done

    def load_weights(self, ranks: Processes, version: int, config: SyncConfig) -> dict[str, float]:
        receipt = self._engine.receive(ranks.call_first("weights", version, config))
        return sync_metrics([receipt]) | {"sync/version": version}

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        return []

    def counts(self) -> dict[str, float]:
        return {}


def reinforce_here(config: RLConfig, rounds: bool, prompts: int) -> tuple[Path, tuple[Estimate, Estimate] | None]:
    """The run folder, and what the policy earns in the end on held-out and on training prompts, one answer for each draw.

    Without `rounds` the run ends when it is warmed up.
    """
    path, start_from, model = begun_with(config.checkpoint, config, "rl")
    config = config.model_copy(update={"checkpoint": path})
    task, tokenizer = make_task(config.task, config.seed), Tokenizer.load(start_from / "tokenizer.json", config.chat.eos)
    dtype, _ = choose_dtype(config.loop.dtype)
    run, worker = RunDir.open(config, "rl"), TrainWorker(0)
    worker.world = only_world()
    with (
        StopRequest() as stop,
        Tracker(run, "rl", config.logger, config.loop.rounds, 1) as tracker,
        RewardWorkers(config.task, config.seed, config.reward, run.log_file, tracker.say) as rewards,
    ):
        memory = MemoryCheckpoints(0, tracker.say)
        in_tokens = TokenTask(task, tokenizer, rewards, config)
        work = Reinforcement(config, model, in_tokens, start_from, (1,), dtype, run, tracker, stop, memory)
        worker.build(work.spec, run.path / "refused")
        ranks, final = OnlyRank(worker), None
        if rounds:
            pool = OnlyEngine(Engine(model, work.engine_settings, worker.world.device, getattr(torch, dtype)))
            work.learn_with(ranks, pool)
            held_out, training = (
                estimate(in_tokens.judged(pool, range(first, first + prompts)))
                for first in (EVAL_GROUP + FINAL_GROUP, FINAL_GROUP)
            )
            final = held_out, training
        else:
            work.prepare(ranks)
    return run.path, final
