"""`python -m launch.bench rl`: a whole iteration of GRPO, with ranks and engines as in a run, split into its parts.

generate (a round of rl/april.py), reward (a program in child processes), logprob (a forward pass over the trained rows), update
(forward, backward, AdamW), transfer (the engines take the ranks' weights), rest (what the driver does in between: rows,
advantages). Ranks learn by FSSDP and ZeRO; engines share their GPUs, or have GPUs of their own. Weights are random and lengths
forced; everything else is as in a run, Ray calls included. Shares are relative to what the devices at work can reach: the rate
of a copy, for the bytes that generation and transfer cannot avoid; that of a matrix product, for the FLOPs of logprob and
update.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table

from launch.benchmarks.models import model_config
from launch.benchmarks.peers import Generation, generation_rates
from launch.benchmarks.stages import IterationOptions, Stage
from launch.benchmarks.timing import Ceilings
from launch.machines import read_group
from trainer.config.run import ClusterConfig

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cuda": {
        "model": "moe_2b", "layers": 24, "heads": 16, "kv_heads": 8, "head_dim": 64, "slots": 256, "median": 128,
        "longest": 2048, "cache": 1 << 18, "micro_rows": 8, "warm_rounds": 4, "rounds": 6,
    },
    "cpu": {
        "model": "tiny", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "prompt": 16, "groups": 4, "samples": 4,
        "slots": 16, "median": 8, "longest": 112, "advance": 4, "cache": 2048, "micro_rows": 2, "warm_rounds": 1, "rounds": 3,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Iteration:
    work: str
    stages: tuple[Stage, ...]
    seconds: float  # median of a round
    devices: int  # GPUs of ranks and engines; processes that learn, and engines in places of their own, on a CPU
    trained_tokens: int  # of responses, mean of a round
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure(
    options: IterationOptions, contenders: Mapping[str, Callable[[], Any]], device: torch.device, ceilings: Ceilings
) -> Iterator[Iteration]:
    """One case for every model."""
    from launch.benchmarks.iteration import iterate  # here, since the other benchmarks do without Ray
    from trainer.cluster import check_cluster
    from trainer.worker import check_division

    cluster = read_group("cluster", "local", ClusterConfig, ranks=options.ranks)
    check_cluster(cluster, options.ranks, options.engines)
    for name in options.model:
        model = model_config(options, name, options.prompt + options.longest + 1)
        check_division(model, options.ranks, options.ranks)
        asked = Generation(options.groups * options.samples, options.prompt, options.peer_response, options.seed)
        rates, failures = generation_rates(contenders, model, asked, device)
        notes = [
            f"{peer}: {rate:,.0f} tokens/s for {asked.sequences} sequences of {asked.response} tokens each, so without a tail "
            "to wait for"
            for peer, rate in rates.items()
        ]
        plural = "s" * (options.engines > 1)
        engines = f"{options.engines} engine{plural} apart" if options.engines else "an engine beside each"
        overlap = ", which go on while the ranks learn" if options.overlap else ""
        work = (
            f"an iteration by {name}, {options.ranks} rank{'s' * (options.ranks > 1)} and {engines}{overlap}: {options.groups} "
            f"groups of {options.samples}, N'/N {options.over_provision:g}, {options.slots} slots an engine, median response "
            f"{options.median} tokens, longest {options.longest}"
        )
        found = iterate(options, model, cluster, device, ceilings)
        profiled = [] if found.kernels is None else found.kernels.lines("a logprob and an update")
        if options.profile is not None and found.kernels is not None:
            options.profile.write_text(json.dumps(asdict(found.kernels), indent=1) + "\n", encoding="utf-8")
        stages, trained = found.stages(options), found.trained_tokens[options.warm_rounds :]
        yield Iteration(
            work,
            stages,
            sorted(found.seconds[options.warm_rounds :])[options.rounds // 2],
            options.ranks + options.engines,
            round(sum(trained) / len(trained)),
            failures,
            (*notes, *profiled),
        )


def table(case: Iteration) -> Table:
    shown = Table(title=case.work, title_justify="left")
    for name in ("stage", "devices", "seconds", "of iteration", "tokens", "tokens/s per GPU", "of ceiling"):
        shown.add_column(name, justify="left" if name == "stage" else "right")
    for stage in case.stages:
        each = stage.busy_s * stage.devices
        rate = (
            f"{stage.tokens / each:,.0f}" if stage.tokens else f"{stage.work / 2 / each / 1e9:,.0f} GB/s" if stage.work else ""
        )
        share = "" if stage.share is None else f"{stage.share:.1%}"
        part, tokens = f"{stage.seconds / case.seconds:.1%}", f"{stage.tokens:,}" if stage.tokens else ""
        shown.add_row(stage.name, str(stage.devices), f"{stage.seconds:.4f}", part, tokens, rate, share)
    rate = f"{case.trained_tokens / case.seconds / case.devices:,.0f}"
    shown.add_row("iteration", str(case.devices), f"{case.seconds:.4f}", "", f"{case.trained_tokens:,}", rate, "")
    return shown
