"""Predicts a pretraining on a cluster for every layout, and recommends one: `python -m launch.plan [name=value ...]`.

Nothing is started and no GPU is needed. machine=... selects published speeds (conf/machine); profile=FILE replaces them by
measured times, YAML or JSON:

    products: [[1.0e12, 0.0019], [4.0e12, 0.0071]]     # floating point operations, seconds
    across: [[1048576, 4.2e-5], [67108864, 1.4e-3]]    # bytes that every GPU sends to other nodes, seconds; also within, memory
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from kernels.errors import UserError
from launch.cli import main
from launch.machines import profiled
from launch.picture import Panel, draw, save
from launch.prediction import LEFT_OUT, LIBRARIES_GIB, SKEWED, Cluster, Prediction, best_of_each, chosen
from trainer.config.plan import LinkConfig, PlanConfig
from trainer.estimate import GIB, in_gib, millions

MILLISECONDS_BELOW_S = 0.1  # steps so short are told in them
TABLE_WIDTH = 200  # columns where the output is no terminal
PARTS = ("products", "tokens", "copies", "gradients", "offload", "optimizer")  # of launch.prediction.StepTime


def plan(config: PlanConfig) -> Prediction | None:
    """Prints the comparison and writes the picture; returns what it would choose, None if nothing fits."""
    console = Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)
    say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    lines: list[str] = []
    if config.picture is not None and not config.picture.parent.is_dir():
        raise UserError(f"picture = {config.picture}: there is no folder {config.picture.parent}")
    if config.profile is not None:
        machine, lines = profiled(config.machine, config.profile)
        config = config.model_copy(update={"machine": machine})
    cluster = Cluster(config)
    for line in _heading(cluster, lines):
        say(line)
    predictions = best_of_each([cluster.predict(layout) for layout in cluster.layouts()])
    best = chosen(predictions)
    console.print(_table(predictions, best))
    shown = best or min(predictions, key=lambda one: one.memory.total)
    for line in [*_verdict(cluster, predictions, best), f"predicted, not measured. Left out: {LEFT_OUT}"]:
        say(line)
    if config.picture is not None:
        heading = f"One MoE layer with its attention, {shown.layout.name} on {config.gpus:,} GPUs"
        note = "predicted for the busiest rank of one micro-batch; a training run plans its own chunks from what it measures"
        save(draw([Panel(*panel) for panel in cluster.timelines(shown)], heading, note), config.picture)
        say(f"one layer's timeline is in {config.picture}")
    return best


def _heading(cluster: Cluster, measured: Sequence[str]) -> list[str]:
    config, model, machine, topology = cluster.config, cluster.model, cluster.machine, cluster.topology
    counts = cluster.counts
    links = [f"{_link(machine.within)} within nodes"] if topology.devices_per_node > 1 else []
    links += [f"{_link(machine.across)} between nodes"] if topology.nodes > 1 else []
    nodes = f"{topology.nodes:,} node{'s' if topology.nodes > 1 else ''} of {topology.devices_per_node}"
    return [
        f"model    {millions(counts.total)} parameters, {millions(counts.active)} active per token; {model.num_moe_layers} MoE "
        f"layers x {model.num_experts} experts, {model.top_k} per token",
        f"cluster  {config.gpus:,} GPUs in {nodes}; a GPU: {machine.memory_gib:g} GiB, {machine.product_tflops:.4g} TFLOP/s of "
        f"products, {', '.join(links)}",
        *(f"measured {line}" for line in measured),
        f"step     {config.batch_rows:,} rows x {config.sequence_length:,} tokens = "
        f"{config.batch_rows * config.sequence_length:,}; loads of experts: {config.loads}",
    ]


def _link(link: LinkConfig) -> str:
    return f"{link.gbytes:.4g} GB/s and {1e6 * link.latency_s:.3g} us"


def _table(predictions: Sequence[Prediction], best: Prediction | None) -> Table:
    unit, scale = _unit(predictions)
    shown = Table(
        title=f"each layout with the rows, recomputation and ZeRO stage that make it fastest: {unit} of a step and its parts",
        caption="tokens, copies, gradients, offload: waited for, beyond what hides them; waiting: all of these. useful: the "
        f"model's products, spread evenly. {SKEWED}: a step with such loads",
    )
    shown.add_column("layout", no_wrap=True)
    parts = [part for part in PARTS if any(_seconds(one, part) > 0 for one in predictions)]
    for name in ("rows", "recompute", "ZeRO", "GiB a GPU", "tokens/s", "step", *parts, "waiting", "useful", SKEWED):
        shown.add_column(name, justify="right")
    ordered = sorted(predictions, key=lambda one: (one is not best, not one.fits, one.step.total_s))
    for one in ordered:
        layout, step = one.layout, one.step
        shown.add_row(
            f"{'> ' if one is best else '  '}{layout.name}",
            str(layout.micro_rows),
            "yes" if layout.recompute else "no",
            str(layout.parallel.zero_stage),
            f"{one.memory.total / GIB:.1f}" if one.fits else f"{one.memory.total / GIB:.1f} > {one.room_gib:.1f}",
            f"{one.tokens_per_s:,.0f}",
            f"{scale * step.total_s:.3f}",
            *(f"{scale * _seconds(one, part):.3f}" for part in parts),
            f"{step.exposed_s / step.total_s:.0%}",
            f"{one.ideal_s / step.total_s:.0%}",
            f"{scale * one.skewed.total_s:.3f}",
        )
    return shown


def _seconds(prediction: Prediction, part: str) -> float:
    return float(getattr(prediction.step, f"{part}_s"))


def _verdict(cluster: Cluster, predictions: Sequence[Prediction], best: Prediction | None) -> list[str]:
    config = cluster.config
    if best is None:
        least = min(predictions, key=lambda one: one.memory.total)
        return [
            f"nothing fits: {least.layout.name} needs least, {in_gib(least.memory.total)} of {least.room_gib:.1f} GiB a GPU "
            f"({LIBRARIES_GIB:g} GiB are set aside for libraries); take more GPUs or shorter rows"
        ]
    options = [
        *best.layout.options,
        f"train.batch_rows={config.batch_rows}",
        f"train.sequence_length={config.sequence_length}",
        "cluster=ray",
        f"cluster.ranks={config.gpus}",
    ]
    if cluster.unscheduled(best).total_s < best.step.total_s:
        options.append("parallel.schedule=off")
    obstacle = cluster.obstacle()
    host = f", and {in_gib(best.memory.host)} of its host's memory" if best.memory.host else ""
    return [
        f"choice   {' '.join(options)}",
        f"why      {_why(best, predictions)}; {in_gib(best.memory.total)} of {best.room_gib:.1f} GiB a GPU{host}",
        *(f"         {_against(other, best, *_unit(predictions))}" for other in predictions if other is not best),
        *([f"but      Tessera cannot run it as it stands: {obstacle}"] if obstacle else []),
        f"tokens   {_transport(cluster, best)}",
        f"schedule {_schedule(cluster, best)}",
    ]


def _why(best: Prediction, predictions: Sequence[Prediction]) -> str:
    fastest = min((one for one in predictions if one.fits), key=lambda one: one.step.total_s)
    if fastest is best:
        return "the fastest that fits"
    return f"as good as the fastest that fits ({fastest.layout.name}), and faster where loads are skewed"


def _against(other: Prediction, best: Prediction, unit: str, scale: float) -> str:
    """What the other layout loses most time with."""
    gaps = {part: _seconds(other, part) - _seconds(best, part) for part in PARTS}
    most = max(gaps, key=lambda part: gaps[part])
    gap = f", {scale * gaps[most]:.3f} {unit} more for {most}" if gaps[most] > 0 else ""
    room = "" if other.fits else f"; does not fit, {in_gib(other.memory.total)} a GPU"
    skewed = f"; {other.skewed.total_s / best.skewed.total_s:.2f} times with {SKEWED} loads"
    return f"{other.layout.name} takes {other.step.total_s / best.step.total_s:.2f} times as long{gap}{skewed}{room}"


def _transport(cluster: Cluster, best: Prediction) -> str:
    if cluster.kind == "peer_memory":
        return "read in the memory of other ranks: a layer is whole, and its tokens hide under nothing"
    choice = cluster.transport(best.layout.micro_rows)
    if len(choice.seconds) == 1:
        return f"travel as {choice.kind}: nodes have one GPU each"
    return f"travel by transport={choice.kind}, as auto would choose by such times: without copies a layer takes {choice}"


def _schedule(cluster: Cluster, best: Prediction) -> str:
    """In how many chunks, and what would be without."""
    degrees, slices, layers = best.layer.degrees, best.slices, cluster.model.num_moe_layers
    under = 1 - slices.exposed_bytes / cluster.dense.total(layers)
    off = cluster.unscheduled(best)
    unit, scale = _unit([best])
    return (
        f"{_chunks(degrees.forward)} forward and {_chunks(degrees.backward)} backward; {under:.0%} of the dense gradients "
        "travel under the backward pass. With parallel.schedule=off a step takes "
        f"{off.total_s / best.step.total_s:.2f} times as long, {scale * off.exposed_s:.3f} {unit} of it waiting "
        f"instead of {scale * best.step.exposed_s:.3f} {unit}"
    )


def _chunks(degree: int) -> str:
    return "whole" if degree == 1 else f"in {degree} chunks"


def _unit(predictions: Sequence[Prediction]) -> tuple[str, float]:
    """What steps are told in, and how many of it are a second."""
    return ("ms", 1e3) if max(one.step.total_s for one in predictions) < MILLISECONDS_BELOW_S else ("s", 1.0)


if __name__ == "__main__":
    sys.exit(main(plan, PlanConfig, "plan"))
