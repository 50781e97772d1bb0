"""One page about one or more runs: `python -m launch.report RUN [RUN ...] [--out FILE]`.

The page is a single file that asks the network for nothing: curves are inline SVG, everything that came from outside is
escaped. It follows the reader's light or dark setting; what is drawn in INK takes the colour of the text.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from kernels.errors import UserError
from launch.cli import guarded
from trainer.metrics import LENGTHS, LOAD, METRICS, STEP_WORDS, Metric, Stage, Value, clock, read_records, summary
from trainer.run_dir import read_status, shown, write_atomically

INK = "#010203"  # stands for the text colour until the page is put together
LINES = ("#2f80c8", "#e07b26", "#2a9d7c")  # each readable on white and on near-black
MAX_POINTS = 600  # of a curve
MAX_COLUMNS = 240  # of a heat map
MAX_LAYERS = 8  # heat maps of so many layers, spread over the depth
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
        Panel("Load of the busiest rank over the mean", ("moe/rank_imbalance", "moe/rank_imbalance_owners")),
        Panel("Experts moved for the tokens", ("moe/moved_mib", "moe/copies_mib")),
        Panel("Range of the selection bias", ("moe/bias_range",)),
        Panel("Gradient norm", ("train/grad_norm",)),
        Panel("Learning rate", ("train/lr",)),
        Panel("Training speed", ("perf/tokens_per_s",)),
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
    ),
}


@dataclass(frozen=True)
class Run:
    path: Path
    stage: Stage
    status: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    records: list[dict[str, Value]]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page about the run folders, in this order, to `out` and returns it.

    Raises:
        UserError: a folder is no run or has no records yet, or `out` cannot be written.
    """
    loaded = [_read(path) for path in runs]
    with matplotlib.rc_context(STYLE):
        sections = [_section(run, f"r{number}") for number, run in enumerate(loaded)]
    title = " and ".join(run.path.name for run in loaded)
    page = PAGE.format(title=escape(title), css=CSS, lead=escape(_lead(loaded)), sections="\n".join(sections))
    try:
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"the report {shown(out)} cannot be written: {error.strerror}") from error
    return out


def _read(path: Path) -> Run:
    path = path.resolve()
    status = read_status(path)
    records = read_records(path / "metrics.jsonl")
    if not records:
        raise UserError(f"{shown(path)} has no records yet; the report needs at least one step")
    text = (path / "config.yaml").read_text(encoding="utf-8")
    return Run(path, status["kind"], status, yaml.safe_load(text), text, records)


# ---------------------------------------------------------------- the page


def _lead(runs: Sequence[Run]) -> str:
    kinds = {run.stage for run in runs}
    if kinds == {"pretrain", "rl"}:
        return "A sparse mixture-of-experts language model, pretrained and then fine-tuned by reinforcement learning."
    if kinds == {"rl"}:
        return "Reinforcement learning of a sparse mixture-of-experts language model on a task with a verifiable reward."
    return "Pretraining of a sparse mixture-of-experts language model."


def _section(run: Run, mark: str) -> str:
    heading = {"pretrain": "Pretraining", "rl": "Reinforcement learning"}[run.stage]
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(run))
    figures = [_curves(run, panel, f"{mark}p{number}") for number, panel in enumerate(PANELS[run.stage])]
    return SECTION.format(
        heading=heading,
        name=escape(run.path.name),
        facts=facts,
        table=_summary_table(run),
        figures="\n".join(filter(None, figures)),
        lengths=_lengths(run, f"{mark}lengths"),
        load=_load_map(run, f"{mark}load"),
        config=escape(run.config_text),
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the run is and what it took, name and value."""
    config, status = run.config, run.status
    if run.stage == "pretrain":
        model, train = config["model"], config["train"]
        what = [
            ("model", f"{model['num_layers']} layers, {model['num_experts']} experts, {model['top_k']} per token"),
            ("data", str(config["data"]["kind"])),
            ("plan", f"{train['steps']:,} steps x {train['batch_rows']:,} rows x {train['sequence_length']:,} tokens"),
        ]
    else:
        rollout, loop = config["rollout"], config["loop"]
        what = [
            ("task", str(config["task"]["name"])),
            ("plan", f"{loop['rounds']:,} rounds x {rollout['groups']} groups x {rollout['samples_per_group']} samples"),
            ("over-provision", f"{rollout['over_provision']:g} times the groups are submitted"),
        ]
    seconds, tokens = sum(_numbers(run, "time/step_s")), sum(_numbers(run, "train/tokens"))
    return [
        *what,
        ("learned", f"{tokens:,.0f} tokens in {clock(seconds)}"),
        ("state", f"{status['state']}, attempt {status['attempt']}"),
        ("started", str(status["created"])[:16].replace("T", " ")),
        ("revision", str(status["git"])),
    ]


def _summary_table(run: Run) -> str:
    rows = ""
    for change in summary(run.stage, run.records):
        cells = "".join(f"<td>{escape(text)}</td>" for text in (change.unit, change.first, change.last))
        rows += f"<tr><th scope='row'>{escape(change.label)}</th>{cells}</tr>"
    return f"<table><thead><tr><th></th><th>unit</th><th>first</th><th>last</th></tr></thead><tbody>{rows}</tbody></table>"


def _numbers(run: Run, key: str) -> list[float]:
    return [y for _, y in _points(run, key)]


def _points(run: Run, key: str) -> list[tuple[float, float]]:
    """(step, value) of every record that has a finite value."""
    found = [(record["step"], record[key]) for record in run.records if key in record]
    return [(float(x), float(y)) for x, y in found if isinstance(x, int) and isinstance(y, int | float) and math.isfinite(y)]


# ---------------------------------------------------------------- figures


def _curves(run: Run, panel: Panel, mark: str) -> str:
    """A figure with one curve for each key that has values; nothing if none has."""
    curves = {key: points for key in panel.keys if len(points := _points(run, key)) > 1}
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
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=len(curves), borderaxespad=0, handlelength=1.4)
    notes = [(METRICS[key].label, METRICS[key].meaning) for key in curves]
    ends = [
        f"{METRICS[key].label} from {METRICS[key].text(ys[0][1])} to {METRICS[key].text(ys[-1][1])}"
        for key, ys in curves.items()
    ]
    return _figure(panel.title, notes, _svg(figure, mark, f"{panel.title}: {', '.join(ends)}"))


def _dress(axes: Axes, step_word: str, metric: Metric) -> None:
    axes.set_xlabel(step_word)
    axes.set_ylabel(metric.unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
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
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, borderaxespad=0, handlelength=1.4)
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
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, float(np.percentile(load_CLE, 99.5))))
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
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        for side in axes.spines.values():
            side.set_visible(False)
    figure.supxlabel(STEP_WORDS[run.stage], fontsize=10)
    figure.supylabel("expert", fontsize=10)
    bar = figure.colorbar(picture, ax=grid.ravel().tolist(), pad=0.015, fraction=0.04, ticks=MaxNLocator(5))
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


CSS = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #22262b; --soft: #667078; --line: #dfe2e4; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #dfe3e6; --soft: #98a1a9; --line: #30353a; --card: #1c1f23; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 22px; margin: 56px 0 4px; }
h3 { font-size: 15px; margin: 0 0 6px; }
p { margin: 0; color: var(--soft); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 13px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 14px 24px; margin: 22px 0 26px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
table { border-collapse: collapse; min-width: min(560px, 100%); font-variant-numeric: tabular-nums; }
th, td { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); text-align: left; font-weight: 400; }
thead th { color: var(--soft); font-size: 13px; }
th:nth-child(n+3), td:nth-child(n+3) { text-align: right; padding: 6px 0 6px 28px; }
td:nth-child(2) { color: var(--soft); }
td:last-child { font-weight: 600; }
.figures { display: grid; gap: 18px; margin: 30px 0 18px; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
figure { margin: 0; padding: 16px 18px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
figure.wide { grid-column: 1 / -1; }
figcaption { color: var(--soft); font-size: 13px; line-height: 1.45; margin-top: 8px; }
figcaption b { font-weight: 600; }
details { margin-top: 18px; }
summary { cursor: pointer; color: var(--soft); }
pre { overflow: auto; padding: 16px 18px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tessera: {title}</title>
<style>{css}</style>
</head>
<body>
<main>
<h1>Tessera</h1>
<p>{lead}</p>
{sections}
</main>
</body>
</html>
"""

SECTION = """<section>
<h2>{heading}</h2>
<p><code>{name}</code></p>
<dl>{facts}</dl>
{table}
<div class="figures">
{figures}
{lengths}
{load}
</div>
<details><summary>Configuration</summary><pre>{config}</pre></details>
</section>"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="Writes one page about one or more runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder, such as runs/latest-pretrain")
    parser.add_argument("--out", type=Path, help="the file to write; default: report.html in the last run folder")
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[-1] / "report.html"
    return guarded(lambda: print(shown(write_report(arguments.runs, out))))


if __name__ == "__main__":
    sys.exit(main())
