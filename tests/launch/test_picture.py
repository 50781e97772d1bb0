"""Pictures of timelines: a bar for each task, where and as long as it ran; the same file each time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle

from kernels.errors import UserError
from launch.picture import COLOURS, IDLE, Panel, draw, draw_schedule, save
from parallel.schedule.cost import Chunk, Line
from parallel.schedule.execution import ExecutionCosts, LayerWork, backward_tasks, forward_tasks
from parallel.schedule.generalised import Around, backward_around, forward_around
from parallel.schedule.pipeline import BESIDE, Copies, layer_tasks
from parallel.schedule.timeline import Task, simulate
from parallel.scheduling import FILE

SLOW = Line(1e-3, 1e-3)
COSTS, WORK = ExecutionCosts(*[SLOW] * 6, 0.0, inside=SLOW, relay=SLOW, chunk_s=1e-3), LayerWork(1.0, 1.0, 1.0)
AROUND = Around(2e-3, Copies(1e-3, 0.5e-3), Copies(1e-3, 0.5e-3), 2e-3, 1e-3)
TIMELINES = [
    simulate(forward_around(forward_tasks(COSTS, WORK, 3), AROUND)),
    simulate(backward_around(backward_tasks(COSTS, WORK, 2), AROUND)),
    simulate(layer_tasks(Chunk(expert_s=2e-3, across_s=1e-3, gather_s=1e-3, scatter_s=2e-3), 4, gradients_s=3e-3)),
]


def bars(panels: list[Panel]) -> list[list[tuple[float, float]]]:
    """(start, length) of every bar of a panel that is no background."""
    figure = draw(panels, "heading", "note")
    found = []
    for axes in figure.axes:
        patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        background = [patch for patch in patches if patch.get_zorder() == 0.5]
        assert len(background) == len(axes.get_yticks())
        found.append([(patch.get_x(), patch.get_width()) for patch in patches if patch not in background])
    return found


def test_every_task_has_its_bar() -> None:
    panels = [Panel(f"panel {number}", timeline) for number, timeline in enumerate(TIMELINES)]
    for timeline, found in zip(TIMELINES, bars(panels), strict=True):
        wanted = [(span.start_s, span.task.seconds) for span in timeline.spans]
        assert sorted(found) == [pytest.approx(one) for one in sorted(wanted)]


def test_lanes_stand_in_one_order_and_the_unknown_below() -> None:
    timeline = simulate([Task("x", "disk", 1.0), Task("dispatch 1", "between nodes", 1.0), Task("experts 1", "compute", 1.0)])
    (axes,) = draw([Panel("", timeline)], "", "").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["compute", "between nodes", "disk"]


def test_kinds_of_tasks_have_different_colours() -> None:
    assert len({*COLOURS.values(), IDLE}) == len(COLOURS) + 1
    planned = {span.task.name.split()[0] for timeline in TIMELINES for span in timeline.spans}
    assert planned | {BESIDE} == set(COLOURS)


def test_files_are_what_their_names_say_and_the_same_each_time(tmp_path: Path) -> None:
    written = []
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        save(draw([Panel("one", TIMELINES[0])], "A heading", "a note"), tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    svg, again, png, once_more = written
    assert svg == again and png == once_more and png.startswith(b"\x89PNG")
    assert ">A heading<" in svg.decode() and ">attention<" in svg.decode()
    with pytest.raises(UserError, match="cannot be written"):
        save(draw([Panel("one", TIMELINES[0])], "", ""), tmp_path / "no" / "a.svg")


def test_a_runs_first_layer_is_drawn_planned_and_measured(tmp_path: Path) -> None:
    assert draw_schedule(tmp_path) is None
    spans = [asdict(span) for span in TIMELINES[0].spans]
    titles = ["forward, planned", "forward, measured"]
    record = {"machine": {"ranks": 2, "device": "cpu"}, "timelines": dict.fromkeys(titles, spans)}
    (tmp_path / FILE).write_text(json.dumps(record), encoding="utf-8")
    drawn = draw_schedule(tmp_path)
    assert drawn is not None
    text = drawn.read_text(encoding="utf-8")
    assert all(title in text for title in titles) and "on 2 ranks (cpu)" in text
