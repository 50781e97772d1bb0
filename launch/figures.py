"""The figures of a report: curves of metrics, and maps of the experts' load, as SVG elements of a page.

INK stands for the colour of the page's text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from launch.recorded import Run
from trainer.metrics import LENGTHS, LOAD, METRICS, STEP_WORDS, Metric, Stage

INK = "#010203"  # stands for the text colour until the page is put together
LINES = ("#2f80c8", "#e07b26", "#2a9d7c")  # each readable on white and on near-black
ROUND = [1, 2, 2.5, 5, 10]  # steps between ticks, times a power of ten
MAX_POINTS = 600  # of a curve
MAX_COLUMNS = 240  # of a heat map
MAX_LAYERS = 8  # heat maps of this many layers, spread over the depth
LOAD_COLOURS = LinearSegmentedColormap.from_list("load", ["#1d4e89", "#8fb3d4", "#d8d8d4", "#efad6c", "#b3400c"])
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

LEGEND_LETTERS = 45  # of all labels, in one row


@dataclass(frozen=True)
class Panel:
    title: str
    keys: tuple[str, ...]  # the first is drawn strongest
    from_zero: bool = True  # whether the axis shows how large the values are, or how they change


PANELS: dict[Stage, tuple[Panel, ...]] = {
    "pretrain": (
        Panel("Loss", ("train/loss", "eval/loss"), from_zero=False),
        Panel("Bits per byte of held-out text", ("eval/bits_per_byte",), from_zero=False),
        Panel("Balance of the experts", ("moe/max_vio", "moe/max_vio_worst_layer", "eval/max_vio")),
        Panel("Load of the busiest rank over the mean", ("moe/rank_imbalance", "moe/rank_imbalance_owners"), from_zero=False),
        Panel("Copies of experts in a layer", ("moe/copies_per_layer",)),
        Panel("Experts moved for the tokens", ("moe/moved_mib", "moe/copies_mib")),
        Panel("Range of the selection bias", ("moe/bias_range",)),
        Panel("Gradient norm", ("train/grad_norm",)),
        Panel("Learning rate", ("train/lr",)),
        Panel("Training speed", ("perf/tokens_per_s",)),
        Panel("Where a step's time goes", ("time/step_s", "time/train_s", "time/communication_exposed_s")),
        Panel("What a step waits for", ("time/communication_exposed_s", "time/copies_exposed_s", "time/plans_exposed_s")),
        Panel("Use of the GPUs", ("perf/mfu", "perf/gpu_idle_share")),
        Panel("Cost", ("perf/dollars_per_million_tokens",)),
        Panel("Memory", ("mem/peak_gib",)),
    ),
    "rl": (
        Panel("Reward", ("reward/mean", "reward/eval_mean")),
        Panel("Response length", ("rollout/length_mean", "rollout/length_max")),
        Panel("Tokens from older weights", ("rollout/stale_token_share",)),
        Panel("Partial rollouts", ("rollout/recycled_samples", "rollout/resumed_samples")),
        Panel("Shares of samples and groups", ("rollout/truncated_share", "reward/zero_std_share")),
        Panel("Entropy", ("train/entropy",)),
        Panel("Trainer against engine", ("policy/mismatch_abs",)),
        Panel("Experts that a replay changes", ("moe/replay_changed",)),
        Panel("Balance of the experts", ("moe/max_vio", "moe/max_vio_worst_layer")),
        Panel("Experts without a token", ("moe/dead_experts",)),
        Panel("Range of the selection bias", ("moe/bias_range",)),
        Panel("What values explain of the returns", ("value/explained_variance",)),
        Panel("Trained over drawn length", ("rollout/length_bias",), from_zero=False),
        Panel("Gradient norm", ("train/grad_norm",)),
        Panel("Rollout speed", ("rollout/tokens_per_s",)),
        Panel("Where a round's time goes", ("time/rollout_s", "time/train_s", "sync/weights_s")),
        Panel("Use of the GPUs", ("perf/mfu", "perf/gpu_idle_share")),
        Panel("Cost", ("perf/dollars_per_million_tokens",)),
    ),
}


def figures(run: Run, mark: str) -> list[str]:
    """All that the run has values for. `mark` begins the ids of their parts, so that these are unique on a page."""
    with matplotlib.rc_context(STYLE):
        found = [_curves(run, panel, f"{mark}p{number}") for number, panel in enumerate(PANELS[run.stage])]
        found += [_lengths(run, f"{mark}lengths"), _load_map(run, f"{mark}load")]
    return [figure for figure in found if figure]


def _curves(run: Run, panel: Panel, mark: str) -> str:
    """A figure with one curve for each key that has values; nothing if none has."""
    curves = {key: points for key in panel.keys if len(points := run.points(key)) > 1}
    if not curves:
        return ""
    figure = Figure(figsize=(4.9, 2.75), layout="constrained")
    axes = figure.add_subplot()
    for number, (key, points) in enumerate(curves.items()):
        thinned = points[:: math.ceil(len(points) / MAX_POINTS)]
        steps, values = zip(*thinned, strict=True)
        sparse = len(points) < len(run.records) / 2
        marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if sparse or len(points) < 3 else {}
        axes.plot(steps, values, color=LINES[number], linewidth=1.8 - 0.3 * number, label=METRICS[key].label, **marker)
    first = METRICS[next(iter(curves))]
    _dress(axes, STEP_WORDS[run.stage], first)
    if panel.from_zero and min(value for points in curves.values() for _, value in points) >= 0:
        axes.set_ylim(bottom=0)
    if len(curves) > 1:
        _legend(axes)
    notes = [(METRICS[key].label, METRICS[key].meaning) for key in curves]
    ends = [
        f"{METRICS[key].label} from {METRICS[key].text(ys[0][1])} to {METRICS[key].text(ys[-1][1])}"
        for key, ys in curves.items()
    ]
    return _figure(panel.title, notes, _svg(figure, mark, f"{panel.title}: {', '.join(ends)}"))


def _legend(axes: Axes) -> None:
    """Above the axes, in two rows where one would be wider than they are."""
    labels = axes.get_legend_handles_labels()[1]
    columns = len(labels) if sum(map(len, labels)) <= LEGEND_LETTERS else 2
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=columns, borderaxespad=0, handlelength=1.4)


def _dress(axes: Axes, step_word: str, metric: Metric) -> None:
    axes.set_xlabel(step_word)
    axes.set_ylabel(metric.unit or metric.label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=metric.format.endswith(".0f"), steps=ROUND))
    if metric.format.endswith("%"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.margins(x=0.015)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _lengths(run: Run, mark: str) -> str:
    """How long the samples were that were trained, and that were drawn; of the last record. Nothing for runs without."""
    found = [(record["step"], record[LENGTHS]) for record in run.records if LENGTHS in record]
    if not found:
        return ""
    step, (trained, drawn) = found[-1][0], np.array(found[-1][1], dtype=float)
    edges = np.linspace(0, run.config["rollout"]["max_new_tokens"], len(trained) + 1)
    figure = Figure(figsize=(4.9, 2.75), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(drawn, edges, fill=True, color=LINES[0], alpha=0.35, label="drawn")
    axes.stairs(trained, edges, color=LINES[1], linewidth=1.8, label="trained")
    _dress(axes, "response tokens", METRICS[LENGTHS])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes)
    means = [float((shares * (edges[:-1] + edges[1:]) / 2).sum()) for shares in (trained, drawn)]
    alt = f"Lengths after round {step}: trained {means[0]:.1f} tokens in the mean, drawn {means[1]:.1f}"
    notes = "samples drawn in the last 8 rounds, waiting ones with what they have, and samples trained in them"
    return _figure("Lengths trained and drawn", [("share of samples", notes)], _svg(figure, mark, alt))


def _load_map(run: Run, mark: str) -> str:
    """Step x expert for each layer: the expert's load over the mean load. Nothing for runs without records of it."""
    found = [(record["step"], record[LOAD]) for record in run.records if LOAD in record]
    if len(found) < 2:
        return ""
    steps = [int(step) for step, _ in found if isinstance(step, int)]
    shares_TLE = np.array([table for _, table in found], dtype=float)
    bins = np.array_split(np.arange(len(steps)), min(MAX_COLUMNS, len(steps)))
    load_CLE = np.stack([shares_TLE[rows].mean(axis=0) for rows in bins]) * shares_TLE.shape[2]
    depth, experts = load_CLE.shape[1:]
    layers = sorted({round(place) for place in np.linspace(0, depth - 1, min(MAX_LAYERS, depth))})
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(10.2, 0.55 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    most = max(2.0, float(np.percentile(load_CLE, 99.5)))
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=most)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes, layer in zip(grid.flat, layers, strict=False):
        extent = (steps[0] - 0.5, steps[-1] + 0.5, experts - 0.5, -0.5)
        picture = axes.imshow(
            load_CLE[:, layer].T, aspect="auto", extent=extent, norm=norm, cmap=LOAD_COLOURS, interpolation="nearest"
        )
        axes.set_title(f"MoE layer {layer + 1}", fontsize=10)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=ROUND))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        for side in axes.spines.values():
            side.set_visible(False)
    figure.supxlabel(STEP_WORDS[run.stage], fontsize=10)
    figure.supylabel("expert", fontsize=10)
    above = [tick for tick in MaxNLocator(3, steps=ROUND).tick_values(1.0, most) if 1 < tick <= most]
    bar = figure.colorbar(picture, ax=grid.ravel().tolist(), pad=0.015, fraction=0.04, ticks=[0, 0.5, 1, *above])
    bar.set_label("load / mean load")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    first, last = load_CLE[0].max(), load_CLE[-1].max()
    alt = f"Load of {experts} experts in {len(layers)} layers: the fullest from {first:.2f} to {last:.2f} times the mean"
    notes = "an expert's share of its layer's tokens over the even share; 1, grey, is balanced"
    return _figure("Load of the experts", [("load / mean load", notes)], _svg(figure, mark, alt), "wide")


def _figure(title: str, notes: Sequence[tuple[str, str]], svg: str, kind: str = "") -> str:
    caption = "<br>".join(f"<b>{escape(label)}</b> {escape(meaning)}" for label, meaning in notes)
    return f"<figure class='{kind}'><h3>{escape(title)}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def _svg(figure: Figure, mark: str, alt: str) -> str:
    """The figure as an element of the page: ids unique on it, no metadata, text in the page's colour and font."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": mark}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r' (id="|xlink:href="#)', rf" \1{mark}-", text).replace("url(#", f"url(#{mark}-")
    text = re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(alt)}">', text, count=1
    )
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    return text.replace(INK, "currentColor")
