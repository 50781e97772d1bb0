"""The processes of an iteration of GRPO, placed as a run places them, and what each part took: `python -m launch.bench rl`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch

from launch.benchmarks.april import ForcedEngine, RoundOptions, engine_settings, random_prompts, rollout_config
from launch.benchmarks.kernel_times import KernelTimes, kernel_times
from launch.benchmarks.models import floor_bytes, trainer_spec
from launch.benchmarks.stages import IterationOptions, Stage
from launch.benchmarks.timing import Ceilings
from launch.machines import read_group
from rl.actors import Patience, RayPool
from rl.algorithms import PolicyObjective
from rl.april import rollout_round
from rl.engine.actor import EngineActor
from rl.engine.settings import EngineSettings
from rl.links import Links
from rl.packing import documents_of, policy_batches
from rl.rewards.task import Prompt
from rl.rewards.workers import Response, RewardWorkers
from rl.trajectory import Group, RolloutBuffer, Sample
from trainer.batch import TrainBatch
from trainer.cluster import Processes, gather, start_ray
from trainer.config.model import ModelConfig
from trainer.config.rl import AlgorithmConfig, RewardConfig, RolloutConfig, SyncConfig, TaskConfig
from trainer.config.run import ClusterConfig
from trainer.estimate import flops_per_token
from trainer.loop import meet
from trainer.places import Placement
from trainer.tracing import TraceRequest

LEARNING_RATE = 1e-6
STAGES = ("generate", "reward", "logprob", "update", "transfer", "rest")
SYNC = read_group("sync", "full", SyncConfig)


class CountingEngine(ForcedEngine):
    """Also counts the bytes that decoding had to read."""

    floor_bytes = 0.0

    def advance(self, tokens: int) -> list[Sample]:
        decoded, context = self.decoded_tokens, self.context_tokens
        done = super().advance(tokens)
        rows, keys = (self.decoded_tokens - decoded) / tokens, (self.context_tokens - context) / tokens
        self.floor_bytes += tokens * floor_bytes(self.config, rows, keys, self.dtype.itemsize)
        return done


class ForcedEngineActor(EngineActor):
    """An engine whose responses have forced lengths."""

    _engine: CountingEngine

    def __init__(self, options: RoundOptions, *arguments: Any) -> None:
        self._options = options
        super().__init__(*arguments)

    def _new_engine(self, config: ModelConfig, settings: EngineSettings, dtype: torch.dtype) -> CountingEngine:
        return CountingEngine(config, settings, self._device, dtype, self._options)

    def floor_bytes(self) -> float:
        """That it had to read, ever."""
        return self._engine.floor_bytes


def iterate(
    options: IterationOptions, model: ModelConfig, cluster: ClusterConfig, device: torch.device, ceilings: Ceilings
) -> Rounds:
    spec = trainer_spec(model, device, options.micro_rows, options.seed, batch_invariant=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        rewards = stack.enter_context(judges(options, folder))
        start_ray(cluster, options.ranks + options.engines, print)
        stack.callback(ray.shutdown)
        engines, separate = options.engines or options.ranks, options.engines > 0
        placement = stack.enter_context(Placement(cluster, (options.ranks,), print, engines, separate))

        def log_file(name: str) -> Path:
            return folder / f"{name.replace('/', '_')}.log"

        ranks = meet(placement, spec, cluster, log_file, None)
        logs = {f"engine/{index}": log_file(f"engine/{index}") for index in range(engines)}
        settings = replace(engine_settings(options, options.slots), cache_tokens=options.cache)
        index_of = {name: index for index, name in enumerate(logs)}

        def launch(name: str) -> Any:
            arguments = (options, model, settings, spec.dtype, logs[name], cluster.engine_timeout_s)
            return placement.actor(ForcedEngineActor, name, index_of[name], *arguments)

        patience = Patience(cluster.engine_timeout_s, cluster.start_timeout_s, 0)
        links = Links(cluster.collective_timeout_s) if SYNC.is_direct(placement.on_gpu) else None
        pool = RayPool(launch, logs, patience, print, links)
        rounds = Rounds(options, model, ranks, pool, placement, Judge(rewards), ceilings)
        for version in range(options.warm_rounds + options.rounds):
            rounds.run(version)
        if options.profile is not None:
            rounds.kernels = rounds.profiled(folder)
    return rounds


class Rounds:
    """Iterations, one after another, and what they took."""

    def __init__(
        self,
        options: IterationOptions,
        model: ModelConfig,
        ranks: Processes,
        pool: RayPool,
        placement: Placement,
        judge: Judge,
        ceilings: Ceilings,
    ) -> None:
        self.options, self.model, self.ranks, self.pool, self.judge = options, model, ranks, pool, judge
        self.placement, self.copied, self.multiplied = placement, ceilings.copy_tbytes * 1e12, ceilings.tflops * 1e12
        changed = {"overlap": options.overlap, "engines": placement.engines}
        config = rollout_config(options, options.over_provision, options.slots)
        self.config = RolloutConfig.model_validate(config.model_dump() | changed)
        self.algorithm = grpo()
        self.buffer, self.prompts = RolloutBuffer(), random_prompts(options, model)
        self.found: dict[str, list[Stage]] = {name: [] for name in STAGES}
        self.seconds, self.trained_tokens = list[float](), list[int]()
        self.kernels: KernelTimes | None = None
        self._batch: TrainBatch | None = None

    def run(self, version: int) -> None:
        busy_s, floor, began = self.pool.busy_s, self._floor_bytes(), time.perf_counter()
        sent = self.pool.load_weights(self.ranks, version, SYNC)
        engines = self.placement.engines
        taken = 2 * sent["sync/mib"] * 2**20 * engines
        self._add("transfer", time.perf_counter() - began, engines, 0, taken, self.copied)
        began_round, learned_at = time.perf_counter(), [0.0]

        def learn(groups: Sequence[Group]) -> None:
            learned_at[0] = time.perf_counter()
            self._learn(groups, version)

        arguments = (self.pool, self.buffer, self.prompts, self.config, version, self.judge)
        result = rollout_round(*arguments, learn if self.options.overlap else None)
        if not self.options.overlap:
            learn(result.groups)
        self.seconds.append(time.perf_counter() - began)
        self.trained_tokens.append(sum(sample.length for group in result.groups for sample in group.samples))
        waited, busy_s = learned_at[0] - began_round - self.judge.seconds, self.pool.busy_s - busy_s
        read, tokens = self._floor_bytes() - floor, int(result.metrics["rollout/new_tokens"])
        self._add("generate", waited, engines, tokens, read, self.copied, busy_s)
        self._add("reward", self.judge.seconds, 1, self.trained_tokens[-1], 0.0, None)
        told = sum(stages[-1].seconds for name, stages in self.found.items() if name != "rest")
        self._add("rest", self.seconds[-1] - told, 1, 0, 0.0, None)

    def _learn(self, groups: Sequence[Group], version: int) -> None:
        self._batch = batch_of(groups, self.algorithm, self.options, version)
        tokens, flops = int((self._batch.documents_BS >= 0).sum()), flops_of(groups, self.model)
        clock = time.perf_counter()
        self.ranks.call("predict", self._batch, True, False)
        self._add("logprob", time.perf_counter() - clock, len(self.ranks), tokens, flops / 3, self.multiplied)
        clock = time.perf_counter()
        self.ranks.call("learn", self._batch, PolicyObjective(self.algorithm), LEARNING_RATE)
        self._add("update", time.perf_counter() - clock, len(self.ranks), tokens, flops, self.multiplied)

    def _add(
        self, name: str, seconds: float, devices: int, tokens: int, work: float, ceiling: float | None, busy_s: float = 0.0
    ) -> None:
        self.found[name].append(Stage(name, seconds, busy_s or seconds, devices, tokens, work, ceiling))

    def _floor_bytes(self) -> float:
        """Of all engines, ever."""
        return sum(gather({name: actor.floor_bytes.remote() for name, actor in self.pool.actors.items()}).values())

    def profiled(self, folder: Path) -> KernelTimes:
        """Of the last batch once more, on rank 0."""
        self.ranks.call("start_trace", TraceRequest(steps=1, ranks=(0,), engines=(), tokens=1, memory=False))
        self.ranks.call("predict", self._batch, True, False)
        self.ranks.call("learn", self._batch, PolicyObjective(self.algorithm), LEARNING_RATE)
        traced, *_ = self.ranks.call("end_trace", folder)
        return kernel_times(json.loads(traced.events.read_text(encoding="utf-8"))["traceEvents"])

    def stages(self, options: IterationOptions) -> tuple[Stage, ...]:
        return tuple(typical(stages[options.warm_rounds :]) for stages in self.found.values())


def judges(options: IterationOptions, folder: Path) -> RewardWorkers:
    task = TaskConfig(name="launch.benchmarks.parity:Parity", options={}, eval_prompts=1)
    config = RewardConfig(workers=options.workers, timeout_s=30.0, memory_gib=4.0)
    return RewardWorkers(task, options.seed, config, lambda name: folder / f"{name}.log", print)


@dataclass
class Judge:
    """A `Score` that asks the workers; `seconds` is what it took the last time."""

    workers: RewardWorkers
    seconds: float = 0.0

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        started = time.perf_counter()
        prompt = Prompt(text="", answer="even")
        responses = [Response(prompt, (" ".join(map(str, s.response_ids)),), s.status == "finished") for s in samples]
        rewards = self.workers.score(responses)
        self.seconds = time.perf_counter() - started
        return rewards


def grpo() -> AlgorithmConfig:
    return read_group("algorithm", "grpo", AlgorithmConfig)


def batch_of(groups: Sequence[Group], algorithm: AlgorithmConfig, options: IterationOptions, version: int) -> TrainBatch:
    documents = documents_of(groups, algorithm, version, options.longest)
    length = options.prompt + options.longest
    rows = {"sequence_length": length, "rows_multiple_of": options.ranks, "pad_id": 0}
    (batch,) = policy_batches(documents, algorithm, options.longest, **rows)
    return batch


def flops_of(groups: Sequence[Group], model: ModelConfig) -> int:
    """Forward and backward over all samples, without padding."""
    lengths = [len(sample.prompt_ids) + sample.length for group in groups for sample in group.samples]
    return sum(flops_per_token(model, length) * length for length in lengths)


def typical(stages: Sequence[Stage]) -> Stage:
    """The stage of median length in time, so that its tokens and work belong to it."""
    return sorted(stages, key=lambda stage: stage.seconds)[len(stages) // 2]
