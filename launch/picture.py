"""A picture of timelines: a lane for each resource, a bar for each task, and panels below each other with the same time
axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from pydantic import TypeAdapter, ValidationError

from kernels.errors import UserError
from parallel.schedule.pipeline import ACROSS, COMPUTE, WITHIN
from parallel.schedule.timeline import Span, Timeline
from parallel.scheduling import FILE, WAITING

LANES = (COMPUTE, WAITING, WITHIN, ACROSS)  # from top to bottom; any other resource below them
COLOURS = {  # by the word that a task's name begins with
    "attention": "#8d99a6",
    "experts": "#e07b26",
    "beside": "#e8b27a",
    "dispatch": "#2f80c8",
    "gather": "#8fbce6",
    "scatter": "#8fd3bd",
    "combine": "#2a9d7c",
    "copies": "#8e6bbf",
    "gradients": "#c2507a",
    "weights": "#b8860b",
    "pack": "#6b7f5e",
    "collect": "#a3b18a",
    "relay": "#7a8b99",
    "sum": "#9c8f7a",
    "start": "#b39c9c",
}
OTHER = "#b0b7bd"
INK, SOFT, GRID, IDLE = "#22262b", "#667078", "#dfe2e4", "#f1f3f4"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tessera",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "xtick.color": SOFT,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}
WIDTH = 11.0  # inches
LANE, AROUND = 0.34, 0.62  # inches of height of a lane, and around the lanes of a panel
BAR = 0.72  # of a lane
LEGEND_COLUMNS, LEGEND_LINE = 9, 0.22  # inches
CHARACTER = 0.085  # inches that a character of a bar's label takes


@dataclass(frozen=True)
class Panel:
    title: str
    timeline: Timeline


def draw(panels: Sequence[Panel], heading: str, note: str) -> Figure:
    """One figure. `heading` says what is shown, `note` stands small at its foot."""
    with matplotlib.rc_context(STYLE):
        lanes = [_lanes(panel.timeline) for panel in panels]
        heights = [AROUND + LANE * len(one) for one in lanes]
        words = _words(panels)
        foot, head = 0.85 + LEGEND_LINE * ((len(words) - 1) // LEGEND_COLUMNS), 0.55
        figure = Figure(figsize=(WIDTH, sum(heights) + foot + head))
        height = figure.get_figheight()
        longest_s = max(panel.timeline.seconds for panel in panels)
        top = height - head
        for number, (panel, names, tall) in enumerate(zip(panels, lanes, heights, strict=True)):
            bottom = top - tall + AROUND / 2
            axes = figure.add_axes((0.12, bottom / height, 0.79, LANE * len(names) / height))
            _panel(axes, panel, names, longest_s, last=number == len(panels) - 1)
            top -= tall
        figure.text(0.12, 1 - 0.30 / height, heading, fontsize=12.5, weight="bold", va="center")
        figure.text(0.12, 0.16 / height, note, fontsize=8.5, color=SOFT, va="bottom")
        _legend(figure, words, 0.36 / height)
        return figure


def save(figure: Figure, file: Path) -> None:
    """Writes an .svg or .png, whichever the name says. Raises UserError if it cannot."""
    kind = file.suffix.removeprefix(".")
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(file, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    except OSError as error:
        raise UserError(f"the picture {file} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class _Machine:
    ranks: int
    device: str


@dataclass(frozen=True)
class _Kept:
    """What the picture needs of the file."""

    machine: _Machine
    timelines: dict[str, tuple[Span, ...]]


_KEPT = TypeAdapter(_Kept)


def draw_schedule(run: Path) -> Path | None:
    """A run's first MoE layer as it was planned and as it was measured, if it was: `schedule.svg` in its folder."""
    if not (run / FILE).exists():
        return None
    try:
        kept = _KEPT.validate_json((run / FILE).read_bytes())
    except ValidationError as error:
        raise UserError(f"{run / FILE} is damaged: {error.errors(include_url=False)[0]['msg']}; remove it") from None
    panels = [Panel(title, Timeline(spans)) for title, spans in kept.timelines.items()]
    heading = f"The first MoE layer on {kept.machine.ranks} ranks ({kept.machine.device}), in chunks"
    note = "measured: what the device of rank 0 did and waited for, in one update; planned: from times measured at the start"
    save(draw(panels, heading, note), run / "schedule.svg")
    return run / "schedule.svg"


def _lanes(timeline: Timeline) -> list[str]:
    used = list(dict.fromkeys(span.task.resource for span in timeline.spans))
    return [lane for lane in LANES if lane in used] + [lane for lane in used if lane not in LANES]


def _panel(axes: Axes, panel: Panel, lanes: Sequence[str], longest_s: float, last: bool) -> None:
    """Bars with their labels where these fit, the end, and how busy each lane is."""
    end_s = panel.timeline.seconds
    inches_a_second = WIDTH * 0.79 / (longest_s * 1.02)
    for span in panel.timeline.spans:
        lane = lanes.index(span.task.resource)
        axes.barh(lane, span.task.seconds, left=span.start_s, height=BAR, color=_colour(span), edgecolor="white", linewidth=0.5)
        if label := _label(span, span.task.seconds * inches_a_second):
            middle_s = (span.start_s + span.end_s) / 2
            axes.text(middle_s, lane, label, ha="center", va="center_baseline", fontsize=8.2, color="white")
    for lane, name in enumerate(lanes):
        busy = panel.timeline.busy_s(name) / end_s
        axes.barh(lane, end_s, height=BAR, color=IDLE, zorder=0.5)
        axes.text(longest_s * 1.03, lane, f"{busy:.0%} busy", va="center_baseline", fontsize=8.5, color=SOFT)
    axes.axvline(end_s, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set_title(panel.title, loc="left", fontsize=10.5, pad=5)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(0, longest_s * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1e3 * value:,.6g}"))
    axes.tick_params(length=0, labelbottom=last)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    if last:
        axes.set_xlabel("milliseconds", fontsize=9)


def _colour(span: Span) -> str:
    return COLOURS.get(span.task.name.split()[0], OTHER)


def _label(span: Span, inches: float) -> str:
    """The name, else its number alone, else nothing."""
    word, _, number = span.task.name.partition(" ")
    return next((text for text in (span.task.name, number or word) if len(text) * CHARACTER < inches), "")


def _words(panels: Sequence[Panel]) -> list[str]:
    """That stand in the legend."""
    words = {span.task.name.split()[0] for panel in panels for span in panel.timeline.spans}
    return [word for word in COLOURS if word in words] + sorted(words - COLOURS.keys())


def _legend(figure: Figure, words: Sequence[str], bottom: float) -> None:
    patches = [Patch(color=COLOURS.get(word, OTHER), label=word) for word in words]
    figure.legend(
        handles=patches,
        loc="lower left",
        bbox_to_anchor=(0.115, bottom),
        ncols=min(len(patches), LEGEND_COLUMNS),
        frameon=False,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.6,
        borderpad=0,
        fontsize=9,
    )
