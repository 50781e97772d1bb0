"""`python -m launch.bench rl`: a whole iteration of GRPO, over ranks and engines as a run has them, split into what it does.

generate (a round of rl/april.py), reward (a program in child processes), logprob (a forward pass over what is trained), update
(forward, backward, AdamW), transfer (the engines take the ranks' weights), rest (what the driver does between them: rows,
advantages). Ranks learn by FSSDP and ZeRO; engines share their GPUs, or have GPUs of their own. Weights are random and lengths
forced; all else is what a run does, Ray's calls included. Shares are of the ceilings of the devices at work: of a copy, for the
bytes that generation and transfer cannot avoid; of a matrix product, for the FLOPs of logprob and update.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.table import Table

from launch.benchmarks.april import ForcedEngine, RoundOptions, conf, engine_settings, random_prompts, rollout_config
from launch.benchmarks.kernel_times import KernelTimes, kernel_times
from launch.benchmarks.models import floor_bytes, model_config
from launch.benchmarks.options import Listed
from launch.benchmarks.timing import Ceilings
from parallel.adamw import AdamWSettings
from rl.actors import EngineActor, Patience, RayPool
from rl.algorithms import PolicyObjective
from rl.april import rollout_round
from rl.engine.engine import EngineSettings
from rl.links import Links
from rl.packing import documents_of, policy_batches
from rl.rewards.task import Prompt
from rl.rewards.workers import Response, RewardWorkers
from rl.trajectory import Group, RolloutBuffer, Sample
from trainer.batch import TrainBatch
from trainer.cluster import Processes, check_cluster, gather, start_ray
from trainer.config.model import ModelConfig
from trainer.config.rl import AlgorithmConfig, RewardConfig, RolloutConfig, SyncConfig, TaskConfig
from trainer.config.run import BalanceConfig, ClusterConfig, ParallelConfig
from trainer.estimate import flops_per_token, vocab_size
from trainer.guard import Guard
from trainer.loop import meet
from trainer.places import Placement
from trainer.step import TrainerSpec
from trainer.worker import check_division

LEARNING_RATE = 1e-6
STAGES = ("generate", "reward", "logprob", "update", "transfer", "rest")


class IterationOptions(RoundOptions):
    ranks: PositiveInt = Field(1, description="that learn, one on each GPU, or processes on a CPU")
    engines: NonNegativeInt = Field(0, description="with GPUs of their own; 0: one on the GPU of each rank")
    overlap: bool = Field(False, description="engines generate on while the ranks learn, as with rollout=async")
    over_provision: float = Field(2.0, ge=1, description="of APRIL; 1 waits for the longest")
    slots: PositiveInt = Field(description="sequences that an engine decodes at once")
    cache: PositiveInt | None = Field(
        None, description="tokens that an engine's cache holds; not given: the longest in every slot"
    )
    micro_rows: PositiveInt = Field(description="rows of prompt + longest tokens that a rank takes through the model at once")
    workers: PositiveInt = Field(2, description="processes that judge")
    profile: Path | None = Field(None, description="a JSON file: on what rank 0 spends the time of a logprob and an update")
    peer_response: PositiveInt = Field(64, description="tokens that transformers' generate gives each sequence")
    peers: Listed[str] | None = Field(None, description="that generate; not given: those that are installed, on a GPU")


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {
        "model": "moe_2b", "layers": 24, "heads": 16, "kv_heads": 8, "head_dim": 64, "slots": 256, "median": 128,
        "longest": 2048, "cache": 1 << 18, "micro_rows": 8, "warm_rounds": 4, "rounds": 6,
    },
    "cpu": {
        "model": "tiny", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "prompt": 16, "groups": 4, "samples": 4,
        "slots": 16, "median": 8, "longest": 112, "advance": 4, "cache": 2048, "micro_rows": 2, "warm_rounds": 1, "rounds": 3,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Of one iteration, the median over the rounds."""

    name: str
    seconds: float  # that the iteration waited for it
    busy_s: float  # in which its devices were at it; engines that go on while the ranks learn are so for longer
    devices: int
    tokens: int  # generated, judged, or passed through the trainer, prompts included
    work: float  # bytes that must be read or written, or FLOPs, of all devices
    ceiling: float | None  # of one device, in the same unit a second; None: the devices have no part in it

    @property
    def share(self) -> float | None:
        return None if self.ceiling is None else self.work / self.busy_s / self.devices / self.ceiling


@dataclass(frozen=True)
class Iteration:
    work: str
    stages: tuple[Stage, ...]
    seconds: float  # median of a round
    devices: int  # GPUs of ranks and engines; processes that learn, and engines in places of their own, on a CPU
    trained_tokens: int  # of responses, mean of a round
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure(
    options: IterationOptions, contenders: Mapping[str, Callable[[], Any]], device: torch.device, ceilings: Ceilings
) -> Iterator[Iteration]:
    """One case for every model."""
    cluster = ClusterConfig.model_validate({**conf("cluster", "local"), "ranks": options.ranks})
    check_cluster(cluster, options.ranks, options.engines)
    for name in options.model:
        model = model_config(options, name, options.prompt + options.longest + 1)
        check_division(model, options.ranks, options.ranks)
        notes, failures = [], {}
        for peer, load in contenders.items():
            try:
                rate = load()(model, options, device)
                notes.append(
                    f"{peer}: {rate:,.0f} tokens/s for {options.groups * options.samples} sequences of {options.peer_response} "
                    "tokens each, so without a tail to wait for"
                )
            except Exception as error:  # a peer that cannot do it is a result
                failures[peer] = f"{type(error).__name__}: {error}"
        if device.type == "cuda":
            torch.cuda.empty_cache()  # other processes need it
        plural = "s" * (options.engines > 1)
        engines = f"{options.engines} engine{plural} apart" if options.engines else "an engine beside each"
        overlap = ", which go on while the ranks learn" if options.overlap else ""
        work = (
            f"an iteration by {name}, {options.ranks} rank{'s' * (options.ranks > 1)} and {engines}{overlap}: {options.groups} "
            f"groups of {options.samples}, N'/N {options.over_provision:g}, {options.slots} slots an engine, median response "
            f"{options.median} tokens, longest {options.longest}"
        )
        found = iterate(options, model, cluster, device, ceilings)
        profiled = [] if found.kernels is None else found.kernels.lines()
        if options.profile is not None and found.kernels is not None:
            options.profile.write_text(json.dumps(asdict(found.kernels), indent=1) + "\n", encoding="utf-8")
        stages, trained = found.stages(options), found.trained_tokens[options.warm_rounds :]
        yield Iteration(
            work,
            stages,
            sorted(found.seconds[options.warm_rounds :])[options.rounds // 2],
            options.ranks + options.engines,
            round(sum(trained) / len(trained)),
            failures,
            (*notes, *profiled),
        )


# ---------------------------------------------------------------- the processes


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

    def engine(self, config: ModelConfig, settings: EngineSettings, dtype: torch.dtype) -> CountingEngine:
        return CountingEngine(config, settings, self._device, dtype, self._options)

    def floor_bytes(self) -> float:
        """That it had to read, ever."""
        return self._engine.floor_bytes


def iterate(
    options: IterationOptions, model: ModelConfig, cluster: ClusterConfig, device: torch.device, ceilings: Ceilings
) -> Rounds:
    spec = trainer_spec(options, model, device)
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


SYNC = SyncConfig.model_validate(conf("sync", "full"))


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
        self.ranks.call("start_trace", (0,), False)
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


def trainer_spec(options: IterationOptions, model: ModelConfig, device: torch.device) -> TrainerSpec:
    return TrainerSpec(
        model=model,
        adamw=AdamWSettings(betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, clip_norm=1.0),
        balance=BalanceConfig.model_validate(conf("balance", "frozen")),
        parallel=ParallelConfig.model_validate(conf("parallel", "fssdp")),
        dtype="bfloat16" if device.type == "cuda" else "float32",
        recompute=False,
        micro_rows=options.micro_rows,
        batch_invariant=True,
        temperature=1.0,
        freeze_router=False,
        value_decay=None,
        seed=options.seed,
        guard=Guard(skip_nonfinite=0, spike_zscore=None, spike_window=2, on_spike="stop"),
    )


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
    return AlgorithmConfig.model_validate(conf("algorithm", "grpo"))


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


def transformers_generation() -> Callable[[ModelConfig, IterationOptions, torch.device], float]:
    """transformers' generate over grouped products, all sequences equally long: tokens a second."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    def work(model: ModelConfig, options: IterationOptions, device: torch.device) -> float:
        sizes = {
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.top_k,
            "moe_intermediate_size": model.expert_hidden_size,
            "max_position_embeddings": model.max_positions,
        }
        config = Qwen3MoeConfig(**sizes, tie_word_embeddings=True, eos_token_id=None)  # type: ignore[arg-type]
        with device:
            peer = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="grouped_mm").eval()
        generator = torch.Generator().manual_seed(options.seed)
        ids = torch.randint(vocab_size(model), (options.groups * options.samples, options.prompt), generator=generator)
        ids, times = ids.to(device), []
        for _ in range(3):
            started = time.perf_counter()
            peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=options.peer_response,
                max_new_tokens=options.peer_response,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            ).cpu()
            times.append(time.perf_counter() - started)
        return len(ids) * options.peer_response / median(times[1:])

    return work


PEERS: Mapping[str, Callable[[], Any]] = {"transformers": transformers_generation}


def table(case: Iteration) -> Table:
    shown = Table(title=case.work, title_justify="left")
    for name in ("stage", "devices", "seconds", "of iteration", "tokens", "tokens/s per GPU", "of ceiling"):
        shown.add_column(name, justify="left" if name == "stage" else "right")
    for stage in case.stages:
        each = stage.busy_s * stage.devices
        rate = (
            f"{stage.tokens / each:,.0f}" if stage.tokens else f"{stage.work / 2 / each / 1e9:,.0f} GB/s" if stage.work else ""
        )
        share = "" if stage.share is None else f"{stage.share:.1%}"
        part, tokens = f"{stage.seconds / case.seconds:.1%}", f"{stage.tokens:,}" if stage.tokens else ""
        shown.add_row(stage.name, str(stage.devices), f"{stage.seconds:.4f}", part, tokens, rate, share)
    rate = f"{case.trained_tokens / case.seconds / case.devices:,.0f}"
    shown.add_row("iteration", str(case.devices), f"{case.seconds:.4f}", "", f"{case.trained_tokens:,}", rate, "")
    return shown
