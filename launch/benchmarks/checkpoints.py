"""`python -m launch.bench checkpoints`: what a checkpoint costs the steps around it.

Ranks learn as in pretraining. In turns they make `every` updates without a checkpoint, after one on the disk, and after one
in the memory of this machine (trainer/checkpoint_writer.py). A turn ends when its checkpoint is complete, because the next one
would wait for that. So its cost includes not only the time that training stands still, but also what its copy, files and
checksums take of cores, links and disk meanwhile. Ray calls, and sending files to another node, are not included.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import Field, PositiveInt
from rich.table import Table

from kernels.errors import UserError
from launch.benchmarks.models import ModelOptions, model_config, random_rows, trainer_spec
from launch.benchmarks.ranks import on_ranks
from launch.benchmarks.timing import Ceilings
from parallel.topology import World
from trainer.batch import TrainBatch, cross_entropy
from trainer.checkpoint import CheckpointMeta
from trainer.checkpoint_files import folder_name
from trainer.estimate import vocab_size

if TYPE_CHECKING:
    from trainer.checkpoint_writer import Writer
    from trainer.worker import TrainWorker

LEARNING_RATE = 1e-4
ROUNDS = 5
ALLOWED = 0.03  # of the time of the steps
WAYS = ("none", "disk", "memory")


class CheckpointsOptions(ModelOptions):
    ranks: PositiveInt = Field(2, description="one on each GPU, or processes on a CPU")
    rows: PositiveInt = Field(description="of an update, each rank")
    micro_rows: PositiveInt = Field(description="rows that a rank takes through the model at once")
    length: PositiveInt = Field(description="tokens of a row")
    every: PositiveInt = Field(description="updates from one checkpoint to the next")
    folder: Path = Field(Path(), description="on the disk that checkpoints go to")


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {
        "model": "moe_2b", "layers": 8, "heads": 16, "kv_heads": 8, "head_dim": 64, "rows": 16, "micro_rows": 4, "length": 4096,
        "every": 20,
    },
    "cpu": {
        "model": "tiny", "hidden": 256, "expert_hidden": 512, "vocabulary": 8192, "layers": 4, "heads": 4, "kv_heads": 2,
        "head_dim": 64, "rows": 4, "micro_rows": 1, "length": 256, "every": 5,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """`every` updates, and more until its checkpoint is whole; NaN where there was none."""

    updates: int
    seconds: float
    paused_s: float  # that the slowest rank stood still
    whole_s: float  # until all files were there


@dataclass(frozen=True)
class Measured:
    nbytes: int  # of the state of rank 0
    turns: Mapping[str, tuple[Turn, ...]]  # way -> of each round


@dataclass(frozen=True)
class Cost:
    """Of one way; medians over the rounds."""

    work: str
    way: str
    nbytes: int  # that a rank writes
    step_s: float  # of an update without checkpoints
    paused_s: float
    whole_s: float
    costs_s: tuple[float, ...]  # by which the updates took longer, in each round
    every: int
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def cost_s(self) -> float:
        return median(self.costs_s)

    @property
    def share(self) -> float:
        return self.cost_s / (self.every * self.step_s)

    @property
    def least_every(self) -> int:
        """Updates from one checkpoint to the next at which they cost ALLOWED of the time, and one is whole before the next."""
        return max(1, math.ceil(self.cost_s / (ALLOWED * self.step_s)), math.ceil(self.whole_s / self.step_s))


def measure(
    options: CheckpointsOptions, contenders: Mapping[str, Any], device: torch.device, ceilings: Ceilings
) -> Iterator[Cost]:
    """A case for every model and way."""
    from trainer.keeper import SHARED_MEMORY  # here, because other benchmarks start without Ray
    from trainer.worker import check_division

    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # as ranks of a run have it
    for name in options.model:
        check_division(model_config(options, name, options.length), options.rows * options.ranks, options.ranks)
        with (
            TemporaryDirectory(dir=options.folder, prefix="bench-checkpoints-") as disk,
            TemporaryDirectory(dir=SHARED_MEMORY, prefix="bench-checkpoints-") as memory,
        ):
            found = on_ranks(_turns, options.ranks, options, (name, Path(disk), Path(memory)), device.type)
        alone = found.turns["none"]
        tokens = options.rows * options.ranks * options.length
        work = f"checkpoints of {name} with {options.layers} layers, {options.ranks} ranks, updates of {tokens:,} tokens"
        for way in WAYS[1:]:
            turns = found.turns[way]
            undisturbed = (turn.updates * without.seconds / options.every for turn, without in zip(turns, alone, strict=True))
            yield Cost(
                work=work,
                way=way,
                nbytes=found.nbytes,
                step_s=median(turn.seconds for turn in alone) / options.every,
                paused_s=median(turn.paused_s for turn in turns),
                whole_s=median(turn.whole_s for turn in turns),
                costs_s=tuple(turn.seconds - seconds for turn, seconds in zip(turns, undisturbed, strict=True)),
                every=options.every,
            )


def _turns(world: World, options: CheckpointsOptions, told: tuple[str, Path, Path]) -> Measured:
    """The first round connects, compiles and asks for memory, and does not count."""
    from trainer.kept_checkpoints import MemoryShelf
    from trainer.worker import TrainWorker

    name, disk, memory = told
    model = model_config(options, name, options.length)
    worker = TrainWorker(world.rank)
    worker.world = world
    worker.build(trainer_spec(model, world.device, options.micro_rows, options.seed, batch_invariant=False))
    worker.open_memory([MemoryShelf("here", memory, leads=rank == 0, next=None) for rank in range(world.size)])
    batch = random_rows(options.rows * world.size, options.length, vocab_size(model), options.seed)
    learner = _Learner(worker, batch, disk, model.model_dump(mode="json"))
    turns: dict[str, list[Turn]] = {way: [] for way in WAYS}
    for number in range(1 + (options.repeats or ROUNDS)):
        first = number % len(WAYS)
        for way in WAYS[first:] + WAYS[:first]:
            turns[way].append(learner.turn(way, options.every))
    size = sum(tensor.nbytes for _, tensor in worker.trainer.state_to_save(with_moments=True))
    return Measured(size, {way: tuple(found[1:]) for way, found in turns.items()})


class _Learner:
    """A rank, and where its checkpoints go."""

    def __init__(self, worker: TrainWorker, batch: TrainBatch, disk: Path, model: Mapping[str, Any]) -> None:
        assert worker.memory is not None
        self._worker, self._batch, self._disk, self._model = worker, batch, disk, dict(model)
        self._writers = {"disk": worker.writer, "memory": worker.memory[1]}

    def turn(self, way: str, least: int) -> Turn:
        """What is left to write then takes nothing from updates, so what it costs is theirs."""
        worker, writer, updates = self._worker, self._writers.get(way), 0
        self._meet()
        started = time.perf_counter()
        paused_s = math.nan if writer is None else self._begin(way)
        while updates < least or self._writing(writer):
            worker.learn(self._batch, cross_entropy, LEARNING_RATE)
            updates += 1
        if writer is not None and (failure := writer.settle()) is not None:
            raise UserError(failure)
        self._meet()
        seconds, paused = time.perf_counter() - started, [paused_s] * worker.world.size
        if worker.world.size > 1:
            dist.all_gather_object(paused, paused_s)
        return Turn(updates, seconds, max(paused), math.nan if writer is None else writer.took_s)

    def _writing(self, writer: Writer | None) -> bool:
        """Whether any rank is."""
        world = self._worker.world
        return writer is not None and float(world.sum(torch.tensor(float(writer.busy), device=world.device))) > 0

    def _begin(self, way: str) -> float:
        """Seconds that this rank stood still."""
        worker, step = self._worker, self._worker.trainer.updates
        meta = CheckpointMeta("pretrain", step, step, self._model, "unknown", {})
        if way == "disk":
            return worker.save(self._disk / folder_name(step), meta, {}, keep=1)[0]
        saved = worker.save_in_memory(meta, {})
        assert saved.paused_s is not None, "the one before is whole"
        return saved.paused_s

    def _meet(self) -> None:
        if self._worker.world.device.type == "cuda":
            torch.cuda.synchronize()
        self._worker.world.barrier()


def table(case: Cost) -> Table:
    shown = Table(title=case.work, title_justify="left")
    shown.add_column("checkpoints")
    for name in (
        *("MiB a rank", "update s", "stands still s", "whole after s", "cost s", "(from", "to)"),
        *(f"of {case.every} updates", f"{ALLOWED:.0%} if every"),
    ):
        shown.add_column(name, justify="right")
    costs = (f"{seconds:.3f}" for seconds in (case.cost_s, min(case.costs_s), max(case.costs_s)))
    times = (f"{seconds:.3f}" for seconds in (case.step_s, case.paused_s, case.whole_s))
    where = {"disk": "on the disk", "memory": "in memory"}[case.way]
    shown.add_row(where, f"{case.nbytes / 2**20:,.0f}", *times, *costs, f"{case.share:.1%}", f"{case.least_every:,} updates")
    return shown
