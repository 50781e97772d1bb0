"""Collectives that move experts and tokens between the ranks of this machine, against the library's own collectives.

    link          one message with the same number of bytes to the next rank, and one from the previous rank
    all_gather    the library's: every rank receives the same number of experts from every other rank
    all_to_all    the library's, for the same number of bytes of tokens, evenly to all ranks
    gather        SparseAllGather: every rank receives that many experts from the next one
    reduce        SparseReduceScatter of their gradients, and their sum at the owner in float32
    .. in place   the same in memory that all ranks read, where they can

A rate is what the slowest rank receives in a second; it sends as much at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field, PositiveInt
from rich.table import Table

from kernels.accumulate import accumulate
from kernels.errors import UserError
from launch.benchmarks.options import OneOrMore, Options, Shape
from launch.benchmarks.ranks import on_ranks, slowest
from launch.benchmarks.timing import Call, Ceilings, Timing
from parallel.expert_arena import ExpertShape
from parallel.hooks import NONE
from parallel.peer_memory import within_reach
from parallel.placement import Placement, TransportKind, even_owners, without_copies
from parallel.sparse_collectives import Pending
from parallel.topology import World
from parallel.transport import transport


class CollectivesOptions(Options):
    hidden: PositiveInt | None = None
    expert_hidden: PositiveInt | None = None
    experts: PositiveInt | None = None
    copies: OneOrMore[PositiveInt] = Field(description="experts that each rank gets from the next one")
    ranks: PositiveInt = Field(2, description="one on each GPU, or processes on a CPU")


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {"model": "qwen3_30b_a3b", "copies": "1,4,16,32"},
    "cpu": {"model": "tiny", "hidden": 512, "expert_hidden": 512, "copies": "1,4"},
}


@dataclass(frozen=True)
class Moved:
    """One way of moving bytes."""

    time: Timing
    received_bytes: int  # by each rank

    @property
    def gbytes(self) -> float:
        """GB/s."""
        return self.received_bytes / self.time.median_ms / 1e6


@dataclass(frozen=True)
class CollectivesCase:
    work: str
    sizes: dict[str, int | str]
    moved: dict[str, Moved]
    failures: Mapping[str, str]
    notes: tuple[str, ...] = ()


def measure(
    options: CollectivesOptions, contenders: Mapping[str, None], device: torch.device, ceilings: Ceilings
) -> Iterator[CollectivesCase]:
    """One case for every model and number of copies."""
    if options.ranks == 1:
        raise UserError("ranks = 1 leaves no rank to send to; give 2 or more")
    for name, shape in options.shapes().items():
        for copies in options.copies:
            if shape.experts % options.ranks or copies > shape.experts // options.ranks:
                raise UserError(f"copies = {copies}: {options.ranks} ranks own fewer of {shape.experts} experts each")
            moved = on_ranks(_measured, options.ranks, options, (shape, copies), device.type)
            size = 3 * shape.hidden * shape.expert_hidden * (2 if device.type == "cuda" else 4)
            work = f"{copies} of {name}'s experts ({size / 2**20:.1f} MiB each) to each of {options.ranks} ranks"
            yield CollectivesCase(work, {"model": name, **vars(shape), "copies": copies, "ranks": options.ranks}, moved, {})


def table(case: CollectivesCase) -> Table:
    shown = Table(title=case.work, title_justify="left")
    shown.add_column("operation")
    for column in ("MiB received", "ms", "GB/s", "of link"):
        shown.add_column(column, justify="right")
    for name, moved in case.moved.items():
        share = moved.gbytes / case.moved["link"].gbytes
        size = f"{moved.received_bytes / 2**20:.1f}"
        shown.add_row(name, size, f"{moved.time.median_ms:.3f}", f"{moved.gbytes:.4g}", f"{share:.0%}")
    return shown


def _measured(world: World, options: CollectivesOptions, told: tuple[Shape, int]) -> dict[str, Moved]:
    shape, copies = told
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    expert_shape = ExpertShape(1, shape.experts, shape.hidden, shape.expert_hidden)
    placement = _from_next(shape.experts, world.size, copies)
    size = copies * sum(math.prod(part) for part in expert_shape.parts) * dtype.itemsize
    sent, received = (torch.zeros(size, dtype=torch.uint8, device=world.device) for _ in range(2))
    everything = [torch.empty_like(sent) for _ in range(world.size)]
    target, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    equal = size // world.size * world.size
    calls: dict[str, Call] = {
        "link": lambda number: Pending([dist.P2POp(dist.isend, sent, target), dist.P2POp(dist.irecv, received, source)]).wait(),
        "all_gather": lambda number: dist.all_gather(everything, sent),
        "all_to_all": lambda number: dist.all_to_all_single(received[:equal], sent[:equal]),
    }
    kinds: tuple[TransportKind, ...] = ("messages", "peer_memory") if within_reach(world) else ("messages",)
    for kind in kinds:
        suffix = " in place" if kind == "peer_memory" else ""
        ways = _gather_and_reduce(world, expert_shape, placement, dtype, kind)
        calls |= dict(zip((f"gather{suffix}", f"reduce{suffix}"), ways, strict=True))
    times = slowest(calls, world, options.repeats, together=True)
    others = (world.size - 1) * size
    bytes_of = {"all_gather": others, "all_to_all": others // world.size}
    return {name: Moved(timing, bytes_of.get(name, size)) for name, timing in times.items()}


def _gather_and_reduce(
    world: World, shape: ExpertShape, placement: Placement, dtype: torch.dtype, kind: TransportKind
) -> tuple[Call, Call]:
    owned = shape.experts // world.size
    present = np.flatnonzero(placement.copies_ED[:, world.rank]).tolist()
    own = [expert for expert in present if placement.owner_E[expert] == world.rank]
    slot = {expert: row for row, expert in enumerate(own + [expert for expert in present if expert not in own])}
    there = transport(world, shape.hidden, len(present), shape.parts, dtype, kind, NONE)
    movement = there.movement(placement, np.arange(shape.experts) % owned)
    there.expect_gradients(int(placement.extra_D.max()))
    gradients, sums = (shape.matrices(len(present), one, world.device) for one in (dtype, torch.float32))
    for part in (*there.rows, *gradients, *sums):
        part.zero_()

    def gather(number: int) -> None:
        there.quiesce()
        movement.gather(slot).finish()

    def reduce(number: int) -> None:
        for expert, arrived in movement.reduce(gradients, slot).finish():
            for total, part in zip(sums, arrived, strict=True):
                accumulate(total[slot[expert] : slot[expert] + len(part)], part)

    return gather, reduce


def _from_next(experts: int, ranks: int, copies: int) -> Placement:
    """Every rank has copies of the first experts of the next rank."""
    owner_E = even_owners(experts, ranks)
    copies_ED = without_copies(owner_E, ranks).copies_ED
    for rank in range(ranks):
        first = (rank + 1) % ranks * (experts // ranks)
        copies_ED[first : first + copies, rank] = True
    return Placement(owner_E, copies_ED)
