"""`python -m launch.bench rl`: a whole iteration of GRPO on one device, split into what it does.

generate (a round of launch/benchmarks/april.py), reward (a program in child processes), logprob (a forward pass over what is
trained), update (forward, backward, AdamW), transfer (the engine takes the trainer's weights). Weights are random and lengths
forced; all else is what a run does. Shares are of this device's ceilings: of a copy, for the bytes that generation and transfer
cannot avoid; of a matrix product, for the FLOPs of logprob and update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import Field, PositiveInt
from rich.table import Table

from launch.benchmarks.april import RoundOptions, TimedPool, conf, forced_engine, one_round, random_prompts, rollout_config
from launch.benchmarks.models import model_config
from launch.benchmarks.options import Listed
from launch.benchmarks.ranks import on_ranks
from launch.benchmarks.timing import Ceilings
from parallel.adamw import AdamWSettings
from parallel.topology import World
from rl.algorithms import PolicyObjective
from rl.packing import documents_of, policy_batches
from rl.rewards.task import Prompt
from rl.rewards.workers import Response, RewardWorkers
from rl.trajectory import Group, RolloutBuffer, Sample
from trainer.batch import TrainBatch
from trainer.config.model import ModelConfig
from trainer.config.rl import AlgorithmConfig, RewardConfig, TaskConfig
from trainer.config.run import BalanceConfig, ParallelConfig
from trainer.estimate import flops_per_token, vocab_size
from trainer.guard import Guard
from trainer.state import TrainerSpec
from trainer.step import Trainer
from trainer.weight_pieces import Piece, expert_pieces, shared_pieces

LEARNING_RATE = 1e-6
STAGES = ("generate", "reward", "logprob", "update", "transfer")


class IterationOptions(RoundOptions):
    over_provision: float = Field(2.0, ge=1, description="of APRIL; 1 waits for the longest")
    slots: PositiveInt = Field(description="sequences that the engine decodes at once")
    micro_rows: PositiveInt = Field(description="rows of prompt + longest tokens that go through the trainer at once")
    workers: PositiveInt = Field(2, description="processes that judge")
    peer_response: PositiveInt = Field(64, description="tokens that transformers' generate gives each sequence")
    peers: Listed[str] | None = Field(None, description="that generate; not given: those that are installed, on a GPU")


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {
        "model": "moe_2b", "layers": 24, "heads": 16, "kv_heads": 8, "head_dim": 64, "slots": 256, "median": 128,
        "longest": 2048, "micro_rows": 4, "warm_rounds": 4, "rounds": 6,
    },
    "cpu": {
        "model": "tiny", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "prompt": 16, "groups": 4, "samples": 4,
        "slots": 16, "median": 8, "longest": 112, "advance": 4, "micro_rows": 2, "warm_rounds": 1, "rounds": 3,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Of one iteration, the median over the rounds."""

    name: str
    seconds: float
    tokens: int  # generated, judged, or passed through the trainer, prompts included
    work: float  # bytes that must be read or written, or FLOPs
    ceiling: float | None  # of the device, in the same unit a second; None: the device has no part in it

    @property
    def share(self) -> float | None:
        return None if self.ceiling is None else self.work / self.seconds / self.ceiling


@dataclass(frozen=True)
class Iteration:
    work: str
    stages: tuple[Stage, ...]
    trained_tokens: int  # of responses, mean of a round
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def measure(
    options: IterationOptions, contenders: Mapping[str, Callable[[], Any]], device: torch.device, ceilings: Ceilings
) -> Iterator[Iteration]:
    """One case for every model."""
    for name in options.model:
        model = model_config(options, name, options.prompt + options.longest + 1)
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
            torch.cuda.empty_cache()  # another process needs it
        stages, trained = on_ranks(iterate, 1, options, (model, ceilings), device.type)
        sizes = f"{options.groups} groups of {options.samples}, N'/N {options.over_provision:g}, {options.slots} slots"
        work = f"an iteration by {name}: {sizes}, median response {options.median} tokens, longest {options.longest}"
        yield Iteration(work, stages, trained, failures, tuple(notes))


def judges(options: IterationOptions, folder: Path) -> RewardWorkers:
    task = TaskConfig(name="launch.benchmarks.parity:Parity", options={}, eval_prompts=1)
    config = RewardConfig(workers=options.workers, timeout_s=30.0, memory_gib=4.0)
    return RewardWorkers(task, options.seed, config, lambda name: folder / f"{name}.log", print)


def trainer_spec(options: IterationOptions, model: ModelConfig, device: torch.device) -> TrainerSpec:
    return TrainerSpec(
        model=model,
        adamw=AdamWSettings(betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, clip_norm=1.0),
        balance=BalanceConfig.model_validate(conf("balance", "frozen")),
        parallel=ParallelConfig.model_validate(conf("parallel", "ep")),
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


def iterate(world: World, options: IterationOptions, case: tuple[ModelConfig, Ceilings]) -> tuple[tuple[Stage, ...], int]:
    """(stages, trained response tokens a round). In a process of its own: DeepSpeed keeps to the first group of a process."""
    with TemporaryDirectory() as folder, judges(options, Path(folder)) as rewards:
        return _iterate(world, options, *case, rewards)


def _iterate(
    world: World, options: IterationOptions, model: ModelConfig, ceilings: Ceilings, rewards: RewardWorkers
) -> tuple[tuple[Stage, ...], int]:
    spec = trainer_spec(options, model, world.device)
    trainer = Trainer(spec, world)
    dtype = getattr(torch, spec.dtype)
    pool = TimedPool(forced_engine(options, model, options.slots, world.device, dtype))
    config, algorithm = rollout_config(options, options.over_provision, options.slots), grpo()
    buffer, prompts, judge = RolloutBuffer(), random_prompts(options, model), Judge(rewards)
    found: dict[str, list[Stage]] = {name: [] for name in STAGES}
    trained = []

    def add(name: str, started: float, tokens: int, work: float, ceiling: float | None) -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        found[name].append(Stage(name, time.perf_counter() - started, tokens, work, ceiling))

    copied, multiplied = ceilings.copy_tbytes * 1e12, ceilings.tflops * 1e12
    for version in range(options.warm_rounds + options.rounds):
        pieces, clock = weights(trainer), time.perf_counter()
        pool.engine.load_pieces(pieces, version)
        add("transfer", clock, 0, 2 * sum(piece.values_N.nbytes for piece in pieces), copied)
        done, groups = one_round(pool, buffer, prompts, config, version, judge)
        generating = done.seconds - judge.seconds
        found["generate"].append(Stage("generate", generating, done.generated_tokens, done.floor_bytes, copied))
        found["reward"].append(Stage("reward", judge.seconds, done.trained_tokens, 0.0, None))
        trained.append(done.trained_tokens)
        batch = batch_of(groups, algorithm, options, version)
        tokens, flops = int((batch.documents_BS >= 0).sum()), flops_of(groups, model)
        clock = time.perf_counter()
        trainer.predict(batch, policy=True, reference=False)
        add("logprob", clock, tokens, flops / 3, multiplied)
        clock = time.perf_counter()
        trainer.learn(batch, PolicyObjective(algorithm), LEARNING_RATE)
        add("update", clock, tokens, flops, multiplied)
    counted = {name: stages[options.warm_rounds :] for name, stages in found.items()}
    return tuple(typical(stages) for stages in counted.values()), round(sum(trained[-options.rounds :]) / options.rounds)


def weights(trainer: Trainer) -> list[Piece]:
    return [*shared_pieces(trainer.model, trainer.bias_LE), *expert_pieces(trainer.experts)]


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
    (batch,) = policy_batches(documents, algorithm, options.longest, sequence_length=length, rows_multiple_of=1, pad_id=0)
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
    for name in ("stage", "seconds", "of iteration", "tokens", "tokens/s per GPU", "of ceiling"):
        shown.add_column(name, justify="left" if name == "stage" else "right")
    for stage in case.stages:
        rate = f"{stage.tokens / stage.seconds:,.0f}" if stage.tokens else f"{stage.work / 2 / stage.seconds / 1e9:,.0f} GB/s"
        share = "" if stage.share is None else f"{stage.share:.1%}"
        part = f"{stage.seconds / case.seconds:.1%}"
        shown.add_row(stage.name, f"{stage.seconds:.4f}", part, f"{stage.tokens:,}", rate, share)
    rate = f"{case.trained_tokens / case.seconds:,.0f}"
    shown.add_row("iteration", f"{case.seconds:.4f}", "", f"{case.trained_tokens:,}", rate, "")
    return shown
