"""Degrees are measured and planned alike on all ranks, planned again when loads have changed, and kept in the run folder."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.router import Routing
from parallel import chunk_profile, scheduling
from parallel.chunk_profile import Profile
from parallel.expert_arena import ExpertArena, ExpertShape
from parallel.flows import Plan
from parallel.hooks import NONE, Change, Hooks
from parallel.moe_layer import ShardedExperts
from parallel.placement import TransportKind, even_owners, without_copies
from parallel.schedule.cost import Line
from parallel.schedule.pipeline import WHOLE, Degrees
from parallel.scheduling import FILE, WATCHED, Scheduling
from parallel.topology import World
from tests.distributed.ranks import run_ranks

SHAPE = ExpertShape(layers=2, experts=4, hidden=8, expert_hidden=8)
TOKENS, K = 32, 2


def arena_of(world: World, kind: TransportKind, hooks: Hooks = NONE) -> ExpertArena:
    owned = SHAPE.layers * SHAPE.experts // world.size
    arena = ExpertArena(SHAPE, owned, 0, world, torch.float32, lambda row, gradients: None, kind, hooks)
    for part in arena.rows:
        part.fill_(0.1)
    arena.place(plans(world), rematerialise=False)
    arena.attention = None
    return arena


def plans(world: World) -> list[Any]:
    return [without_copies(even_owners(SHAPE.experts, world.size), world.size) for _ in range(SHAPE.layers)]


def attend(tokens: int, backward: bool) -> object:
    """Slow on one rank, so that ranks which counted by themselves would measure unequally often."""
    return time.sleep((0.06 if backward else 0.02) * dist.get_rank())


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
    return schedule.observe([Plan(one) for one in plans(arena.world)], torch.stack([counts_E] * SHAPE.layers).double().numpy())


BOTH: list[TransportKind] = ["messages", "two_level"]


def choose(arena: ExpertArena, folder: Path, slow: TransportKind) -> tuple[bool, bool, dict[str, float]]:
    """(whether tokens then travel over two levels; and in a run that goes on; what was expected, on rank 0) where messages of
    `slow` take a second more."""
    folder = folder / f"not_{slow}"
    folder.mkdir(exist_ok=True)
    measured = scheduling.measure

    def slowed(arena: ExpertArena, *arguments: Any, among: int) -> Profile:
        profile = measured(arena, *arguments, among=among)
        late_s = 1.0 if arena.kind == slow else 0.0
        exchange = replace(profile.exchange, line=Line(profile.exchange.line.alpha_s + late_s, profile.exchange.line.beta_s))
        return replace(profile, exchange=exchange)

    scheduling.measure = slowed
    found = []
    for _ in range(2):  # the second reads what was measured
        schedule = Scheduling(arena, None, K, folder, BOTH)
        for _ in range(WATCHED + 1):
            update(schedule, arena, hot=False)
        found.append(arena.kind == "two_level")
        assert schedule._profile == schedule._profiles[arena.kind]
    scheduling.measure = measured
    kept = json.loads((folder / FILE).read_text(encoding="utf-8")) if arena.world.rank == 0 else {"transports": {}}
    return *found, kept["transports"]


def hooked(world: World) -> list[str]:
    """What a layer calls of its hooks, in order; they are where they should be, and autograd goes through the outer two."""
    called: list[str] = []

    def noting(name: str, factor: float) -> Change:
        def change(rows: Tensor) -> Tensor:
            called.append(name)
            return rows * factor

        return change

    factors = {
        "before_start": 2.0, "before_dispatch": 0.25, "after_dispatch": 4.0, "before_combine": 8.0, "after_combine": 0.125,
        "after_end": 3.0,
    }  # fmt: skip
    hooks = Hooks(**{name: noting(name, factor) for name, factor in factors.items()})
    routing = Routing(torch.arange(TOKENS)[:, None] % SHAPE.experts, torch.ones(TOKENS, 1), torch.full((SHAPE.experts,), 8))
    results = []
    for scale, arena in ((2.0, arena_of(world, "messages")), (1.0, arena_of(world, "messages", hooks))):
        x_TD = (scale * torch.linspace(-1, 1, TOKENS * SHAPE.hidden)).view(TOKENS, SHAPE.hidden).requires_grad_()
        with arena.backward_pass():
            y_TD = ShardedExperts(0, arena)(x_TD, routing)
            y_TD.backward(torch.ones_like(y_TD))
        results.append((y_TD, x_TD.grad))
    (y_TD, d_x_TD), (hooked_TD, d_hooked_TD) = results
    torch.testing.assert_close(hooked_TD, 3 * y_TD)
    torch.testing.assert_close(d_hooked_TD, 6 * d_x_TD)
    return called


def not_done_on(rank: int, schedule: Scheduling) -> bool:
    """Whether all ranks go on with the plan that they have while one still plans the next."""
    done, before = schedule._planning, schedule.degrees_L
    if done is None:
        return False
    done.result()
    if dist.get_rank() == rank:
        schedule._planning = Future()
    schedule.prepare(TOKENS, attend)
    kept = schedule._planning is not None and schedule.degrees_L == before
    schedule._planning = done
    return kept


def train(world: World, folder: str) -> dict[str, Any]:
    chunk_profile.BUDGET_S = 0.1
    world = replace(world, ranks_per_node=2)
    measured: list[int] = []
    original = scheduling.measure

    def counted(*arguments: Any, among: int) -> Any:
        measured.append(1)
        return original(*arguments, among=among)

    scheduling.measure = counted  # type: ignore[assignment]
    arena = arena_of(world, "messages")
    schedule = Scheduling(arena, None, K, Path(folder), ["messages"])
    metrics = [update(schedule, arena, hot=False) for _ in range(WATCHED + 1)]
    planned_again = schedule._planning is not None
    update(schedule, arena, hot=True)
    waiting = schedule._planning is not None
    late = not_done_on(world.size - 1, schedule)
    schedule.prepare(TOKENS, attend)
    assert late == (schedule._planning is None), "its result is taken"
    again = Scheduling(arena, None, K, Path(folder), ["messages"])
    again.prepare(TOKENS, attend)
    other = Scheduling(arena, None, K, Path(folder), ["messages"])
    other.prepare(TOKENS // 2, attend)
    peers = arena_of(replace(world, ranks_per_node=world.size), "peer_memory")
    in_place = Scheduling(peers, None, K, Path(folder), ["peer_memory"])
    in_place.prepare(TOKENS, attend)
    (Path(folder) / "levels").mkdir(exist_ok=True)
    over_two = arena_of(world, "two_level")
    levels = Scheduling(over_two, None, K, Path(folder) / "levels", ["two_level"])
    for _ in range(WATCHED + 1):
        update(levels, over_two, hot=False)
    (Path(folder) / "damaged").mkdir(exist_ok=True)
    (Path(folder) / "damaged" / FILE).write_text(json.dumps({"machine": again._machine, "tokens": TOKENS}))
    damaged = Scheduling(arena, None, K, Path(folder) / "damaged", ["messages"])
    damaged.prepare(TOKENS, attend)
    fixed = Scheduling(arena, Degrees(3, 3), K, None, ["messages"])
    fixed.prepare(TOKENS, attend)
    chosen = [choose(over_two, Path(folder), slow) for slow in BOTH]
    update(levels, over_two, hot=False)
    return {
        "hooked": hooked(world),
        "chosen": chosen,
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
    assert one["measured"] == 4 + 2 * 2, (
        "once, once for other micro-batches, once over two levels, once because a file was damaged; and both in each choice"
    )
    (late, late_again, expected), (soon, soon_again, expected_other) = one["chosen"]
    assert late and late_again and not soon and not soon_again, "tokens travel by what is expected to take less"
    assert all([kind for *kind, _ in found["chosen"]] == [kind for *kind, _ in one["chosen"]] for found in (*others, other))
    assert expected["messages"] > expected["two_level"] + 1 and expected_other["two_level"] > expected_other["messages"] + 1
    ways = ["before_dispatch", "after_dispatch", "before_combine", "after_combine"]
    assert one["hooked"] == ["before_start", *ways, "after_end", *ways], "forward, then backward"
    assert not one["even"] and one["hot"], "even loads are what was planned for, hot ones are not"
    assert one["in_place"] == [WHOLE] * SHAPE.layers and one["fixed"] == [Degrees(3, 3)] * SHAPE.layers
    degrees = one["degrees"]
    assert one["metrics"][0].keys() == {"moe/chunks_forward", "moe/chunks_backward"} and len(degrees) == SHAPE.layers
    kept = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert kept["machine"]["ranks"] == 4 and kept["tokens"] == TOKENS
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
        around = {"announce", "attention", "copies", "start", "gradients", "beside"}  # what one alone knows, or only sometimes
        assert words[0] - around == words[1] - around >= {"dispatch", "relay", "gather", "experts", "scatter", "sum", "combine"}
