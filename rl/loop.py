"""Reinforcement learning with verifiable rewards: the loop, and the attempt around it. It runs in the driver."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rl.actors import RayPool
from rl.april import rollout_round
from rl.engine.pool import SyncedPool
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.evaluation import EVAL_GROUP
from rl.packing import Rows, documents_of, pack_demonstrations, policy_batches
from rl.staged import stage
from rl.token_task import TokenTask
from rl.trajectory import Group, RolloutBuffer, lengths_of
from rl.update import learn
from trainer.batch import cross_entropy
from trainer.cluster import Processes
from trainer.config.model import ModelConfig
from trainer.config.rl import RLConfig
from trainer.estimate import vocab_size
from trainer.guard import Guard
from trainer.loop import start_ranks
from trainer.memory_checkpoints import MemoryCheckpoints
from trainer.metrics import LENGTHS, Value
from trainer.optimizer import adamw_settings, learning_rate
from trainer.places import Placement
from trainer.run_checkpoints import Progress, RunCheckpoints
from trainer.run_dir import RunDir
from trainer.starting_point import load_weights
from trainer.state import TrainerSpec
from trainer.stopping import Move, StopRequest
from trainer.tracing import Traces
from trainer.tracking import Tracker

SERVER_PROMPTS = 8  # sent to a completion server, to see of which distribution its log-probabilities are


@dataclass(frozen=True)
class Reinforcement:
    """What an attempt needs; the same for all attempts of a run."""

    config: RLConfig
    model: ModelConfig
    task: TokenTask
    start_from: Path  # a checkpoint of ours or a folder in the Hugging Face layout
    ranks: tuple[int, ...]  # possible numbers of ranks, the wanted one first; within an attempt only the actual one
    dtype: str
    run: RunDir
    tracker: Tracker
    stop: StopRequest
    memory: MemoryCheckpoints

    def attempt(self) -> None:
        """Learns from the newest checkpoint of the run, or from `start_from` with a supervised warm-up, to the end."""
        cluster, rollout = self.config.cluster, self.config.rollout
        engines = rollout.engines if rollout.server is None else 0
        separate = rollout.placement == "separate"
        with Placement(cluster, self.ranks, self.tracker.say, engines, separate, rollout.min_engines) as placement:
            placement.fill(lambda: replace(self, ranks=(placement.ranks,)).learn_in(placement))

    def learn_in(self, placement: Placement) -> None:
        with self._pool(placement) as pool:
            ranks = start_ranks(placement, self.spec, self.config.cluster, self.run, self.tracker, self.memory)
            self.learn_with(ranks, pool, placement.look)

    def learn_with(self, ranks: Processes, pool: SyncedPool, look: Callable[[], Move | None] | None = None) -> None:
        """Runs from the last checkpoint to the end, with ranks that have built their trainers; `look` watches their places."""
        start, buffer = self._restore(ranks)
        if self.config.algorithm.kl_coefficient > 0:
            ranks.call("keep_reference", self.run.reference)
        pool.load_weights(ranks, start, self.config.sync)
        with self.stop.deferred("the end of this round and its checkpoint", look):
            self.loop(ranks, pool, buffer, start)

    def prepare(self, ranks: Processes) -> None:
        """Writes the warmed-up weights as the checkpoint of round 0; other runs can start from it without a warm-up."""
        _, buffer = self._restore(ranks)
        self.checkpoints.save(ranks, self._progress(buffer, 0))
        self.checkpoints.settle(ranks)

    @contextmanager
    def _pool(self, placement: Placement) -> Iterator[SyncedPool]:
        rollout = self.config.rollout
        if rollout.server is None:
            model, settings = self.model, self.engine_settings
            config, say = self.config, self.tracker.say
            yield RayPool.start(
                placement, model, settings, self.dtype, self.run, config.cluster, config.sync, say, rollout.metrics_port
            )
            return
        from rl.engine.server import ServerPool  # here, because its HTTP client takes a quarter of a second

        self.tracker.say(f"generating at {rollout.server}")
        if rollout.server_reload is None:
            self.tracker.say(
                "without rollout.server_reload it keeps the weights that it has, and their tokens grow older every round"
            )
        folder = self.run.path / "server_weights"
        with ServerPool(rollout, self.engine_settings, vocab_size(self.model), folder, self.task.tokenizer) as pool:
            held_out = range(EVAL_GROUP, EVAL_GROUP + min(SERVER_PROMPTS, self.config.task.eval_prompts))
            prompts = [self.task.prompt_ids(group) for group in held_out]
            # First halves of prompts, after which the next token is less certain.
            pool.require_exact_distribution([ids[: len(ids) // 2 + 1] for ids in prompts])
            yield pool

    def loop(self, ranks: Processes, pool: SyncedPool, buffer: RolloutBuffer, start: int) -> None:
        """Rounds start+1..rounds. The weights of round r have version r: the rounds learned since the warm-up."""
        config, task = self.config, self.task
        traces = Traces(config.trace, self.run, len(ranks), self.tracker.say, lambda: pool.engines)

        def everybody(method: str, *arguments: Any) -> list[Any]:
            return [*ranks.call(method, *arguments), *pool.ask(method, *arguments)]

        if start == 0:
            self.tracker.log(0, {**self.task.evaluate(pool), **self.task.rewards.counts()})
        for version in range(start, config.loop.rounds):
            traces.before(everybody, version + 1)
            began, busy_before = time.perf_counter(), pool.busy_s
            metrics: dict[str, Value] = {}
            update = partial(self._update, ranks, version, began, metrics)
            overlapped = update if config.rollout.overlap else None
            asked = task.turns(pool), buffer, task.prompt_ids, config.rollout, version, task.score, overlapped
            result = rollout_round(*asked, newest_only=config.algorithm.newest_only)
            if config.algorithm.off_policy == "staged":
                result = stage(ranks, result, buffer, version, **self.rows)
            if overlapped is None:
                update(result.groups)
            waiting = lengths_of((*buffer.recycled, *buffer.surplus))
            metrics |= {**result.metrics, LENGTHS: buffer.lengths.histogram(waiting, config.rollout.max_new_tokens)}
            clock = time.perf_counter()
            metrics |= pool.load_weights(ranks, version + 1, config.sync)
            metrics["sync/weights_s"] = time.perf_counter() - clock
            busy = pool.busy_s - busy_before
            metrics["time/engines_idle_s"] = time.perf_counter() - began - busy
            metrics["rollout/tokens_per_s"] = result.metrics["rollout/new_tokens"] / busy if busy else 0.0
            traces.after(everybody, version + 1, last=version + 1 == config.loop.rounds)
            self._close_round(ranks, pool, buffer, version + 1, metrics)

    def _update(
        self, ranks: Processes, version: int, started: float, metrics: dict[str, Value], groups: Sequence[Group]
    ) -> None:
        """Learns the groups of a round that began at `started`; adds to `metrics`."""
        config, algorithm = self.config, self.config.algorithm
        metrics["time/rollout_s"] = time.perf_counter() - started
        documents = documents_of(groups, algorithm, version, config.rollout.max_new_tokens)
        batches = policy_batches(documents, algorithm, config.rollout.max_new_tokens, **self.rows)
        lr = learning_rate(version, config.loop.rounds, config.optimizer)
        metrics |= learn(ranks, batches, algorithm, lr, version)

    def _close_round(self, ranks: Processes, pool: SyncedPool, buffer: RolloutBuffer, done: int, metrics: dict) -> None:
        loop, last = self.config.loop, done == self.config.loop.rounds
        if done % loop.eval_every == 0 or last:
            metrics |= self.task.evaluate(pool)
        stopping = not last and self.stop.asked()
        metrics |= self.checkpoints.after(ranks, self._progress(buffer, done), last, stopping)
        metrics |= self.task.rewards.counts() | pool.counts()
        self.tracker.devices = len(ranks) + (pool.places if self.config.rollout.placement == "separate" else 0)
        self.tracker.log(done, metrics)
        if last or stopping:
            self.checkpoints.settle(ranks)
        if stopping:
            self.stop.obey(f"after round {done}")

    def warm_up(self, ranks: Processes) -> None:
        """Supervised learning of demonstrations, so that the rewards of the first rounds differ."""
        warmup, rows = self.config.warmup, self.rows
        index = 0
        for step in range(warmup.steps):
            examples, used = [], 0
            while used < warmup.batch_rows * rows["sequence_length"]:
                prompt_ids, ids, learned = self.task.demonstration(index)
                examples.append((prompt_ids, ids, learned))
                used += len(prompt_ids) + len(ids)
                index += 1
            batch = pack_demonstrations(examples, **rows)
            loss = ranks.call("learn", batch, cross_entropy, warmup.lr)[0].get("train/loss", math.nan)
            if (step + 1) % 10 == 0 or step + 1 == warmup.steps:
                self.tracker.say(f"supervised warm-up {step + 1}/{warmup.steps}: loss {loss:.3f}")
        ranks.call("new_optimizer")

    # ------------------------------------------------------------ processes and checkpoints

    @property
    def spec(self) -> TrainerSpec:
        config = self.config
        return TrainerSpec(
            model=self.model,
            adamw=adamw_settings(config.optimizer),
            balance=config.balance,
            parallel=config.parallel,
            dtype=self.dtype,
            recompute=config.loop.recompute,
            micro_rows=config.loop.micro_rows,
            batch_invariant=True,
            temperature=config.rollout.temperature,
            freeze_router=config.loop.freeze_router,
            value_decay=config.algorithm.value_decay if config.algorithm.advantage == "gae" else None,
            seed=config.seed,
            guard=Guard(config.loop.skip_nonfinite, spike_zscore=None, spike_window=2, on_spike="stop"),
        )

    @property
    def rows(self) -> Rows:
        length, pad_id = self.config.loop.sequence_length, self.task.tokenizer.pad
        return Rows(sequence_length=length, rows_multiple_of=self.ranks[0], pad_id=pad_id)

    @property
    def engine_settings(self) -> EngineSettings:
        rollout = self.config.rollout
        return EngineSettings(
            slots=rollout.engine_slots,
            max_length=self.config.loop.sequence_length,
            max_new_tokens=rollout.max_new_tokens,
            cache_tokens=rollout.cache_tokens,
            sampling=Sampling(rollout.temperature, self.config.seed, rollout.top_k, rollout.top_p, rollout.min_p),
            eos_id=self.task.tokenizer.eos,
            stop_ids=self.task.stop_ids,
            stops=self.task.stops,
            record_routing=rollout.replay_routing,
        )

    def _progress(self, buffer: RolloutBuffer, done: int) -> Progress:
        return Progress(done, {"next_group": buffer.next_group}, buffer.to_state)

    @property
    def checkpoints(self) -> RunCheckpoints:
        every, keep = self.config.loop.checkpoint_every, self.config.loop.keep_checkpoints
        tokenizer = self.task.tokenizer
        return RunCheckpoints("rl", self.model, tokenizer, every, keep, self.run, self.tracker, self.stop, self.memory)

    def _restore(self, ranks: Processes) -> tuple[int, RolloutBuffer]:
        """(rounds done, buffer), after the ranks have their weights."""
        loaded = self.checkpoints.load_newest(ranks)
        if loaded is not None:
            found, meta = loaded
            self.tracker.begin(meta.step)
            self.tracker.say(f"continuing after round {meta.step} from {found}")
            return meta.step, RolloutBuffer.parse(found.text("state.json"), str(found))
        self.tracker.begin(-1)
        self.tracker.say(f"loading {self.start_from}")
        load_weights(ranks, self.start_from)
        self.warm_up(ranks)
        if self.config.algorithm.kl_coefficient > 0:
            self._write_reference(ranks)
        return 0, RolloutBuffer()

    def _write_reference(self, ranks: Processes) -> None:
        """Writes the weights at the start of RL once; every attempt reads its reference policy from there."""
        files = {"tokenizer.json": self.task.tokenizer.layout}
        ranks.call("write_reference", self.run.reference, self.checkpoints.meta(0, {}), files)
