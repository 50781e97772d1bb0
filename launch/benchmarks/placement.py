"""Placement policies on the same load traces, for clusters that you do not have: predicted times of one MoE layer.

Every system keeps its own policy and its own timing of plans and weights:

    cost                  plans ahead from the last steps; copies travel under the attention
    cost+gate             plans again after the gate, and waits for other copies where that pays
    cost+gate+owners      also plans new owners every few steps
    hecate                plans ahead from the mean of the last steps, and moves owners likewise
    eplb                  plans ahead from that mean, and packs owners again every few steps, with their optimizer state
    laer                  plans ahead from the last step; every expert is sharded over all devices, and any device restores the
                          experts that it needs by an all-to-all of equal size, whatever the plan (FSEP)
    faster_moe, llep      plan after the gate, from the true loads; weights are waited for
    plain                 no copies

The same for all: first owners, dispatch of tokens (except that eplb and llep split entries alike everywhere), transport (two
levels over nodes of several devices), room for copies, and the model of time (parallel/layer_cost.py). A policy that plans
after the gate waits as long as planning takes here.

Letters: L layers, E experts, D devices, G devices of a node, S steps of a trace.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from rich.table import Table

from launch.benchmarks import two_gpus
from launch.benchmarks.options import Listed, OneOrMore, Shape, TokenOptions
from launch.benchmarks.timing import Ceilings
from launch.benchmarks.traces import DRAWN, draw, recorded
from launch.machines import MachineName, layer_costs, read_machine
from parallel.expert_shards import exchanges
from parallel.flows import Plan, device_loads, flows, imbalance
from parallel.layer_cost import LayerCosts, LayerTime, Setting, copy_times, hidden_copies, layer_time, pass_times
from parallel.materialisation import WINDOW
from parallel.placement import Budget, Floats, Ints, Placement, Topology, even_owners, without_copies
from parallel.planning import predict, reshard
from parallel.policies import POLICIES, calibrated
from parallel.transport import auto_kind

SEQUENCE = 4096  # tokens of a row, for the attention's time
STATES = 3  # masters and moments, each as large as a gradient in float32
Trace = Literal["zipf", "drift", "burst", "settling"]


@dataclass(frozen=True)
class System:
    window: int  # steps whose mean load it plans from; 0: the true loads, after the gate
    policy: str | None = None  # where it is not of the same name
    predicts: bool = False  # from jumping loads too, instead of by the mean
    calibrates: bool = False  # after the gate
    sharded: bool = False  # experts are cut over all devices
    owners: Literal["stay", "reshard", "pack"] = "stay"


SYSTEMS: Mapping[str, System] = {
    "cost+gate+owners": System(WINDOW, "cost", predicts=True, calibrates=True, owners="reshard"),
    "cost+gate": System(WINDOW, "cost", predicts=True, calibrates=True),
    "cost": System(WINDOW, predicts=True),
    "hecate": System(WINDOW, owners="reshard"),
    "eplb": System(WINDOW, owners="pack"),
    "laer": System(1, sharded=True, owners="pack"),
    "faster_moe": System(0),
    "llep": System(0),
    "plain": System(WINDOW),
}
BASELINE = "plain"
PARTS = ("products", "tokens", "weights", "sums", "gate", "owners")  # of `Spent`


class PlacementOptions(TokenOptions):
    hidden: PositiveInt | None = None
    expert_hidden: PositiveInt | None = None
    experts: PositiveInt | None = None
    top_k: PositiveInt | None = None
    machine: OneOrMore[MachineName] = Field(description="of conf/machine")
    devices: OneOrMore[PositiveInt]
    per_node: PositiveInt = Field(8, description="devices of a node, where there are this many")
    memory: PositiveInt = Field(description="copies that a device has room for")
    trace: Listed[Trace] = Field(description="how loads are drawn; none where a run is replayed")
    run: Path | None = Field(None, description="the folder of a run, whose recorded loads are replayed too")
    steps: int = Field(ge=2, description="of each drawn trace; what the first has is where plans begin")
    layers: PositiveInt = Field(description="of each drawn trace, with popular experts of their own")
    reshard_every: NonNegativeInt = Field(description="steps from one look at who should own what to the next; 0: never")

    @model_validator(mode="after")
    def _there_is_something_to_replay(self) -> Self:
        if not self.trace and self.run is None:
            raise ValueError(f"trace names no loads to replay; give some of {', '.join(DRAWN)}, or run=FOLDER")
        return self


_BOTH: Mapping[str, Any] = {
    "model": "qwen3_30b_a3b", "tokens": "16384", "machine": "h200,a100", "devices": "8,64,256,1024", "memory": 4,
    "trace": "zipf,drift,burst,settling", "steps": 15, "layers": 8, "reshard_every": 5,
}  # fmt: skip
DEFAULTS: Mapping[str, Mapping[str, Any]] = {"cuda": _BOTH, "cpu": _BOTH}


@dataclass(frozen=True)
class Spent(LayerTime):
    """Seconds of one layer in one step."""

    planning_s: float  # after the gate
    owners_s: float  # their move, its part of the step's

    @property
    def total_s(self) -> float:
        return super().total_s + self.planning_s + self.owners_s


@dataclass(frozen=True)
class Replayed:
    """One policy over all steps of a trace."""

    times: list[Spent]  # of each step and layer
    imbalance: float  # mean over them
    copies: int  # most on a device
    planning_ms: float  # of a layer, median
    owners_moved: int

    @property
    def seconds(self) -> list[float]:
        return [step.total_s for step in self.times]


@dataclass(frozen=True)
class PlacementCase:
    """One machine and size: policy -> trace -> what came out."""

    work: str
    sizes: dict[str, int | str]
    replayed: dict[str, dict[str, Replayed]]
    failures: Mapping[str, str]
    notes: Sequence[str]


def measure(
    options: PlacementOptions, contenders: Mapping[str, None], device: torch.device, ceilings: Ceilings
) -> Iterator[PlacementCase]:
    """One case for every model, machine, number of devices and of tokens. Nothing runs on the device itself."""
    for name, shape in options.shapes().items():
        for machine in options.machine:
            for tokens in options.tokens:
                for devices in options.devices:
                    yield _case(options, name, shape, machine, tokens, devices)


def _case(options: PlacementOptions, model: str, shape: Shape, machine: str, tokens: int, devices: int) -> PlacementCase:
    entries = tokens * shape.top_k * devices
    random = np.random.default_rng(options.seed)
    traces: dict[str, Floats] = {}
    for trace in options.trace:
        layers = [draw(trace, options.steps, shape.experts, entries, shape.top_k, random) for _ in range(options.layers)]
        traces[trace] = np.stack(layers, axis=1)
    if options.run is not None:
        traces["run"] = recorded(options.run, entries)
    topology = Topology(devices, options.per_node if devices % options.per_node == 0 else 1)
    costs = costs_of(machine, shape, tokens)
    budget = Budget(hidden_copies(costs, topology.nodes), options.memory)
    kind = auto_kind(topology, in_reach=topology.nodes == 1)
    setting = Setting(topology, shape.top_k, budget, False, costs, kind)
    setting = replace(setting, costs=replace(costs, planning_s=_planning_s(next(iter(traces.values()))[-1, 0], setting)))
    replayed = {
        policy: {name: replay(policy, loads_SLE, setting, options.reshard_every) for name, loads_SLE in traces.items()}
        for policy in SYSTEMS
    }
    where = f"{devices:,} x {machine} in {topology.nodes} node{'s' if topology.nodes > 1 else ''}"
    work = f"MoE layer of {model}, {tokens:,} tokens a device, {where}, room for {options.memory} copies: predicted"
    sizes = {"model": model, **vars(shape), "tokens": tokens, "machine": machine, "devices": devices, "memory": options.memory}
    return PlacementCase(work, sizes, replayed, {}, [two_gpus.told()])


def costs_of(machine: str, shape: Shape, tokens: int) -> LayerCosts:
    """What a layer of this shape costs there, with as many heads as fill the hidden size."""
    attention = 8 * shape.hidden**2 + 2 * SEQUENCE * shape.hidden
    return layer_costs(read_machine(machine), shape.hidden, shape.expert_hidden, tokens * attention)


def _planning_s(loads_E: Floats, setting: Setting) -> float:
    """What our plan of a layer after its gate takes here, the least of a few."""
    bare, taken = Plan(without_copies(owners(len(loads_E), setting.topology.devices), setting.topology.devices)), []
    for _ in range(3):
        started = time.process_time()
        calibrated(bare, loads_E, setting)
        taken.append(time.process_time() - started)
    return min(taken)


def replay(name: str, loads_SLE: Floats, setting: Setting, reshard_every: int = 0) -> Replayed:
    """Plans every step from what is known before it, and times the plan under the step's own loads."""
    system, (_, layers, experts) = SYSTEMS[name], loads_SLE.shape
    owner_LE = first_owners(layers, experts, setting.topology.devices)
    times, planning, uneven, copies, moved = [], [], [], 0, 0
    for step, loads_LE in enumerate(loads_SLE):
        past_SLE = loads_SLE[max(step - system.window, 0) : step] if system.window else loads_LE[None]
        if step == 0 and system.window:
            continue  # nothing is known yet
        expected_LE = predict(past_SLE) if system.predicts else past_SLE.mean(axis=0)
        before_LE, moves_s = owner_LE, 0.0
        if system.sharded or (reshard_every and step % reshard_every == 0):
            owner_LE = _new_owners(name, expected_LE, owner_LE, setting)
        if not system.sharded:  # there nobody owns a whole expert
            moved += int((owner_LE != before_LE).sum())
            moves_s = moving_time(before_LE, owner_LE, setting)
        started = time.process_time()
        plans = POLICIES[system.policy or name](expected_LE, owner_LE, setting)
        ahead_s = (time.process_time() - started) / layers
        for loads_E, plan in zip(loads_LE, plans, strict=True):
            started, before = time.process_time(), plan.placement
            if system.calibrates:
                plan = calibrated(plan, loads_E, setting)
            behind_s = time.process_time() - started if system.calibrates else 0.0
            planning.append(ahead_s + behind_s)
            behind_s += 0.0 if system.window else ahead_s
            time_there = _timed(system, plan, before, loads_E, setting)
            times.append(Spent(**vars(time_there), planning_s=behind_s, owners_s=moves_s / layers))
            uneven.append(imbalance(device_loads(plan, setting.topology, loads_E)))
            copies = max(copies, int(plan.placement.extra_D.max()))
    return Replayed(times, statistics.mean(uneven), copies, 1e3 * statistics.median(planning), moved)


# ---------------------------------------------------------------- owners


def owners(experts: int, devices: int) -> Ints:
    """Equal consecutive shares; with more devices than experts, spread evenly."""
    return even_owners(experts, devices) if experts % devices == 0 else np.arange(experts) * devices // experts


def first_owners(layers: int, experts: int, devices: int) -> Ints:
    """(L, E): in each layer as `owners`, where experts do not divide evenly one device further on from layer to layer."""
    shift = 1 if experts % devices else 0
    return np.stack([(owners(experts, devices) + shift * layer) % devices for layer in range(layers)])


def _new_owners(name: str, loads_LE: Floats, owner_LE: Ints, setting: Setting) -> Ints:
    """The present ones where each device does not own equally many experts over all layers: their state would not fit."""
    system, (layers, experts), devices = SYSTEMS[name], owner_LE.shape, setting.topology.devices
    uneven = len(np.unique(np.bincount(owner_LE.ravel(), minlength=devices))) > 1
    if system.owners == "stay" or (uneven and not system.sharded):
        return owner_LE
    if system.owners == "reshard":
        plan = partial(POLICIES[system.policy or name], setting=setting)
        return reshard(loads_LE, owner_LE, setting.topology, setting.budget.overlap, plan)[0]
    return np.stack([packed_owners(loads_LE[layer], devices, first=layer * experts) for layer in range(layers)])


def packed_owners(loads_E: Floats, devices: int, first: int = 0) -> Ints:
    """As EPLB packs: the most loaded first, each to the least loaded device that has room, all with as much; where equal, to
    the next one from `first` on."""
    owner_E, heap = np.zeros(len(loads_E), dtype=np.int64), [(0.0, place, 0) for place in range(devices)]
    heapify(heap)
    for expert in np.argsort(-loads_E, kind="stable").tolist():
        load, place, owned = heappop(heap)
        owner_E[expert] = (place + first) % devices
        if owned + 1 < -(-len(loads_E) // devices):
            heappush(heap, (load + loads_E[expert], place, owned + 1))
    return owner_E


def moving_time(old_LE: Ints, new_LE: Ints, setting: Setting) -> float:
    """Seconds in which experts move to new owners with all their state, in the rounds of `ExpertShards.reshard`."""
    costs, seconds = setting.costs, 0.0
    for moves in exchanges(old_LE, new_LE):
        near = all(setting.topology.node_of(move.source) == setting.topology.node_of(move.target) for move in moves)
        link = costs.within if near else costs.across
        seconds += link.latency_s + STATES * costs.sum_bytes * link.byte_s
    return seconds


# ---------------------------------------------------------------- time


def _timed(system: System, plan: Plan, before: Placement, loads_E: Floats, setting: Setting) -> LayerTime:
    costs, topology = setting.costs, setting.topology
    if system.sharded:
        restored = (len(loads_E) / topology.devices + setting.budget.memory) * costs.expert_bytes / topology.devices
        near = topology.devices_per_node - 1
        within_s = costs.within.latency_s + near * restored * costs.within.byte_s if near else 0.0
        far = topology.devices - near - 1
        across_s = costs.across.latency_s + far * restored * costs.across.byte_s if far else 0.0
        each_s = max(within_s, across_s)
        waited_s = max(each_s - costs.attention_s, 0.0) + max(each_s - 2 * costs.attention_s, 0.0)
        sums_s = restored / costs.expert_bytes * topology.devices * costs.sum_s
        products_s, tokens_s = pass_times(flows(plan, topology, loads_E), setting)
        return LayerTime(float(products_s), float(tokens_s), waited_s, sums_s)
    if system.window == 0:
        return layer_time(plan, loads_E, setting, present=without_copies(before.owner_E, topology.devices))
    if not system.calibrates:
        return layer_time(plan, loads_E, setting)
    # What was planned ahead has been fetched all the same, and what of that did not fit under the attention was waited for.
    gather_s = copy_times(before, topology, costs).gather_s
    found = layer_time(plan, loads_E, setting, present=before)
    return replace(found, weights_s=found.weights_s + max(gather_s - costs.attention_s, 0.0))


def table(case: PlacementCase) -> Table:
    """A line a policy: geometric mean and worst over all traces and steps, then each trace, then where the time goes."""
    shown = Table(title=case.work, title_justify="left")
    shown.add_column("policy")
    traces = list(next(iter(case.replayed.values())))
    listed = traces if len(traces) <= 6 else []
    names = ["ms", "worst", "over plain", *listed, *PARTS, "imbalance", "copies", "moved", "planning ms"]
    for name in names:
        shown.add_column(name, justify="right")
    baseline = _mean_ms(case.replayed[BASELINE].values())
    for policy, by_trace in case.replayed.items():
        every = [step for replayed in by_trace.values() for step in replayed.times]
        mean_ms = _mean_ms(by_trace.values())
        parts = np.mean([astuple(step) for step in every], axis=0).tolist()
        shown.add_row(
            policy,
            f"{mean_ms:.2f}",
            f"{1e3 * max(step.total_s for step in every):.2f}",
            f"{baseline / mean_ms:.2f}x",
            *(f"{_mean_ms([by_trace[name]]):.2f}" for name in listed),
            *(f"{1e3 * part:.2f}" for part in parts),
            f"{statistics.mean(replayed.imbalance for replayed in by_trace.values()):.2f}",
            f"{max(replayed.copies for replayed in by_trace.values())}",
            f"{sum(replayed.owners_moved for replayed in by_trace.values()):,}",
            f"{statistics.mean(replayed.planning_ms for replayed in by_trace.values()):.2f}",
        )
    return shown


def _mean_ms(replayed: Any) -> float:
    return 1e3 * statistics.geometric_mean([seconds for one in replayed for seconds in one.seconds])
