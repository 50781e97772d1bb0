"""Reinforcement learning with verifiable rewards: the loop, and the attempt that surrounds it. It runs in the driver."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rl.actors import RayPool
from rl.algorithms import PROXIMAL, PolicyObjective
from rl.april import complete, rollout_round
from rl.engine.engine import EngineSettings
from rl.engine.sampler import Sampling
from rl.packing import documents_of, pack_demonstrations, policy_batches
from rl.rewards.task import Prompt, Task
from rl.trajectory import RolloutBuffer, Sample, fresh_group
from trainer.batch import TrainBatch, cross_entropy
from trainer.cluster import Placement, Processes
from trainer.config import ModelConfig, RLConfig
from trainer.guard import Guard
from trainer.loop import checkpoint_meta, load_newest, save, start_ranks
from trainer.metrics import Value
from trainer.optimizer import adamw_settings, learning_rate
from trainer.run_dir import RunDir
from trainer.step import TrainerSpec
from trainer.stopping import StopRequest
from trainer.tokenizer import Tokenizer
from trainer.tracking import Tracker

ADDED_UP = (
    "train/tokens",
    "train/skipped",
    "time/train_s",
    "time/copies_exposed_s",
    "moe/moved_mib",
    "moe/owners_moved",
)  # over updates
EVAL_GROUP = 1 << 40  # groups of held-out prompts count from here, far from those of training


@dataclass(frozen=True)
class Reinforcement:
    """What an attempt needs; the same for all attempts of a run."""

    config: RLConfig
    model: ModelConfig
    tokenizer: Tokenizer
    task: Task
    start_from: Path  # a checkpoint of ours or a folder in the Hugging Face layout
    ranks: int
    dtype: str
    run: RunDir
    tracker: Tracker
    stop: StopRequest

    def attempt(self) -> None:
        """Learns from the newest checkpoint of the run, or from `start_from` with a supervised warm-up, to the end."""
        cluster, rollout = self.config.cluster, self.config.rollout
        with Placement(cluster, self.ranks, rollout.engines, self.tracker.say) as placement:
            pool = RayPool.start(placement, self.model, self.engine_settings, self.dtype, self.run)
            ranks = start_ranks(placement, self.spec, cluster, self.run, self.tracker)
            start, buffer = self._restore(ranks)
            pool.load_weights(ranks, start)
            with self.stop.deferred():
                self.loop(ranks, pool, buffer, start)

    def loop(self, ranks: Processes, pool: RayPool, buffer: RolloutBuffer, start: int) -> None:
        """Rounds start+1..rounds. The weights of round r have version r: the rounds learned since the warm-up."""
        config, algorithm = self.config, self.config.algorithm
        if start == 0:
            self.tracker.log(0, self.evaluate(pool))
        for version in range(start, config.loop.rounds):
            clock = time.perf_counter()
            result = rollout_round(pool, buffer, self.prompt_ids, config.rollout, version, self.score)
            rollout_s = time.perf_counter() - clock
            batches = policy_batches(
                documents_of(result.groups, algorithm, version, config.rollout.max_new_tokens),
                algorithm,
                config.rollout.max_new_tokens,
                sequence_length=config.loop.sequence_length,
                rows_multiple_of=self.ranks,
                pad_id=self.tokenizer.pad,
            )
            lr = learning_rate(version, config.loop.rounds, config.optimizer)
            metrics = {**result.metrics, **learn(ranks, batches, PolicyObjective(algorithm), lr), "time/rollout_s": rollout_s}
            clock = time.perf_counter()
            pool.load_weights(ranks, version + 1)
            metrics |= {"sync/weights_s": time.perf_counter() - clock, "sync/version": version + 1}
            self._close_round(ranks, pool, buffer, version + 1, metrics)

    def _close_round(self, ranks: Processes, pool: RayPool, buffer: RolloutBuffer, done: int, metrics: dict) -> None:
        loop, last = self.config.loop, done == self.config.loop.rounds
        if done % loop.eval_every == 0 or last:
            metrics |= self.evaluate(pool)
        stopping = self.stop.signal is not None and not last
        if done % loop.checkpoint_every == 0 or last or stopping:
            metrics |= self._save(ranks, buffer, done, wait=last or stopping)
        metrics["rollout/tokens_per_s"] = metrics["rollout/new_tokens"] / metrics["time/rollout_s"]
        self.tracker.log(done, metrics)
        if stopping:
            self.stop.obey(f"after round {done}")

    # ------------------------------------------------------------ the task, in tokens

    def prompt_ids(self, index: int) -> list[int]:
        return self._ids(self.task.prompt(index))

    def _ids(self, prompt: Prompt) -> list[int]:
        return [self.tokenizer.bos, *self.tokenizer.encode(prompt.text)]

    def score(self, sample: Sample) -> float | None:
        """The reward of a sample that is done."""
        prompt = self.task.prompt(sample.group) if sample.group < EVAL_GROUP else self.task.held_out(sample.group - EVAL_GROUP)
        ended = sample.status == "finished"
        text_ids = sample.response_ids[:-1] if ended else sample.response_ids  # without <eos>
        return self.task.score(prompt, self.tokenizer.decode(text_ids), ended)

    def evaluate(self, pool: RayPool) -> dict[str, float]:
        """The mean reward of one sample for each held-out prompt, with the same noise every time."""
        clock = time.perf_counter()
        prompts = [self._ids(self.task.held_out(index)) for index in range(self.config.task.eval_prompts)]
        samples = [s for index, ids in enumerate(prompts) for s in fresh_group(EVAL_GROUP + index, ids, 1).samples]
        done = complete(pool, samples, self.config.rollout.advance_tokens)
        rewards = [reward for reward in map(self.score, done) if reward is not None]
        return {"reward/eval_mean": sum(rewards) / len(rewards), "time/eval_s": time.perf_counter() - clock}

    def warm_up(self, ranks: Processes) -> None:
        """Supervised learning of demonstrations, so that the first rounds have rewards to tell apart."""
        warmup, length = self.config.warmup, self.config.loop.sequence_length
        index = 0
        for step in range(warmup.steps):
            pairs, used = [], 0
            while used < warmup.batch_rows * length:
                prompt, answer = self.task.demonstration(index)
                pairs.append((self._ids(prompt), [*self.tokenizer.encode(answer), self.tokenizer.eos]))
                used += sum(map(len, pairs[-1]))
                index += 1
            batch = pack_demonstrations(pairs, sequence_length=length, rows_multiple_of=self.ranks, pad_id=self.tokenizer.pad)
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
            seed=config.seed,
            guard=Guard(config.loop.skip_nonfinite, spike_zscore=None, spike_window=2, on_spike="stop"),
        )

    @property
    def engine_settings(self) -> EngineSettings:
        rollout = self.config.rollout
        return EngineSettings(
            slots=rollout.engine_slots,
            max_length=self.config.loop.sequence_length,
            max_new_tokens=rollout.max_new_tokens,
            cache_tokens=rollout.cache_tokens,
            sampling=Sampling(rollout.temperature, self.config.seed, rollout.top_k, rollout.top_p, rollout.min_p),
            eos_id=self.tokenizer.eos,
        )

    def _save(self, ranks: Processes, buffer: RolloutBuffer, done: int, wait: bool) -> dict[str, float]:
        meta = checkpoint_meta("rl", done, self.model, self.run, {"next_group": buffer.next_group})
        tokenizer, keep = self.start_from / "tokenizer.json", self.config.loop.keep_checkpoints
        return save(ranks, self.run, self.tracker, meta, tokenizer, buffer.to_state(), keep, wait)

    def _restore(self, ranks: Processes) -> tuple[int, RolloutBuffer]:
        """(rounds done, buffer), after the ranks have their weights."""
        loaded = load_newest(ranks, self.run, self.tracker)
        if loaded is not None:
            folder, meta = loaded
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            self.run.rewind(meta.step)
            self.tracker.say(f"continuing after round {meta.step} from {folder}")
            return meta.step, RolloutBuffer.from_state(state)
        self.run.rewind(-1)
        self.tracker.say(f"loading {self.start_from}")
        if (self.start_from / "meta.json").is_file():
            ranks.call("load", self.start_from, False)
        else:
            ranks.call("load_model", self.start_from)
        self.warm_up(ranks)
        return 0, RolloutBuffer()


def learn(ranks: Processes, batches: list[TrainBatch], objective: PolicyObjective, lr: float) -> dict[str, Value]:
    """One optimizer step on each batch; their ratios are to the policy before the first. Returns the metrics of the round."""
    if len(batches) == 1:
        return ranks.call("learn", batches[0], objective, lr)[0]
    clock = time.perf_counter()
    proximal = [torch.cat(ranks.call("logprobs", batch)) for batch in batches]
    waited = {"time/proximal_s": time.perf_counter() - clock}
    batches = [replace(b, extras={**b.extras, PROXIMAL: logprobs}) for b, logprobs in zip(batches, proximal, strict=True)]
    return waited | metrics_of_round([ranks.call("learn", batch, objective, lr)[0] for batch in batches])


def metrics_of_round(updates: list[dict[str, Value]]) -> dict[str, Value]:
    """What counts work is added up, the expert loads are those of the last update, all else is a mean over updates."""
    metrics: dict[str, Value] = {}
    for key in {key: None for update in updates for key in update}:
        values = [update[key] for update in updates if key in update]
        numbers = [value for value in values if not isinstance(value, list)]
        metrics[key] = (sum(numbers) if key in ADDED_UP else sum(numbers) / len(numbers)) if numbers else values[-1]
    return metrics
