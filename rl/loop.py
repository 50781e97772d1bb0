"""Reinforcement learning with verifiable rewards: the loop, and the attempt that surrounds it. It runs in the driver."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from kernels.errors import UserError
from rl.actors import RayPool, SyncedPool
from rl.algorithms import PROXIMAL, PolicyObjective
from rl.april import OverlappingPool, complete, rollout_round
from rl.engine.engine import EngineSettings
from rl.engine.sampler import Sampling
from rl.engine.server import ServerPool
from rl.packing import documents_of, pack_demonstrations, policy_batches
from rl.rewards.task import Conversation, Prompt, Task
from rl.rewards.workers import Reply, Response, RewardWorkers
from rl.trajectory import Group, RolloutBuffer, Sample, fresh_group
from rl.turns import TurnPool, with_answer
from trainer import checkpoint
from trainer.batch import TrainBatch, cross_entropy
from trainer.cluster import Placement, Processes
from trainer.config import ModelConfig, RLConfig
from trainer.estimate import vocab_size
from trainer.loop import checkpoint_meta, save, start_ranks
from trainer.metrics import Value
from trainer.optimizer import adamw_settings, learning_rate
from trainer.run_dir import RunDir
from trainer.step import TrainerSpec
from trainer.tokenizer import Tokenizer
from trainer.tracking import Tracker

ADDED_UP = ("train/tokens", "time/train_s", "time/copies_exposed_s", "moe/moved_mib", "moe/owners_moved")  # over updates
EVAL_GROUP = 1 << 40  # groups of held-out prompts count from here, far from those of training


@dataclass(frozen=True)
class Reinforcement:
    """What an attempt needs; the same for all attempts of a run."""

    config: RLConfig
    model: ModelConfig
    tokenizer: Tokenizer
    task: Task
    rewards: RewardWorkers
    start_from: Path  # a checkpoint of ours or a folder in the Hugging Face layout
    ranks: int
    dtype: str
    run: RunDir
    tracker: Tracker

    def attempt(self) -> None:
        """Learns from the newest checkpoint of the run, or from `start_from` with a supervised warm-up, to the end."""
        cluster, rollout = self.config.cluster, self.config.rollout
        engines = rollout.engines if rollout.server is None else 0
        with Placement(cluster, self.ranks, engines, self.tracker.say) as placement, self._pool(placement) as pool:
            ranks = start_ranks(placement, self.spec, cluster, self.run, self.tracker)
            start, buffer = self._restore(ranks)
            pool.load_weights(ranks, start, self.config.sync)
            self.loop(ranks, pool, buffer, start)

    @contextmanager
    def _pool(self, placement: Placement) -> Iterator[SyncedPool]:
        rollout = self.config.rollout
        if rollout.server is None:
            yield RayPool.start(placement, self.model, self.engine_settings, self.dtype, self.run)
            return
        self.tracker.say(f"generating at {rollout.server}")
        if rollout.server_reload is None:
            self.tracker.say(
                "without rollout.server_reload it keeps the weights that it has, and their tokens grow older every round"
            )
        folder, tokenizer = self.run.path / "server_weights", self.start_from / "tokenizer.json"
        with ServerPool(rollout, self.engine_settings, vocab_size(self.model), folder, tokenizer) as pool:
            prompts = [self._ids(self.task.held_out(index)) for index in range(self.config.task.eval_prompts)]
            pool.require_exact_distribution([ids[: len(ids) // 2 + 1] for ids in prompts[:8]])  # where more is open
            yield pool

    def loop(self, ranks: Processes, pool: SyncedPool, buffer: RolloutBuffer, start: int) -> None:
        """Rounds start+1..rounds. The weights of round r have version r: the rounds learned since the warm-up."""
        config = self.config
        if start == 0:
            self.tracker.log(0, {**self.evaluate(pool), **self.rewards.counts()})
        for version in range(start, config.loop.rounds):
            began, busy_before = time.perf_counter(), pool.busy_s
            metrics: dict[str, Value] = {}
            update = partial(self._update, ranks, version, began, metrics)
            overlapped = update if config.rollout.overlap else None
            result = rollout_round(self.turns(pool), buffer, self.prompt_ids, config.rollout, version, self.score, overlapped)
            if overlapped is None:
                update(result.groups)
            metrics |= result.metrics
            clock = time.perf_counter()
            metrics |= pool.load_weights(ranks, version + 1, config.sync)
            metrics["sync/weights_s"] = time.perf_counter() - clock
            busy = pool.busy_s - busy_before
            metrics["time/engines_idle_s"] = time.perf_counter() - began - busy
            metrics["rollout/tokens_per_s"] = result.metrics["rollout/new_tokens"] / busy if busy else 0.0
            self._close_round(ranks, pool, buffer, version + 1, metrics)

    def _update(
        self, ranks: Processes, version: int, started: float, metrics: dict[str, Value], groups: Sequence[Group]
    ) -> None:
        """Learns the groups of a round that began at `started`; adds to `metrics`."""
        config, algorithm = self.config, self.config.algorithm
        metrics["time/rollout_s"] = time.perf_counter() - started
        batches = policy_batches(
            documents_of(groups, algorithm, version, config.rollout.max_new_tokens),
            algorithm,
            config.rollout.max_new_tokens,
            sequence_length=config.loop.sequence_length,
            rows_multiple_of=self.ranks,
            pad_id=self.tokenizer.pad,
        )
        lr = learning_rate(version, config.loop.rounds, config.optimizer)
        metrics |= learn(ranks, batches, PolicyObjective(algorithm), lr)

    def _close_round(self, ranks: Processes, pool: SyncedPool, buffer: RolloutBuffer, done: int, metrics: dict) -> None:
        loop = self.config.loop
        if done % loop.eval_every == 0 or done == loop.rounds:
            metrics |= self.evaluate(pool)
        if done % loop.checkpoint_every == 0 or done == loop.rounds:
            metrics |= self._save(ranks, buffer, done)
        metrics |= self.rewards.counts()
        self.tracker.log(done, metrics)

    # ------------------------------------------------------------ the task, in tokens

    def prompt_ids(self, index: int) -> list[int]:
        return self._ids(self.task.prompt(index))

    def _ids(self, prompt: Prompt) -> list[int]:
        return [self.tokenizer.bos, *self.tokenizer.encode(prompt.text)]

    def turns(self, pool: OverlappingPool) -> OverlappingPool:
        """The pool, in conversation with the task where the task is one."""
        return TurnPool(pool, self.answers) if isinstance(self.task, Conversation) else pool

    def answers(self, samples: Sequence[Sample]) -> list[Sample]:
        """Finished samples after the task had its say, at most so often that the model has `rollout.max_turns` turns."""
        rollout, replies = self.config.rollout, dict[int, Reply]()
        asked = [sample for sample in samples if len(sample.turns) // 2 + 1 < rollout.max_turns]
        for sample, reply in zip(asked, self.rewards.reply([self._response(sample) for sample in asked]), strict=True):
            replies[sample.uid] = reply
        return [self._answered(sample, replies.get(sample.uid, Reply(None))) for sample in samples]

    def _answered(self, sample: Sample, reply: Reply) -> Sample:
        if reply.failed:
            return replace(sample, status="abandoned")
        if not reply.text:
            return sample
        return with_answer(sample, self.tokenizer.encode(reply.text), self.config.rollout.max_new_tokens)

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        """The rewards of samples that are done."""
        judged = [sample for sample in samples if sample.status != "abandoned"]
        rewards = iter(self.rewards.score([self._response(sample) for sample in judged]))
        return [None if sample.status == "abandoned" else next(rewards) for sample in samples]

    def _response(self, sample: Sample) -> Response:
        prompt = self.task.prompt(sample.group) if sample.group < EVAL_GROUP else self.task.held_out(sample.group - EVAL_GROUP)
        turns = (turn[:-1] if turn[-1] == self.tokenizer.eos else turn for turn in sample.turns)
        return Response(prompt, tuple(map(self.tokenizer.decode, turns)), sample.status == "finished")

    def evaluate(self, pool: OverlappingPool) -> dict[str, float]:
        """The mean reward of one sample for each held-out prompt, with the same noise every time."""
        clock = time.perf_counter()
        prompts = [self._ids(self.task.held_out(index)) for index in range(self.config.task.eval_prompts)]
        samples = [s for index, ids in enumerate(prompts) for s in fresh_group(EVAL_GROUP + index, ids, 1).samples]
        done = complete(self.turns(pool), samples, self.config.rollout.advance_tokens)
        rewards = [reward for reward in self.score(done) if reward is not None]
        if not rewards:
            raise UserError(
                f"none of the answers to {len(done)} held-out prompts could be judged (every score was None); "
                "check the task's score method and the service it may ask"
            )
        return {"reward/eval_mean": sum(rewards) / len(rewards), "time/eval_s": time.perf_counter() - clock}

    def warm_up(self, ranks: Processes) -> None:
        """Supervised learning of demonstrations, so that the first rounds have rewards to tell apart."""
        warmup, length = self.config.warmup, self.config.loop.sequence_length
        index = 0
        for step in range(warmup.steps):
            examples, used = [], 0
            while used < warmup.batch_rows * length:
                prompt, shown = self.task.demonstration(index)
                ids = self._ids(prompt)
                examples.append((ids, *self._demonstrated((shown,) if isinstance(shown, str) else shown)))
                used += len(ids) + len(examples[-1][1])
                index += 1
            batch = pack_demonstrations(
                examples, sequence_length=length, rows_multiple_of=self.ranks, pad_id=self.tokenizer.pad
            )
            loss = ranks.call("learn", batch, cross_entropy, warmup.lr)[0]["train/loss"]
            if (step + 1) % 10 == 0 or step + 1 == warmup.steps:
                self.tracker.say(f"supervised warm-up {step + 1}/{warmup.steps}: loss {loss:.3f}")
        ranks.call("new_optimizer")

    def _demonstrated(self, turns: Sequence[str]) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and which are learned: the model's, each turn with its <eos>."""
        ids, learned = list[int](), list[bool]()
        for number, turn in enumerate(turns):
            own = number % 2 == 0
            said = [*self.tokenizer.encode(turn), *([self.tokenizer.eos] if own else [])]
            ids += said
            learned += [own] * len(said)
        return ids, learned

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

    def _save(self, ranks: Processes, buffer: RolloutBuffer, done: int) -> dict[str, float]:
        meta = checkpoint_meta("rl", done, self.model, self.run, {"next_group": buffer.next_group})
        tokenizer = self.start_from / "tokenizer.json"
        return save(ranks, self.run, meta, tokenizer, buffer.to_state(), self.config.loop.keep_checkpoints)

    def _restore(self, ranks: Processes) -> tuple[int, RolloutBuffer]:
        """(rounds done, buffer), after the ranks have their weights."""
        found = checkpoint.available(self.run.checkpoints)
        if found:
            meta = ranks.call("load", found[-1], True)[0]
            state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
            self.run.rewind(meta.step)
            self.tracker.say(f"continuing after round {meta.step} from {found[-1]}")
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
