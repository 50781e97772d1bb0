"""FSSDP from step to step: loads come in, placements go out (Hecate, arXiv 2502.02581, section 4).

The load of the next step is predicted by the mean of the last ones. From it every rank makes the same plan, with the same pure
functions, so only the loads are communicated. This happens while the device runs the backward pass of the update that these
loads are from (`ahead`), and takes effect once the update has been made (`take`). What the policies need to know of the machine
is measured once, after the first updates, and is part of a checkpoint, so a resumed run plans as before.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from parallel.expert_arena import Layout, copies_kept
from parallel.expert_shards import ExpertShards
from parallel.flows import Plan, device_loads, imbalance, shares
from parallel.layer_cost import NUMBERS, LayerCosts, Setting, hidden_copies
from parallel.placement import Budget, Floats, Ints, without_copies
from parallel.planning import predict, reshard
from parallel.policies import Policy, calibrated
from parallel.profiling import copies_that_fit, measure_costs
from parallel.stopwatch import Stopwatch

MIB = 2**20
WINDOW = 5  # steps whose mean load predicts the next (Hecate's w)
MEASURED_AFTER = 2  # updates; the first ones also compile, allocate and warm up
UNKNOWN = -1.0
log = logging.getLogger("tessera")


@dataclass(frozen=True)
class MaterialisationSettings:
    policy: Policy
    overlap: int | None  # the hottest experts of a layer that may be copied; None: as many as travel under the attention
    memory: int | None  # copies that a rank has room for in each layer; None: as many as fit and travel under the attention
    rematerialise: bool  # fetch copies again for the backward pass instead of keeping those of all layers
    reshard_every: int  # updates; 0 keeps the first owners
    calibrate: bool  # look at a layer's plan again when its gate has decided
    top_k: int


@dataclass(frozen=True)
class Next:
    """Of the next update."""

    owner_LE: Ints
    plans: list[Plan]
    layout: Layout


@dataclass(frozen=True)
class Ahead:
    """What the loads of an update say before it has been made."""

    loads_LE: Floats
    metrics: dict[str, float]
    next: Next


class Materialisation:
    """Plans where the experts of `shards` lie. All ranks hold one and tell it the same loads."""

    def __init__(self, shards: ExpertShards, settings: MaterialisationSettings) -> None:
        self.shards, self.settings = shards, settings
        self.loads: deque[Floats] = deque(maxlen=WINDOW)  # (L, E) of the last steps: entries of a micro-batch, on average
        self._setting: Setting | None = None
        self._calibrated = 0  # layers, in this step
        self._planning = Stopwatch(shards.world.device)  # of what waits for plans
        if not self._measures:
            shards.arena.attention = None  # nobody would ever look at its events
        self.place()

    @property
    def _measures(self) -> bool:
        """Whether there will be copies, whose costs have to be known."""
        return self.shards.world.size > 1 and self.settings.memory != 0

    @property
    def setting(self) -> Setting | None:
        """As tokens travel now; nothing is copied before it is known."""
        return self._setting and replace(self._setting, kind=self.shards.arena.kind)

    def ahead(self, loads_LE: Floats, updates: int) -> Ahead:
        """Plans the next update. Changes nothing, is not collective, and waits for nothing that the device still has to do.

        Args:
            loads_LE: entries of a micro-batch, on average, of all ranks; of the update under way.
            updates: optimizer updates that are done with it.
        """
        with self._planning:
            loads = deque([*self.loads, loads_LE], maxlen=WINDOW)
            return Ahead(loads_LE, self._measured(loads_LE), self._next(loads, self._reshards(updates)))

    def take(self, ahead: Ahead, updates: int) -> dict[str, float]:
        """Once the update is made: moves owners if it is time, and places copies for the next one. Collective.

        Returns:
            Metrics of the update that is done.
        """
        self.loads.append(ahead.loads_LE)
        metrics, planned, attention = dict(ahead.metrics), ahead.next, self.shards.arena.attention
        if attention is not None and updates < MEASURED_AFTER:
            attention.forget()
        elif attention is not None:
            self._measure()
            with self._planning:
                planned = self._next(self.loads, self._reshards(updates))
        if self._reshards(updates):
            metrics["moe/owners_moved"] = float((planned.owner_LE != self.shards.owner_LE).sum())
        if self.settings.calibrate:
            metrics["moe/layers_calibrated"], self._calibrated = float(self._calibrated), 0
        if planned.owner_LE is not self.shards.owner_LE:
            self.shards.reshard(planned.owner_LE)
        self._become(planned)
        return metrics | self._costs()

    def place(self) -> None:
        """Places copies by the loads seen so far; without any there are no copies. Collective."""
        self._become(self._next(self.loads, reshards=False))

    def _become(self, planned: Next) -> None:
        self.plans = list(planned.plans)
        self.shards.arena.take(planned.layout)

    def _reshards(self, updates: int) -> bool:
        every = self.settings.reshard_every
        return self.setting is not None and every > 0 and updates % every == 0

    def _next(self, loads: Sequence[Floats], reshards: bool) -> Next:
        """Owners, the present ones themselves where they stay, and copies after such loads."""
        world, owner_LE, setting = self.shards.world, self.shards.owner_LE, self.setting
        if not loads or setting is None:
            plans = [Plan(without_copies(owner_E, world.size)) for owner_E in owner_LE]
        else:
            predicted_LE = predict(np.stack(list(loads)))
            plan = partial(self.settings.policy, setting=setting)
            if reshards:
                owner_LE, plans = reshard(predicted_LE, owner_LE, setting.topology, setting.budget.overlap, plan)
            else:
                plans = plan(predicted_LE, owner_LE)
        shares_LED = [shares(plan, world.topology, world.rank) for plan in plans]
        placements, rematerialise = [plan.placement for plan in plans], self.settings.rematerialise
        stays_L = [plan.stays for plan in plans]
        return Next(owner_LE, plans, self.shards.arena.layout(placements, shares_LED, stays_L, rematerialise=rematerialise))

    def calibrate(self, layer: int, counts_E: Tensor) -> None:
        """Before a layer's tokens are sent: new copies, where the loads that came make them worth the wait. Collective.

        Args:
            counts_E: this rank's tokens per expert.
        """
        if self.setting is None:
            return
        world = self.shards.world
        loads_E = world.sum(counts_E.clone()).double().cpu().numpy()
        with self._planning:
            plan = calibrated(self.plans[layer], loads_E, self.setting)
        if plan is not self.plans[layer]:
            self.plans[layer] = plan
            self._calibrated += 1
            self.shards.arena.replace(layer, plan.placement, shares(plan, world.topology, world.rank), stays=plan.stays)

    def _measure(self) -> None:
        """Measures this machine, and makes room for copies. Collective; all ranks come to the same numbers."""
        arena, settings, world = self.shards.arena, self.settings, self.shards.world
        tokens = int(self.loads[-1][0].sum()) // (settings.top_k * world.size)
        layers_kept = 1 if settings.rematerialise else arena.shape.layers
        memory = copies_that_fit(arena, layers_kept) if settings.memory is None else settings.memory

        def planning(costs: LayerCosts) -> Plan:
            setting = replace(self._setting_of(Budget(arena.shape.experts, memory), costs), rematerialise=False)
            return calibrated(Plan(without_copies(self.shards.owner_LE[0], world.size)), self.loads[-1][0], setting)

        costs = measure_costs(arena, tokens, settings.top_k, planning)
        hidden = hidden_copies(costs, world.topology.nodes)
        if settings.memory is None:  # more than can travel under the attention would hardly ever be used
            memory = min(memory, max(hidden, 1))
        self._know(hidden if settings.overlap is None else settings.overlap, memory, costs)

    def _know(self, overlap: int, memory: int, costs: LayerCosts) -> None:
        arena, settings = self.shards.arena, self.settings
        budget = Budget(min(overlap, arena.shape.experts), min(memory, arena.shape.experts))
        self._setting = self._setting_of(budget, costs)
        arena.attention = None
        self.shards.make_room(budget.memory * (1 if settings.rematerialise else arena.shape.layers))
        log.info("copies: %s, %s", budget, costs)

    def _setting_of(self, budget: Budget, costs: LayerCosts) -> Setting:
        arena, settings = self.shards.arena, self.settings
        return Setting(self.shards.world.topology, settings.top_k, budget, settings.rematerialise, costs, arena.kind)

    def _measured(self, loads_LE: Floats) -> dict[str, float]:
        """Of an update with such loads under the present plans."""
        arena, topology = self.shards.arena, self.shards.world.topology
        pairs = list(zip(self.plans, loads_LE, strict=True))
        owners = [Plan(without_copies(plan.placement.owner_E, topology.devices)) for plan in self.plans]
        extra_LD = np.stack([plan.placement.extra_D for plan in self.plans])
        found = {
            "moe/copies_per_layer": float(extra_LD.sum(axis=1).mean()),
            "moe/copies_mib": copies_kept(extra_LD, rematerialise=arena.rematerialise) * arena.expert_bytes / MIB,
            "moe/rank_imbalance": _mean_imbalance([device_loads(plan, topology, e) for plan, e in pairs]),
            "moe/rank_imbalance_owners": _mean_imbalance(
                [device_loads(plan, topology, e) for plan, e in zip(owners, loads_LE, strict=True)]
            ),
        }
        if self.setting is not None:
            found["moe/copies_room"] = float(self.setting.budget.memory)
        return found

    def _costs(self) -> dict[str, float]:
        """Of the copies of the update that is done, and of planning those of the next. Collective."""
        world = self.shards.world
        own = torch.tensor([*self.shards.arena.take_costs(), self._planning.take()], dtype=torch.float64, device=world.device)
        moved_bytes, copies_s, plans_s = world.sum(own).tolist()
        return {
            "moe/moved_mib": moved_bytes / MIB,
            "time/copies_exposed_s": copies_s / world.size,
            "time/plans_exposed_s": plans_s / world.size,
        }

    # ------------------------------------------------------------ state

    def state(self) -> Tensor:
        """The loads of the window, (WINDOW, L, E) float64, the newest last; before the first step -1."""
        missing = [np.full(self.shards.owner_LE.shape, UNKNOWN)] * (WINDOW - len(self.loads))
        return torch.from_numpy(np.stack([*missing, *self.loads]))

    def machine(self) -> Tensor:
        """The ranks of a node, the copies that travel under the attention and those that there is room for, and the costs
        after; float64."""
        if self.setting is None:
            return torch.full((3 + NUMBERS,), UNKNOWN, dtype=torch.float64)
        budget, per_node = self.setting.budget, self.shards.world.ranks_per_node
        return torch.tensor([per_node, budget.overlap, budget.memory, *self.setting.costs.numbers], dtype=torch.float64)

    def load_state(self, loads: Tensor, machine: Tensor) -> None:
        """Restores what `state` and `machine` gave and places copies as then, except for what this run's settings say
        otherwise. Where nodes have other numbers of ranks, links are others, too, and measured again. Collective."""
        self.loads = deque((step for step in loads.cpu().numpy() if (step >= 0).all()), maxlen=WINDOW)
        settings, (per_node, overlap, memory, *costs) = self.settings, machine.tolist()
        if self._measures and per_node == self.shards.world.ranks_per_node:
            overlap = overlap if settings.overlap is None else settings.overlap
            memory = memory if settings.memory is None else settings.memory
            self._know(int(overlap), int(memory), LayerCosts.from_numbers(costs))
        self.place()


def _mean_imbalance(loads_LD: list[Floats]) -> float:
    return float(np.mean([imbalance(loads_D) for loads_D in loads_LD]))
