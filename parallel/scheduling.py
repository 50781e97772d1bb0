"""In how many chunks each MoE layer runs, from step to step: measured at the start, planned from loads, planned again when they
have changed.

Every rank plans with the same pure functions from the same numbers, so no plan travels. Planning is done beside the training,
and its result is taken before the next update. Degrees change no number, so a run does not depend on what was measured.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.chunk_profile import Attend, Profile, measure
from parallel.chunked_experts import Direction, begins
from parallel.expert_arena import ExpertArena
from parallel.flows import Plan
from parallel.peer_exchange import PeerTokens
from parallel.placement import Floats, without_copies
from parallel.schedule.execution import LayerPlan, LayerWork, layer_work, plan_layer
from parallel.schedule.pipeline import COMPUTE, WHOLE, Degrees
from parallel.schedule.timeline import Span, Task, Timeline
from parallel.stopwatch import Mark, Marks

DRIFT = 0.1  # of the entries or the bytes of a layer's busiest rank, from where it is planned again
WINDOW = 5  # updates whose mean load counts
WATCHED = 3  # with which of a plan's updates its first layer is measured beside it; those before also warm up
FILE = "schedule.json"
WAITING = "waiting for"
log = logging.getLogger("tessera")


@dataclass(frozen=True)
class Planned:
    """Of every layer."""

    works: list[LayerWork]
    plans: list[LayerPlan]


class Scheduling:
    """All ranks hold one and tell it the same loads."""

    def __init__(self, arena: ExpertArena, fixed: Degrees | None, top_k: int, folder: Path | None) -> None:
        """`fixed`: degrees of all layers; None plans them, where tokens travel as messages. `folder`: for what is measured."""
        self._arena, self._top_k, self._folder = arena, top_k, folder
        self.degrees_L = [fixed or WHOLE] * arena.shape.layers
        tokens = arena.transport.tokens
        self._levels = 0 if isinstance(tokens, PeerTokens) else len(tokens)  # over which tokens travel as messages
        self._plans = fixed is None and arena.world.size > 1 and self._levels > 0
        self._profile: Profile | None = None
        self._planning: Future[Planned] | None = None
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="schedule")
        self._now = Planned([], [])
        self._loads: deque[Floats] = deque(maxlen=WINDOW)  # (L, E) of the last updates
        self._updates = 0  # with these degrees
        self.marks: Marks | None = None  # of the first layer, in an update in which it is measured

    def prepare(self, tokens: int, attend: Attend) -> None:
        """Before an update with micro-batches of so many tokens a rank. The first time measures, collectively; later ones take
        what was planned beside the update before."""
        if not self._plans:
            return
        if self._profile is None:
            self._profile = self._kept(tokens) or measure(self._arena, tokens, self._top_k, attend)
            shape, ranks = self._arena.shape, self._arena.world.size
            even_E = np.full(shape.experts, tokens * self._top_k * ranks / shape.experts)
            owners = [Plan(without_copies(placement.owner_E, ranks)) for placement in self._arena.placements]
            self._take(self._planned([self._work(plan, even_E) for plan in owners], tokens))
        elif self._planning is not None:
            done, self._planning = self._planning, None
            self._take(done.result())
        self._updates += 1
        self.marks = Marks(self._arena.world.device) if self._updates == WATCHED else None

    def observe(self, plans: Sequence[Plan], counts_LE: Tensor, micro_batches: int) -> dict[str, float]:
        """After an update.

        Args:
            plans: of the next one.
            counts_LE: tokens per expert of all ranks, over so many micro-batches.

        Returns:
            Metrics of the update that is done.
        """
        if self._profile is None:
            return {}
        found = {
            "moe/chunks_forward": float(np.mean([degrees.forward for degrees in self.degrees_L])),
            "moe/chunks_backward": float(np.mean([degrees.backward for degrees in self.degrees_L])),
        }
        if self.marks is not None:
            self._write(self.marks)
        self._loads.append(counts_LE.double().cpu().numpy() / micro_batches)
        mean_LE = np.mean(self._loads, axis=0)
        works = [self._work(plan, loads_E) for plan, loads_E in zip(plans, mean_LE, strict=True)]
        if any(new.differs(old, DRIFT) for new, old in zip(works, self._now.works, strict=True)):
            tokens = int(mean_LE[0].sum()) // (self._top_k * self._arena.world.size)
            self._planning = self._beside.submit(self._planned, works, tokens)
        return found

    def _work(self, plan: Plan, loads_E: Floats) -> LayerWork:
        row_bytes = self._arena.shape.hidden * self._arena.dtype.itemsize
        return layer_work(plan, loads_E, self._arena.world.topology, self._top_k, row_bytes, levels=self._levels)

    def _planned(self, works: list[LayerWork], tokens: int) -> Planned:
        assert self._profile is not None, "planning follows measuring"
        present = zip(works, self.degrees_L, strict=True)
        return Planned(works, [plan_layer(self._profile.costs, work, tokens, degrees) for work, degrees in present])

    def _take(self, planned: Planned) -> None:
        """A plan of the same degrees changes nothing but what is expected."""
        same = [plan.degrees for plan in planned.plans] == [plan.degrees for plan in self._now.plans]
        self._now = planned
        if not same:
            self._updates, self.degrees_L = 0, [plan.degrees for plan in planned.plans]
            log.info("chunks of the MoE layers, forward and backward: %s", told(planned.plans))

    # ------------------------------------------------------------ what is kept in the run folder

    @property
    def _machine(self) -> dict[str, Any]:
        """What the measured times belong to."""
        world, shape = self._arena.world, self._arena.shape
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
        sizes = {"experts": shape.experts, "hidden": shape.hidden, "expert_hidden": shape.expert_hidden, "top_k": self._top_k}
        nodes = {"ranks": world.size, "ranks_per_node": world.ranks_per_node, "levels": self._levels}
        return {"device": name, "dtype": str(self._arena.dtype), **nodes, **sizes}

    def _kept(self, tokens: int) -> Profile | None:
        """What was measured before, on such ranks and for so many tokens; the same on every rank. Collective."""
        found: list[Profile | None] = [None]
        if self._arena.world.rank == 0 and self._folder is not None and (self._folder / FILE).exists():
            kept = json.loads((self._folder / FILE).read_text(encoding="utf-8"))
            if kept["machine"] == self._machine and kept["profile"]["tokens"] == tokens:
                found = [Profile.from_json(kept["profile"])]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _write(self, marks: Marks) -> None:
        """The plan beside what its first layer took in this update, on rank 0."""
        seen = marks.take()
        if self._arena.world.rank > 0 or self._folder is None or self._profile is None:
            return
        first = self._now.plans[0]
        timelines = {
            "forward, planned": first.forward,
            "forward, measured": measured_timeline(seen, "forward"),
            "backward, planned": first.backward,
            "backward, measured": measured_timeline(seen, "backward"),
        }
        layers = [{**asdict(plan.degrees), "seconds": plan.seconds, "whole_s": plan.whole_s} for plan in self._now.plans]
        record = {
            "machine": self._machine,
            "profile": asdict(self._profile),
            "layers": layers,
            "timelines": {name: [asdict(span) for span in timeline.spans] for name, timeline in timelines.items()},
        }
        log.info("the first layer: %s", ", ".join(f"{name} {1e3 * one.seconds:.3g} ms" for name, one in timelines.items()))
        part = self._folder / f"{FILE}.part"
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        part.replace(self._folder / FILE)


def told(plans: Sequence[LayerPlan]) -> str:
    """A plan in a line."""
    whole_s, seconds = sum(plan.whole_s for plan in plans), sum(plan.seconds for plan in plans)
    degrees = ", ".join(f"{plan.degrees.forward} and {plan.degrees.backward}" for plan in plans)
    return f"{degrees}; {1e3 * seconds:.4g} ms expected in all layers, {1e3 * whole_s:.4g} ms whole"


def measured_timeline(seen: Sequence[Mark], direction: Direction) -> Timeline:
    """Of the last pass in this direction, from the marks of chunked_experts.py: what the device did, and what it waited for;
    that may be gradients of copies of the layer behind."""
    begin = max(at for at, mark in enumerate(seen) if mark.name == begins(direction))
    spans: list[Span] = []
    for before, mark in zip(seen[begin:], seen[begin + 1 :], strict=False):
        if mark.name in (begins("forward"), begins("backward")):
            break
        resource = WAITING if mark.name.startswith(("dispatch", "gather", "scatter", "combine", "gradients")) else COMPUTE
        start_s, end_s = before.at_s - seen[begin].at_s, mark.at_s - seen[begin].at_s
        spans.append(Span(Task(mark.name, resource, end_s - start_s), start_s, end_s))
    return Timeline(tuple(spans))
