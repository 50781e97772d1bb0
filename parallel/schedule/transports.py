"""How the tokens of MoE layers should travel: each transport is planned, and the one with the fastest plan is taken. Pure.

Straight to the ranks a layer waits for one exchange of sizes, over two levels for two; over two levels fewer rows go between
nodes and all are relayed inside them. Which of both counts for more, the lines say (FSMoE, arXiv 2501.10714, section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from parallel.schedule.execution import ExecutionCosts, LayerPlan, LayerWork, plan_layer
from parallel.schedule.generalised import Around

Kind = TypeVar("Kind", bound=str)


@dataclass(frozen=True)
class Way:
    """Lines of the parts of a layer, and the work of each layer."""

    costs: ExecutionCosts
    works: Sequence[LayerWork]


@dataclass(frozen=True)
class Choice(Generic[Kind]):
    """Of the ways the one that is expected to take least; of equals the first."""

    kind: Kind
    plans: Mapping[Kind, Sequence[LayerPlan]]  # of each layer
    seconds: Mapping[Kind, float]  # of both passes of all layers, with what tells each rank what will come

    def __str__(self) -> str:
        """In milliseconds, the choice first."""
        ordered = sorted(self.seconds, key=lambda kind: kind != self.kind)
        return ", ".join(f"{kind} {1e3 * self.seconds[kind]:.4g} ms ({degrees_of_all(self.plans[kind])})" for kind in ordered)


def choose_transport(ways: Mapping[Kind, Way], tokens: int, arounds: Sequence[Around]) -> Choice[Kind]:
    """Plans all layers over each way.

    Args:
        tokens: of a rank.
        arounds: what lies around each layer, however its tokens travel.
    """
    plans = {
        kind: [plan_layer(way.costs, work, tokens, around=around) for work, around in zip(way.works, arounds, strict=True)]
        for kind, way in ways.items()
    }
    seconds = {
        kind: sum(plan.seconds for plan in plans[kind]) + len(way.works) * way.costs.announce_s for kind, way in ways.items()
    }
    return Choice(min(ways, key=lambda kind: seconds[kind]), plans, seconds)


def degrees_of_all(plans: Sequence[LayerPlan]) -> str:
    """A line: in how many chunks layers run, forward and backward."""
    pairs = dict.fromkeys((plan.degrees.forward, plan.degrees.backward) for plan in plans)
    return ", ".join(f"{forward} and {backward} chunks" for forward, backward in pairs)
