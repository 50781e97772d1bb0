"""`python -m launch.bench pretrain`: whole updates of a model, from tokens to new weights, against others.

An update is what `python -m launch.pretrain` does between two batches: forward, loss, backward, the gradient norm, AdamW on
float32 masters. Weights and tokens are random, and the routing is what random weights make of them.

    transformers    the same sizes as Qwen3MoE with its grouped products, under PyTorch's FSDP2: bfloat16 computing, float32
                    masters and gradient sums, the fused AdamW, clipping

Competitors run one after the other, each with the GPUs for itself, since both at once would leave room only for tiny models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.table import Table
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile

from kernels.errors import UserError
from launch.benchmarks.contest import OURS
from launch.benchmarks.kernel_times import KernelTimes, kernel_times
from launch.benchmarks.models import ModelOptions, model_config, random_rows, trainer_spec
from launch.benchmarks.options import Listed
from launch.benchmarks.peers import transformers_model
from launch.benchmarks.ranks import on_ranks, slowest
from launch.benchmarks.timing import Call, Ceilings, Timing
from launch.machines import read_group
from parallel.topology import World
from trainer.batch import TrainBatch, cross_entropy
from trainer.config.model import ModelConfig
from trainer.config.run import ParallelConfig
from trainer.estimate import GIB, training_flops, vocab_size
from trainer.memory import keep_imports
from trainer.usage import work_of

LEARNING_RATE = 1e-4
REPEATS = 10
PEERS: Mapping[str, None] = {"transformers": None}  # the ranks make it, on their GPUs
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {
        "model": "moe_2b", "layers": 24, "heads": 16, "kv_heads": 8, "head_dim": 64, "rows": 8, "micro_rows": 4, "length": 4096,
    },
    "cpu": {
        "model": "tiny", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "rows": 4, "micro_rows": 2, "length": 128,
    },
}  # fmt: skip


class PretrainOptions(ModelOptions):
    ranks: PositiveInt = Field(1, description="one on each GPU, or processes on a CPU")
    rows: PositiveInt = Field(description="of an update, each rank")
    micro_rows: PositiveInt = Field(description="rows that a rank takes through the model at once")
    length: PositiveInt = Field(description="tokens of a row")
    document: NonNegativeInt = Field(
        0, description="mean tokens of a document, many to a row; 0: a row is one, as it always is for others"
    )
    parallel: Literal["fssdp", "ep"] = "fssdp"
    recompute: bool = Field(False, description="activations are computed again in the backward pass")
    profile: Path | None = Field(None, description="a JSON file: on what rank 0 spends the time of an update of ours")
    peers: Listed[str] | None = Field(None, description="not given: those that are installed, on a GPU")


@dataclass(frozen=True)
class Updates:
    """Of one competitor, the slowest rank's."""

    time: Timing
    tokens_per_second: float  # of a GPU
    of_ceiling: float  # FLOPs that the model needs, over those of a product in the same time
    peak_gib: float | None  # of a GPU's memory; None on a CPU


@dataclass(frozen=True)
class Case:
    work: str
    updates: dict[str, Updates]
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """By the ranks."""

    timing: Timing
    peak: int | None
    kernels: KernelTimes | None = None


def measure(
    options: PretrainOptions, contenders: Mapping[str, None], device: torch.device, ceilings: Ceilings
) -> Iterator[Case]:
    """One case for every model."""
    if options.rows % options.micro_rows:
        raise UserError(f"rows = {options.rows} do not divide into micro-batches of micro_rows = {options.micro_rows}")
    for name in options.model:
        model = model_config(options, name, options.length)
        if model.num_experts % options.ranks:
            raise UserError(f"{model.num_experts} experts do not divide evenly over ranks = {options.ranks}")
        measured = on_ranks(_ours, options.ranks, options, model, device.type)
        found, failures = {OURS: _updates(measured, model, options, ceilings)}, {}
        for peer in contenders:
            try:  # in processes of its own, so that nobody has to give memory back
                theirs = on_ranks(_transformers, options.ranks, options, model, device.type)
            except Exception as error:  # a peer that cannot do it is a result
                failures[peer] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            else:
                found[peer] = _updates(theirs, model, options.model_copy(update={"document": 0}), ceilings)
        notes = () if measured.kernels is None else tuple(measured.kernels.lines("an update"))
        if options.profile is not None and measured.kernels is not None:
            options.profile.write_text(json.dumps(asdict(measured.kernels), indent=1) + "\n", encoding="utf-8")
        yield Case(_work(name, options), found, failures, notes)


def _work(name: str, options: PretrainOptions) -> str:
    documents = f", documents of {options.document:,} on average" if options.document else ""
    tokens = f"{options.rows} rows of {options.length:,} tokens a rank, {options.micro_rows} at once{documents}"
    recompute = ", activations computed again" if options.recompute else ""
    ranks = f"{options.ranks} rank{'s' * (options.ranks > 1)}, parallel={options.parallel}"
    return f"an update of {name}, {options.layers} layers, {ranks}: {tokens}{recompute}"


def _updates(measured: Measured, model: ModelConfig, options: PretrainOptions, ceilings: Ceilings) -> Updates:
    tokens, pairs = work_of(_batch(options, vocab_size(model), 0).documents_BS)
    seconds = measured.timing.median_ms / 1e3
    flops = training_flops(model, tokens, pairs)
    peak = None if measured.peak is None else measured.peak / GIB
    return Updates(measured.timing, tokens / seconds, flops / seconds / (ceilings.tflops * 1e12), peak)


def _batch(options: PretrainOptions, vocabulary: int, rank: int) -> TrainBatch:
    """A rank's rows."""
    return random_rows(options.rows, options.length, vocabulary, options.seed + rank, options.document)


# ---------------------------------------------------------------- on a rank


def _ours(world: World, options: PretrainOptions, model: ModelConfig) -> Measured:
    from trainer.step import Trainer  # here, since the other benchmarks do without DeepSpeed

    spec = trainer_spec(model, world.device, options.micro_rows, options.seed, batch_invariant=False)
    parallel = read_group("parallel", options.parallel, ParallelConfig)
    trainer = Trainer(replace(spec, parallel=parallel, recompute=options.recompute), world)
    keep_imports()  # as the ranks of a run do
    batch = _batch(options, vocab_size(model), world.rank)

    def update(_: int) -> object:
        return trainer.learn(batch, cross_entropy, LEARNING_RATE)

    measured = _timed(OURS, update, options, world)
    return replace(measured, kernels=_profiled(update, world)) if options.profile is not None else measured


def _transformers(world: World, options: PretrainOptions, model: ModelConfig) -> Measured:
    peer = transformers_model(model, world.device, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in peer.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(peer, mp_policy=policy)
    if options.recompute:
        peer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(peer.parameters(), LEARNING_RATE, (0.9, 0.98), 1e-8, 0.0, fused=True)
    tokens = _batch(options, vocab_size(model), world.rank).tokens_BS.to(world.device)
    micros = tokens.split(options.micro_rows)

    def update(_: int) -> object:
        for number, micro in enumerate(micros):
            peer.set_requires_gradient_sync(number == len(micros) - 1)
            (peer(micro, labels=micro, use_cache=False).loss / len(micros)).backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm.full_tensor())  # type: ignore[attr-defined]  # as a training loop looks at it

    return _timed("transformers", update, options, world)


def _timed(name: str, update: Call, options: PretrainOptions, world: World) -> Measured:
    timing = slowest({name: update}, world, options.repeats or REPEATS)[name]
    return Measured(timing, torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None)


def _profiled(update: Call, world: World) -> KernelTimes | None:
    """Of one more update, on rank 0."""
    if world.rank > 0:
        update(0)
        return None
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        update(0)  # which ends with a number that the host waits for
    with TemporaryDirectory() as folder:
        events = Path(folder) / "events.json"
        profiler.export_chrome_trace(str(events))
        return kernel_times(json.loads(events.read_text(encoding="utf-8"))["traceEvents"])


# ---------------------------------------------------------------- what is shown


def table(case: Case) -> Table:
    shown = Table(title=case.work, title_justify="left")
    for name in ("", "ms", "tokens/s per GPU", "ours over it", "of ceiling", "peak GiB"):
        shown.add_column(name, justify="right" if name else "left")
    ours = case.updates[OURS].tokens_per_second
    for name, one in case.updates.items():
        ratio = "" if name == OURS else f"{ours / one.tokens_per_second:.2f}x"
        peak = "" if one.peak_gib is None else f"{one.peak_gib:.1f}"
        rate = f"{one.tokens_per_second:,.0f}"
        shown.add_row(name, f"{one.time.median_ms:.1f}", rate, ratio, f"{one.of_ceiling:.1%}", peak)
    return shown
