"""Degrees are measured and planned alike on all ranks, planned again when loads have changed, and kept in the run folder."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kernels.router import Routing
from parallel import chunk_profile, scheduling
from parallel.expert_arena import ExpertArena, ExpertShape
from parallel.flows import Plan
from parallel.moe_layer import ShardedExperts
from parallel.placement import even_owners, without_copies
from parallel.schedule.pipeline import WHOLE, Degrees
from parallel.scheduling import FILE, WATCHED, Scheduling
from parallel.topology import World
from parallel.transport import TransportKind
from tests.distributed.ranks import run_ranks

SHAPE = ExpertShape(layers=2, experts=4, hidden=8, expert_hidden=8)
TOKENS, K = 32, 2


def arena_of(world: World, kind: TransportKind) -> ExpertArena:
    owned = SHAPE.layers * SHAPE.experts // world.size
    arena = ExpertArena(SHAPE, owned, 0, world, torch.float32, lambda row, gradients: None, kind)
    for part in arena.rows:
        part.fill_(0.1)
    arena.place(plans(world), rematerialise=False)
    arena.attention = None
    return arena


def plans(world: World) -> list[Any]:
    return [without_copies(even_owners(SHAPE.experts, world.size), world.size) for _ in range(SHAPE.layers)]


def attend(tokens: int) -> object:
    """Slow on one rank, so that ranks which counted by themselves would measure unequally often."""
    return time.sleep(0.02 * dist.get_rank())


def update(schedule: Scheduling, arena: ExpertArena, hot: bool) -> dict[str, float]:
    """As the trainer has it. The tokens take all experts in turns or, `hot`, the same two."""
    schedule.prepare(TOKENS, attend)
    first_T = torch.zeros(TOKENS, dtype=torch.int64) if hot else torch.arange(TOKENS)
    experts_TK = torch.stack([first_T, first_T + 1], dim=1) % SHAPE.experts
    routing = Routing(experts_TK, torch.full((TOKENS, K), 0.5), torch.bincount(experts_TK.flatten(), minlength=SHAPE.experts))
    layer = ShardedExperts(0, arena, degrees=schedule.degrees_L[0])
    if schedule.marks is not None:
        layer = ShardedExperts(0, arena, degrees=schedule.degrees_L[0], mark=schedule.marks)
    with arena.backward_pass():
        layer(torch.ones(TOKENS, SHAPE.hidden, requires_grad=True), routing).sum().backward()
    counts_E = arena.world.sum(routing.counts_E.clone())
    return schedule.observe([Plan(one) for one in plans(arena.world)], torch.stack([counts_E] * SHAPE.layers), 1)


def train(world: World, folder: str) -> dict[str, Any]:
    chunk_profile.BUDGET_S = 0.1
    world = replace(world, ranks_per_node=2)
    measured: list[int] = []
    original = scheduling.measure

    def counted(*arguments: Any) -> Any:
        measured.append(1)
        return original(*arguments)

    scheduling.measure = counted  # type: ignore[assignment]
    arena = arena_of(world, "messages")
    schedule = Scheduling(arena, None, K, Path(folder))
    metrics = [update(schedule, arena, hot=False) for _ in range(WATCHED + 1)]
    planned_again = schedule._planning is not None
    update(schedule, arena, hot=True)
    waiting = schedule._planning is not None
    schedule.prepare(TOKENS, attend)
    again = Scheduling(arena, None, K, Path(folder))
    again.prepare(TOKENS, attend)
    other = Scheduling(arena, None, K, Path(folder))
    other.prepare(TOKENS // 2, attend)
    in_place = Scheduling(arena_of(replace(world, ranks_per_node=world.size), "peer_memory"), None, K, Path(folder))
    in_place.prepare(TOKENS, attend)
    (Path(folder) / "levels").mkdir(exist_ok=True)
    over_two = arena_of(world, "two_level")
    levels = Scheduling(over_two, None, K, Path(folder) / "levels")
    for _ in range(WATCHED + 1):
        update(levels, over_two, hot=False)
    (Path(folder) / "damaged").mkdir(exist_ok=True)
    (Path(folder) / "damaged" / FILE).write_text(json.dumps({"machine": again._machine, "profile": {"tokens": TOKENS}}))
    damaged = Scheduling(arena, None, K, Path(folder) / "damaged")
    damaged.prepare(TOKENS, attend)
    fixed = Scheduling(arena, Degrees(3, 3), K, None)
    fixed.prepare(TOKENS, attend)
    return {
        "degrees": schedule.degrees_L,
        "profile": schedule._profile,
        "kept": again._profile,
        "measured": len(measured),
        "even": planned_again,
        "hot": waiting,
        "metrics": metrics,
        "in_place": in_place.degrees_L,
        "fixed": fixed.degrees_L,
        "levels": (levels._profile, levels.degrees_L),
    }


def test_all_ranks_plan_alike_and_plan_again_when_loads_change(tmp_path: Path) -> None:
    one, *others, other = run_ranks(train, 4, str(tmp_path))
    assert all(found["levels"] == one["levels"] and found["degrees"] == one["degrees"] for found in others)
    assert one["degrees"] == other["degrees"] and one["profile"] == other["profile"]
    assert one["kept"] == other["kept"] == one["profile"], "measured times are read again"
    assert one["measured"] == 4, "once, once for other micro-batches, once over two levels, and once because a file was damaged"
    assert not one["even"] and one["hot"], "even loads are what was planned for, hot ones are not"
    assert one["in_place"] == [WHOLE] * SHAPE.layers and one["fixed"] == [Degrees(3, 3)] * SHAPE.layers
    degrees = one["degrees"]
    assert one["metrics"][0].keys() == {"moe/chunks_forward", "moe/chunks_backward"} and len(degrees) == SHAPE.layers
    kept = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert kept["machine"]["ranks"] == 4 and kept["profile"]["tokens"] == TOKENS
    for direction in ("forward", "backward"):
        names = [span["task"]["name"] for span in kept["timelines"][f"{direction}, measured"]]
        planned = [span["task"]["name"] for span in kept["timelines"][f"{direction}, planned"]]
        assert len(names) == len(set(names)) and len(names) >= len(planned) - 15
        ends = [span["end_s"] for span in kept["timelines"][f"{direction}, measured"]]
        assert ends == sorted(ends) and ends[0] > 0
    assert ("weights" in names) and names[0] == "pack"
    assert "relay" not in str(one["profile"]) and "relay" in str(one["levels"][0])
    kept = json.loads((tmp_path / "levels" / FILE).read_text(encoding="utf-8"))
    for direction in ("forward", "backward"):
        planned, measured = (kept["timelines"][f"{direction}, {kind}"] for kind in ("planned", "measured"))
        words = [{span["task"]["name"].split()[0] for span in spans} for spans in (planned, measured)]
        around = {"announce", "attention", "copies", "start", "gradients"}  # what only one of them knows, or only sometimes
        assert words[0] - around == words[1] - around >= {"dispatch", "relay", "gather", "experts", "scatter", "sum", "combine"}
