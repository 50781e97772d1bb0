"""The number of chunks of each MoE layer, and the bytes of dense gradients that travel under it, from step to step: measured at
the start, planned from loads and copies, planned again when these have changed.

Every rank plans with the same pure functions from the same numbers, so no plan is sent. Planning runs while training goes on,
and its result takes effect before the first update that finds it done on all ranks. Chunks and slices do not change results, so
a run does not depend on what was measured; but if measurements choose the transport of tokens, sums have the order of that
transport.
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

from parallel.chunk_profile import Attend, Profile, measure
from parallel.chunked_experts import Direction, begins
from parallel.expert_arena import ExpertArena
from parallel.flows import Plan
from parallel.gradient_slices import ARRIVES, SETS_OUT, GradientSlices
from parallel.layer_cost import LayerCosts, copy_times
from parallel.moe_layer import PREPARES
from parallel.placement import Floats, TransportKind, without_copies
from parallel.schedule.cost import Fit, Line
from parallel.schedule.execution import LayerPlan, LayerWork, layer_work
from parallel.schedule.generalised import Around, around_copies
from parallel.schedule.layers import DenseGradients, plan_layers
from parallel.schedule.pipeline import BESIDE, COMPUTE, COPIES, GRADIENTS, WHOLE, Degrees
from parallel.schedule.timeline import Span, Task, Timeline
from parallel.schedule.transports import Way, choose_transport
from parallel.stopwatch import Mark, Marks

DRIFT = 0.1  # of the entries or the bytes of a layer's busiest rank, from where it is planned again
WINDOW = 5  # updates whose mean load counts
WATCHED = 3  # with which of a plan's updates its first layer is measured beside it; those before also warm up
LEAST_BESIDE = 0.01  # of a pass; where nothing is computed between the stages of a layer the next one comes at once
FILE = "schedule.json"
WAITING, SLICES = "waiting for", "slices"  # resources of what was measured
ANNOUNCE = "announce"  # what tells each rank what will come
MIB = 2**20
log = logging.getLogger("tessera")


@dataclass(frozen=True)
class Planned:
    """Of every layer."""

    works: list[LayerWork]
    arounds: list[Around]  # without slices
    plans: list[LayerPlan]
    bytes_P: tuple[int, ...] | None  # of the slices, by place of the backward pass; None: not known when this was planned


class Scheduling:
    """All ranks hold one and tell it the same loads."""

    def __init__(
        self,
        arena: ExpertArena,
        fixed: Degrees | None,
        top_k: int,
        folder: Path | None,
        kinds: Sequence[TransportKind],
        slices: GradientSlices | None = None,
    ) -> None:
        """`fixed`: degrees of all layers; None plans them, where tokens travel as messages. `folder`: for what is measured.
        `kinds`: by which tokens may travel; where there are several, and nothing is fixed, what is measured decides.

        Slices whose bytes are not planned take what is complete at each layer.
        """
        self._slices = slices
        self._reduce: Fit | None = None  # what a slice takes by its bytes
        self._arena, self._top_k, self._folder = arena, top_k, folder
        self.degrees_L = [fixed or WHOLE] * arena.shape.layers
        self._kinds = tuple(kinds)
        self._plans = fixed is None and arena.world.size > 1 and not arena.peer_memory
        self._profile: Profile | None = None  # of the way by which tokens travel
        self._profiles: dict[TransportKind, Profile] = {}
        self._transport: dict[TransportKind, float] = {}  # seconds that all layers are expected to take by each
        self._planning: Future[Planned] | None = None
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="schedule")
        self._now = Planned([], [], [], None)
        self._loads: deque[Floats] = deque(maxlen=WINDOW)  # (L, E) of the last updates
        self._updates = 0  # with these degrees
        self.marks: Marks | None = None  # of the first layer, in an update in which it is measured

    def prepare(self, tokens: int, attend: Attend) -> None:
        """Before an update with micro-batches of this many tokens a rank. The first time measures, collectively; later ones
        take what was planned beside the updates before, if it is done."""
        if not self._plans:
            return
        if self._profile is None:
            self._know(tokens, attend)
            shape, ranks = self._arena.shape, self._arena.world.size
            even_E = np.full(shape.experts, tokens * self._top_k * ranks / shape.experts)
            owners = [Plan(without_copies(placement.owner_E, ranks)) for placement in self._arena.placements]
            self._choose_transport(owners, even_E, tokens)
            works = [self._work(plan, even_E) for plan in owners]
            self._take(self._planned(works, [self._around(plan, None, tokens) for plan in owners], tokens))
        elif self._planning is not None and self._planned_everywhere(self._planning):
            done, self._planning = self._planning, None
            self._take(done.result())
        self._updates += 1
        self._watch(Marks(self._arena.world.device) if self._updates == WATCHED else None)

    def _planned_everywhere(self, planning: Future[Planned]) -> bool:
        """Ranks take a plan before the same update, and nobody waits for it. Collective."""
        done = torch.tensor(int(planning.done()), device=self._arena.world.device)
        dist.all_reduce(done, dist.ReduceOp.MIN)
        return bool(done)

    def _choose_transport(self, owners: Sequence[Plan], loads_E: Floats, tokens: int) -> None:
        """Once, before the first update, by layers without copies whose loads are even. Collective."""
        first, *others = self._profiles.values()
        if not others:
            self._profile = first
            return
        ways = {
            kind: Way(profile.costs, [self._work(plan, loads_E, kind) for plan in owners])
            for kind, profile in self._profiles.items()
        }
        choice = choose_transport(ways, tokens, [first.costs.around(tokens)] * len(owners))
        self._arena.travel(choice.kind)
        self._profile, self._transport = self._profiles[choice.kind], dict(choice.seconds)
        log.info("tokens travel by %s: all layers are expected to take %s", choice.kind, choice)

    def _watch(self, marks: Marks | None) -> None:
        self.marks = marks
        if self._slices is not None:
            self._slices.marks = marks

    def observe(self, plans: Sequence[Plan], loads_LE: Floats, copying: LayerCosts | None = None) -> dict[str, float]:
        """After an update.

        Args:
            plans: of the next one.
            loads_LE: entries of a micro-batch, on average, of all ranks.
            copying: what copies of experts take on their way; None: nobody has any yet.

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
        self._loads.append(loads_LE)
        mean_LE = np.mean(self._loads, axis=0)
        works = [self._work(plan, loads_E) for plan, loads_E in zip(plans, mean_LE, strict=True)]
        tokens = int(mean_LE[0].sum()) // (self._top_k * self._arena.world.size)
        arounds = [self._around(plan, copying, tokens) for plan in plans]
        if self._planning is None and self._drifted(works, arounds):
            self._planning = self._beside.submit(self._planned, works, arounds, tokens)
        return found

    def _drifted(self, works: list[LayerWork], arounds: list[Around]) -> bool:
        """Loads, or copies by so much of a layer's time, or what is known of the backward pass."""
        now = self._now
        moved_s = [abs(new.copies_s - old.copies_s) for new, old in zip(arounds, now.arounds, strict=True)]
        return (
            any(new.differs(old, DRIFT) for new, old in zip(works, now.works, strict=True))
            or any(seconds > DRIFT * plan.seconds for seconds, plan in zip(moved_s, now.plans, strict=True))
            or (now.bytes_P is None and self._slices is not None)
        )

    def _around(self, plan: Plan, copying: LayerCosts | None, tokens: int) -> Around:
        """Of a layer: its attention, and the copies under this plan."""
        assert self._profile is not None, "planning follows measuring"
        around = self._profile.costs.around(tokens)
        if copying is None:
            return around
        times = copy_times(plan.placement, self._arena.world.topology, copying)
        return around_copies(times, around, rematerialise=self._arena.rematerialise)

    def _work(self, plan: Plan, loads_E: Floats, kind: TransportKind | None = None) -> LayerWork:
        """`kind`: by which tokens travel; None: as now."""
        topology, row_bytes = self._arena.world.topology, self._arena.row_bytes
        return layer_work(plan, loads_E, topology, self._top_k, row_bytes, kind or self._arena.kind)

    def _planned(self, works: list[LayerWork], arounds: list[Around], tokens: int) -> Planned:
        assert self._profile is not None, "planning follows measuring"
        plans, bytes_P = plan_layers(self._profile.costs, works, arounds, tokens, self.degrees_L, self._dense_gradients())
        return Planned(works, arounds, plans, bytes_P)

    def _dense_gradients(self) -> DenseGradients | None:
        """What is known of them; None until a backward pass has averaged any."""
        if self._slices is None or self._slices.complete_P is None or self._reduce is None:
            return None
        return self._slices.gradients(self._reduce.line)

    def _take(self, planned: Planned) -> None:
        """A plan of the same degrees changes nothing but what is expected, and the slices."""
        same = [plan.degrees for plan in planned.plans] == [plan.degrees for plan in self._now.plans]
        if planned.bytes_P is not None and self._slices is not None:
            same &= self._now.bytes_P is not None
            self._slices.take(planned.bytes_P)
        self._now = planned
        if not same:
            self._updates, self.degrees_L = 0, [plan.degrees for plan in planned.plans]
            log.info("chunks of the MoE layers, forward and backward: %s", told(planned.plans))
            if planned.bytes_P is not None and self._slices is not None:
                whole, under = self._slices.total * self._slices.itemsize, sum(planned.bytes_P)
                log.info("dense gradients: %.4g of %.4g MiB travel under the backward pass", under / MIB, whole / MIB)

    # ------------------------------------------------------------ what is kept in the run folder

    @property
    def _machine(self) -> dict[str, Any]:
        """What the measured times belong to."""
        world, shape = self._arena.world, self._arena.shape
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
        sizes: dict[str, float] = {
            "experts": shape.experts,
            "hidden": shape.hidden,
            "expert_hidden": shape.expert_hidden,
            "top_k": self._top_k,
        }
        nodes = {"ranks": world.size, "ranks_per_node": world.ranks_per_node, "kinds": list(self._kinds)}
        sizes["row_bytes"] = self._arena.row_bytes
        sizes["dense"] = 0 if self._slices is None else self._slices.total
        return {"device": name, "dtype": str(self._arena.dtype), **nodes, **sizes}

    def _know(self, tokens: int, attend: Attend) -> None:
        """Measures, or reads what was measured before on such ranks and for this many tokens. Collective."""
        found: list[tuple[dict[TransportKind, Profile], Fit | None] | None] = [None]
        if self._arena.world.rank == 0 and self._folder is not None and (self._folder / FILE).exists():
            try:
                kept = json.loads((self._folder / FILE).read_text(encoding="utf-8"))
                if kept["machine"] == self._machine and kept["tokens"] == tokens:
                    reduce = kept["reduce"] and Fit(Line(**kept["reduce"]["line"]), kept["reduce"]["r_squared"])
                    found = [({kind: Profile.from_json(one) for kind, one in kept["profiles"].items()}, reduce)]
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # the others wait
                log.warning("%s is damaged (%s: %s); it is measured again", self._folder / FILE, type(error).__name__, error)
        dist.broadcast_object_list(found, src=0)
        if found[0] is not None:
            self._profiles, self._reduce = found[0]
            return
        for kind in self._kinds:
            self._arena.travel(kind)
            self._profiles[kind] = measure(self._arena, tokens, self._top_k, attend, among=len(self._kinds))
        if self._slices is not None:
            self._reduce = self._slices.measure()
            line = self._reduce.line
            told_line = 1e3 * line.alpha_s, 1e3 * MIB * line.beta_s, self._reduce.r_squared
            log.info("a slice of dense gradients: %.3g ms + %.3g ms a MiB (r^2 %.4f)", *told_line)

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
            "tokens": self._profile.tokens,
            "profiles": {kind: asdict(profile) for kind, profile in self._profiles.items()},
            "transports": self._transport,
            "reduce": None if self._reduce is None else asdict(self._reduce),
            "slices": self._now.bytes_P,
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
    """Of the last pass in this direction, from the marks of chunked_experts.py and moe_layer.py: what the device did, and what
    it waited for; that may be gradients of copies of the layer after. Beside it the slices that were under way meanwhile."""
    program = [mark for mark in seen if not mark.name.startswith((SETS_OUT, ARRIVES))]
    first = {PREPARES, begins("forward")} if direction == "forward" else {begins("backward")}
    begin = max(at for at, mark in enumerate(program) if mark.name == begins(direction))
    while direction == "forward" and program[begin].name != PREPARES and begin > 0:
        begin -= 1
    start_s, spans = program[begin].at_s, list[Span]()
    for before, mark in zip(program[begin:], program[begin + 1 :], strict=False):
        if mark.name in (PREPARES, begins("backward")) or (mark.name == begins("forward") and direction == "backward"):
            break
        waits = mark.name.startswith(("dispatch", "gather", "scatter", "combine", "gradients", COPIES))
        name = ANNOUNCE if mark.name in first else mark.name
        task = Task(name, WAITING if waits else COMPUTE, mark.at_s - before.at_s)
        spans.append(Span(task, before.at_s - start_s, mark.at_s - start_s))
    least_s = LEAST_BESIDE * spans[-1].end_s
    spans = [span for span in spans if span.task.name != BESIDE or span.task.seconds > least_s]
    return Timeline((*spans, *_slices_under_way(seen, start_s, start_s + spans[-1].end_s)))


def _slices_under_way(seen: Sequence[Mark], start_s: float, end_s: float) -> list[Span]:
    """Between two times, on the clock of the first; one that was under way before begins there."""
    out = [mark for mark in seen if mark.name.startswith(SETS_OUT)]
    there = [mark for mark in seen if mark.name.startswith(ARRIVES)]
    found: list[Span] = []
    for left, arrived in zip(out, there, strict=True):
        if left.at_s < end_s and arrived.at_s > start_s:
            first_s = max(left.at_s - start_s, 0.0)
            name = f"{GRADIENTS} {len(found) + 1}"
            found.append(Span(Task(name, SLICES, arrived.at_s - start_s - first_s), first_s, arrived.at_s - start_s))
    return found
