"""Schedules of MoE layers: measured on the ranks of this machine (chunks.py); and predicted (planned.py), ours against none,
against fixed degrees and against FSMoE's closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.table import Table

from kernels.errors import UserError
from launch.benchmarks.chunks import AroundName, Found, Told, measure_layers
from launch.benchmarks.hosts import HOSTS, hosts
from launch.benchmarks.options import ModelName, OneOrMore, Options
from launch.benchmarks.planned import (
    MODELS,
    TESTBEDS,
    Compared,
    OwnLayers,
    ScheduleCase,
    TestbedName,
    gradients_case,
    grid_case,
    own_layers_case,
)
from launch.benchmarks.ranks import on_ranks
from launch.benchmarks.timing import Ceilings
from launch.machines import MachineName
from parallel.schedule.pipeline import MOST_CHUNKS


class ScheduleOptions(Options):
    ranks: NonNegativeInt = Field(2, description="that run a layer: one on each GPU, or processes on a CPU; 0 runs none")
    layer: ModelName = Field(description="that the ranks run")
    rank_tokens: OneOrMore[PositiveInt] = Field(description="of each rank")
    rank_layers: PositiveInt = Field(4, description="that the ranks run, one after the other")
    around: OneOrMore[AroundName] = Field(
        ("nothing", "attention", "gradients"),
        description="each MoE layer that ranks run: nothing; attention, norms and router; or these and the average of their "
        "gradients over the ranks",
    )
    hidden: PositiveInt | None = None
    expert_hidden: PositiveInt | None = None
    experts: PositiveInt | None = None
    top_k: PositiveInt | None = None
    length: PositiveInt = Field(2048, description="tokens of a row, in its attention")
    link_mbit: PositiveInt | None = Field(
        None, description="CPU: ranks on two hosts, joined by a link of this many Mbit/s; as root"
    )
    within_mbit: PositiveInt | None = Field(
        None, description="of links within each host, with link_mbit; None: as fast as it is"
    )
    degrees: OneOrMore[Annotated[int, Field(ge=1, le=MOST_CHUNKS)]] = Field(
        (1, 2, 4, 8), description="that the ranks run beside the plan"
    )
    testbed: OneOrMore[TestbedName]
    every: PositiveInt = Field(description="takes each so manieth configuration of the grid")
    tokens: PositiveInt = Field(description="of a device, for our layers")
    machine: MachineName = Field(description="of conf/machine, for our layers")
    devices: PositiveInt = Field(description="for our layers")
    memory: PositiveInt = Field(description="copies that a device has room for, for our layers")
    layers: PositiveInt = Field(description="that are planned at once")


_BOTH: Mapping[str, Any] = {
    "model": "qwen3_235b_a22b", "testbed": "a,a_printed,b", "every": 1, "tokens": 16384, "machine": "h200", "devices": 1024,
    "memory": 4, "layers": 96,
}  # fmt: skip
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {**_BOTH, "layer": "qwen3_30b_a3b", "rank_tokens": "16384"},
    "cpu": {**_BOTH, "layer": "tiny", "rank_tokens": "2048"},
}


def measure(
    options: ScheduleOptions, contenders: Mapping[str, None], device: torch.device, ceilings: Ceilings
) -> Iterator[ScheduleCase]:
    """Layers that the ranks of this machine run. Then, predicted: for each testbed the grid and the models of the paper, and
    layers of our own."""
    if options.link_mbit and (device.type == "cuda" or options.ranks % HOSTS):
        raise UserError(f"link_mbit joins two hosts with as many ranks each, on a CPU; ranks = {options.ranks}, {device.type}")
    if options.within_mbit and not options.link_mbit:
        raise UserError(f"within_mbit={options.within_mbit} slows links within hosts that link_mbit joins, which is not given")
    if options.ranks:
        for tokens in options.rank_tokens:
            yield from _on_this_machine(options, tokens, device.type)
    for name in options.testbed:
        yield grid_case(name, TESTBEDS[name], options.every)
    for name in options.testbed:
        for model in MODELS:
            if name.startswith(model.testbed):
                yield gradients_case(name, TESTBEDS[name], model)
    own = OwnLayers(options.tokens, options.machine, options.devices, options.memory, options.layers, options.seed)
    for model_name, shape in options.shapes().items():
        yield own_layers_case(own, model_name, shape)


# ---------------------------------------------------------------- a layer on the ranks of this machine


WITH: Mapping[AroundName, str] = {
    "nothing": "",
    "attention": " with attention",
    "gradients": " with attention and the average of its gradients",
}


def _on_this_machine(options: ScheduleOptions, tokens: int, kind: str) -> Iterator[ScheduleCase]:
    shape = options.shape(options.layer)
    if shape.experts % options.ranks:
        raise UserError(f"{shape.experts} experts do not divide evenly over ranks = {options.ranks}")
    length = math.gcd(tokens, options.length)
    told = Told(shape, tokens, length, options.rank_layers, options.degrees, options.around, options.seed, options.repeats)
    with hosts(options.link_mbit, options.within_mbit) as names:
        found = on_ranks(measure_layers, options.ranks, told, None, kind, names)
    link = f" on two hosts, {options.link_mbit:,} Mbit/s between them" if options.link_mbit else ""
    link += f" and {options.within_mbit:,} within" if options.within_mbit else ""
    layers = f"{options.rank_layers} MoE layers" if options.rank_layers > 1 else "MoE layer"
    sizes: dict[str, int | str] = {
        "model": options.layer,
        "tokens": tokens,
        "ranks": options.ranks,
        "layers": options.rank_layers,
    }
    sizes |= {"hidden": shape.hidden, "expert_hidden": shape.expert_hidden}
    sizes |= {"link_mbit": options.link_mbit or 0, "within_mbit": options.within_mbit or 0}
    for around, one in found.items():
        work = f"{layers} of {options.layer}{WITH[around]}, {tokens:,} tokens a rank, {options.ranks} ranks{link}: measured"
        yield ScheduleCase(work, {**sizes, "around": around}, against_bound(one), {}, _notes(one))


def against_bound(found: Found) -> dict[str, Compared]:
    """What ran, then what no schedule can beat; the plan of the transport that training takes is the last."""
    ours = found.measured_ms[found.ours]
    compared = {}
    for name, ms in found.measured_ms.items():
        predicted = found.predicted_ms[name] / ms if name in found.predicted_ms else None
        compared[name] = Compared(ms / ours, ms / ours, float(ms <= 1.001 * ours), ms / 1e3, ms / found.bound_ms, predicted)
    for name, ms in found.alone_ms.items():
        compared[f"{name} alone"] = Compared(ms / ours, ms / ours, float(ms <= 1.001 * ours), ms / 1e3, ms / found.bound_ms)
    compared[found.ours] = compared.pop(found.ours)
    return compared


def _notes(found: Found) -> Sequence[str]:
    plans = ", ".join(f"{name} {chunks}" for name, chunks in found.planned.items())
    attention = f"; with {found.unshared_ms:.4g} ms of attention under which nothing travels it is {found.least_ms:.4g} ms"
    return [
        f"{plans}, forward and backward; the bound is {found.bound_ms:.4g} ms: computing alone, or communication alone, "
        f"whichever takes longer{attention if found.unshared_ms else ''}",
        *found.profiles,
    ]


def table(case: ScheduleCase) -> Table:
    """A line a schedule; ours is the last. Over several layers: the geometric mean, the worst, and how often it is as good. Of
    what was measured: how far it is from the bound, and what was predicted of it."""
    shown = Table(title=case.work, title_justify="left")
    shown.add_column("schedule")
    several = any(one.worst > one.geometric_mean * (1 + 1e-9) for one in case.compared.values())
    measured = any(one.over_bound is not None for one in case.compared.values())
    spread_names = ("at most", "as good in") if several else ()
    bound_names = ("over the bound", "predicted over measured") if measured else ()
    for name in ("plan is faster", *spread_names, *bound_names, "ms in all"):
        shown.add_column(name, justify="right")
    for system, one in case.compared.items():
        spread = (f"{one.worst:.2f}x", f"{one.as_good:.0%}") if several else ()
        bound = (_ratio(one.over_bound), _ratio(one.predicted)) if measured else ()
        shown.add_row(system, f"{one.geometric_mean:.3f}x", *spread, *bound, f"{1e3 * one.total_s:,.1f}")
    return shown


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
