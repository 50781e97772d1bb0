"""Reinforcement learning with verifiable rewards: the loop, and the attempt that surrounds it. It runs in the driver."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from rl.actors import RayPool
from rl.april import OverlappingPool, complete, rollout_round
from rl.chat import Chat
from rl.engine.engine import EngineSettings
from rl.engine.pool import SyncedPool
from rl.engine.sampler import Sampling
from rl.engine.server import ServerPool
from rl.engine.stops import Stops
from rl.evaluation import EVAL_GROUP, Judged, estimate
from rl.packing import Rows, documents_of, pack_demonstrations, policy_batches
from rl.rewards.task import Conversation, Prompt, Task
from rl.rewards.workers import Reply, Response, RewardWorkers
from rl.staged import stage
from rl.trajectory import Group, RolloutBuffer, Sample, fresh_group, lengths_of
from rl.turns import TurnPool, with_answer
from rl.update import learn
from trainer.batch import cross_entropy
from trainer.checkpoint import CheckpointMeta
from trainer.cluster import Processes
from trainer.config.model import ModelConfig
from trainer.config.rl import RLConfig
from trainer.estimate import vocab_size
from trainer.guard import Guard
from trainer.loop import checkpoint_meta, load_newest, save, start_ranks
from trainer.memory_checkpoints import MemoryCheckpoints
from trainer.metrics import LENGTHS, Value
from trainer.optimizer import adamw_settings, learning_rate
from trainer.places import Placement
from trainer.run_dir import RunDir
from trainer.starting_point import load_weights
from trainer.state import TrainerSpec
from trainer.stopping import Move, StopRequest
from trainer.tokenizer import Tokenizer
from trainer.tracing import Traces
from trainer.tracking import Tracker


@dataclass(frozen=True)
class Reinforcement:
    """What an attempt needs; the same for all attempts of a run."""

    config: RLConfig
    model: ModelConfig
    tokenizer: Tokenizer
    task: Task
    rewards: RewardWorkers
    start_from: Path  # a checkpoint of ours or a folder in the Hugging Face layout
    ranks: tuple[int, ...]  # how many there may be, the number that is wanted first; of an attempt the one there is
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
        """From where the run is to its end, with ranks that have built their trainers; `look` is that of their places."""
        start, buffer = self._restore(ranks)
        if self.config.algorithm.kl_coefficient > 0:
            ranks.call("keep_reference", self.run.reference)
        pool.load_weights(ranks, start, self.config.sync)
        with self.stop.deferred(look):
            self.loop(ranks, pool, buffer, start)

    def prepare(self, ranks: Processes) -> None:
        """What a run begins with, warmed up, as its checkpoint of round 0: others can start from it without a warm-up."""
        _, buffer = self._restore(ranks)
        self._save(ranks, buffer, 0, wait=True)

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
        traces = Traces(config.trace, self.run, len(ranks), self.tracker.say, lambda: pool.engines)

        def everybody(method: str, *arguments: Any) -> list[Any]:
            return [*ranks.call(method, *arguments), *pool.ask(method, *arguments)]

        if start == 0:
            self.tracker.log(0, {**self.evaluate(pool), **self.rewards.counts()})
        for version in range(start, config.loop.rounds):
            traces.before(everybody, version + 1)
            began, busy_before = time.perf_counter(), pool.busy_s
            metrics: dict[str, Value] = {}
            update = partial(self._update, ranks, version, began, metrics)
            overlapped = update if config.rollout.overlap else None
            result = rollout_round(self.turns(pool), buffer, self.prompt_ids, config.rollout, version, self.score, overlapped)
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
            traces.behind(everybody, version + 1, last=version + 1 == config.loop.rounds)
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
            metrics |= self.evaluate(pool)
        stopping = not last and self.stop.asked()
        if done % loop.checkpoint_every == 0 or last:
            metrics |= self._save(ranks, buffer, done, wait=last or stopping)
        elif stopping:
            metrics |= self._save_to_stop(ranks, buffer, done)
        elif self.memory.due(done):
            metrics |= self.memory.save(ranks, self._meta(buffer, done), json.dumps(buffer.to_state()))
        metrics |= self.rewards.counts() | pool.counts()
        self.tracker.devices = len(ranks) + (pool.places if self.config.rollout.placement == "separate" else 0)
        self.tracker.log(done, metrics)
        if stopping:
            self.stop.obey(f"after round {done}")

    # ------------------------------------------------------------ the task, in tokens

    def prompt_ids(self, index: int) -> list[int]:
        return self._ids(self.task.prompt(index))

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.chat.prompt.around(prompt.text)

    @cached_property
    def chat(self) -> Chat:
        return Chat.of(self.config.chat, self.tokenizer)

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
        return with_answer(sample, self.chat.reply.around(reply.text), self.config.rollout.max_new_tokens)

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        """The rewards of samples that are done."""
        judged = [sample for sample in samples if sample.status != "abandoned"]
        rewards = iter(self.rewards.score([self._response(sample) for sample in judged]))
        return [None if sample.status == "abandoned" else next(rewards) for sample in samples]

    def _response(self, sample: Sample) -> Response:
        turns = (self._text(turn, own=number % 2 == 0) for number, turn in enumerate(sample.turns))
        return Response(self._prompt(sample.group), tuple(turns), sample.status == "finished")

    def _prompt(self, group: int) -> Prompt:
        return self.task.prompt(group) if group < EVAL_GROUP else self.task.held_out(group - EVAL_GROUP)

    def _text(self, turn: Sequence[int], own: bool) -> str:
        if not own:
            return self.chat.reply.inside(turn)
        ids = turn[:-1] if turn[-1] in (self.tokenizer.eos, *self.stop_ids) else turn
        return self.tokenizer.decode(ids) if self.stops is None else self.stops.text(ids)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(map(self.tokenizer.id_of, self.config.rollout.stop_tokens))

    @cached_property
    def stops(self) -> Stops | None:
        rollout = self.config.rollout
        strings = tuple(string.encode() for string in rollout.stop)
        return Stops(strings, self.tokenizer.spelled(), rollout.include_stop) if strings else None

    def evaluate(self, pool: OverlappingPool) -> dict[str, float]:
        """The mean reward of one sample for each held-out prompt, with the same noise every time, and its standard error."""
        clock = time.perf_counter()
        found = estimate(self.judged(pool, range(EVAL_GROUP, EVAL_GROUP + self.config.task.eval_prompts)))
        error = {} if found.error is None else {"reward/eval_error": found.error}
        return {"reward/eval_mean": found.mean, **error, "time/eval_s": time.perf_counter() - clock}

    def judged(self, pool: OverlappingPool, groups: Sequence[int]) -> list[Judged]:
        """One answer each to the prompts of these groups, less those that could not be judged; the engines must be empty."""
        samples = [fresh_group(group, self._ids(self._prompt(group)), 1).samples[0] for group in groups]
        done = complete(self.turns(pool), samples, self.config.rollout.advance_tokens)
        rewards = zip(done, self.score(done), strict=True)
        found = [(self._prompt(sample.group).text, reward) for sample, reward in rewards if reward is not None]
        if not found:
            raise UserError(
                f"none of the answers to {len(done)} held-out prompts could be judged (every score was None); "
                "check the task's score method and the service it may ask"
            )
        return found

    def warm_up(self, ranks: Processes) -> None:
        """Supervised learning of demonstrations, so that the first rounds have rewards to tell apart."""
        warmup, rows = self.config.warmup, self.rows
        index = 0
        for step in range(warmup.steps):
            examples, used = [], 0
            while used < warmup.batch_rows * rows["sequence_length"]:
                prompt, shown = self.task.demonstration(index)
                ids = self._ids(prompt)
                examples.append((ids, *self._demonstrated((shown,) if isinstance(shown, str) else shown)))
                used += len(ids) + len(examples[-1][1])
                index += 1
            batch = pack_demonstrations(examples, **rows)
            loss = ranks.call("learn", batch, cross_entropy, warmup.lr)[0].get("train/loss", math.nan)
            if (step + 1) % 10 == 0 or step + 1 == warmup.steps:
                self.tracker.say(f"supervised warm-up {step + 1}/{warmup.steps}: loss {loss:.3f}")
        ranks.call("new_optimizer")

    def _demonstrated(self, turns: Sequence[str]) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and which are learned: the model's, each turn with its <eos>."""
        ids, learned = list[int](), list[bool]()
        for number, turn in enumerate(turns):
            own = number % 2 == 0
            said = [*self.tokenizer.encode(turn), self.tokenizer.eos] if own else self.chat.reply.around(turn)
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
            freeze_router=config.loop.freeze_router,
            value_decay=config.algorithm.value_decay if config.algorithm.advantage == "gae" else None,
            seed=config.seed,
            guard=Guard(config.loop.skip_nonfinite, spike_zscore=None, spike_window=2, on_spike="stop"),
        )

    @property
    def rows(self) -> Rows:
        return Rows(sequence_length=self.config.loop.sequence_length, rows_multiple_of=self.ranks[0], pad_id=self.tokenizer.pad)

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
            stop_ids=self.stop_ids,
            stops=self.stops,
            record_routing=rollout.replay_routing,
        )

    def _save(self, ranks: Processes, buffer: RolloutBuffer, done: int, wait: bool) -> dict[str, float]:
        tokenizer, keep = self.start_from / "tokenizer.json", self.config.loop.keep_checkpoints
        return save(ranks, self.run, self.tracker, self._meta(buffer, done), tokenizer, buffer.to_state(), keep, wait)

    def _save_to_stop(self, ranks: Processes, buffer: RolloutBuffer, done: int) -> dict[str, float]:
        """On the disk, or in memory where the run goes on from there at once, unless a signal comes meanwhile."""
        going, state = self.stop.leaving, json.dumps(buffer.to_state())
        kept = None if going is None else self.memory.keep(ranks, self._meta(buffer, done), state, going)
        return kept if kept is not None and self.stop.leaving is not None else self._save(ranks, buffer, done, wait=True)

    def _meta(self, buffer: RolloutBuffer, done: int) -> CheckpointMeta:
        return checkpoint_meta("rl", done, self.model, self.run, {"next_group": buffer.next_group})

    def _restore(self, ranks: Processes) -> tuple[int, RolloutBuffer]:
        """(rounds done, buffer), after the ranks have their weights."""
        loaded = load_newest(ranks, self.run, self.tracker, self.memory)
        if loaded is not None:
            found, meta = loaded
            self.run.rewind(meta.step)
            self.tracker.say(f"continuing after round {meta.step} from {found}")
            return meta.step, RolloutBuffer.parse(found.text("state.json"), str(found))
        self.run.rewind(-1)
        self.tracker.say(f"loading {self.start_from}")
        load_weights(ranks, self.start_from)
        self.warm_up(ranks)
        if self.config.algorithm.kl_coefficient > 0:
            self._write_reference(ranks)
        return 0, RolloutBuffer()

    def _write_reference(self, ranks: Processes) -> None:
        """The weights at the start of RL, once for all attempts: every one of them reads its reference policy there."""
        files = {"tokenizer.json": (self.start_from / "tokenizer.json").read_text(encoding="utf-8")}
        ranks.call("write_reference", self.run.reference, checkpoint_meta("rl", 0, self.model, self.run, {}), files)
