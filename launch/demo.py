"""The main job, end to end: pretrain a small sparse MoE on Python's own source, then fine-tune it by RL. `make demo` runs this.

Arguments are options that both stages have, for example `python -m launch.demo seed=1`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kernels.errors import UserError
from launch.cli import guarded, load
from launch.pretrain import pretrain
from launch.report import write_report
from launch.rl import reinforce
from trainer.config.rl import RLConfig
from trainer.config.run import PretrainConfig
from trainer.metrics import METRICS, Value, clock
from trainer.records import read_records
from trainer.run_dir import shown

# What the closing table shows of each stage: a metric's first and last value ...
CHANGES = {"pretrain": ("eval/bits_per_byte", "moe/max_vio"), "rl": ("reward/eval_mean", "reward/mean")}
# ... and, of all its records, how to sum them up.
TOTALS = {
    "pretrain": (
        ("moe/rank_imbalance_owners", "mean"),
        ("moe/rank_imbalance", "mean"),
        ("moe/copies_per_layer", "mean"),
        ("moe/copies_mib", "max"),
        ("moe/moved_mib", "median"),
        ("time/copies_exposed_s", "median"),
        ("perf/tokens_per_s", "median"),
    ),
    "rl": (
        ("rollout/stale_token_share", "mean"),
        ("rollout/recycled_samples", "sum"),
        ("rollout/tokens_per_s", "median"),
        ("mem/peak_gib", "max"),
    ),
}
Records = list[dict[str, Value]]


def demo(options: list[str]) -> None:
    started = time.monotonic()
    console = Console()
    config = load(PretrainConfig, "pretrain", options)
    load(RLConfig, "rl", ["checkpoint=none.yet", *options])  # a mistake for the second stage is one before the first
    if config.run_name is not None:
        raise UserError(
            f"launch.demo makes two runs, and run_name={config.run_name} names one; leave it out, or give runs_dir=..."
        )
    console.rule("1 of 2: pretraining")
    pretrained = pretrain(config)
    if pretrained is None:  # a dry run has nothing to fine-tune
        return
    console.rule("2 of 2: reinforcement learning with partial rollouts")
    tuned = reinforce(load(RLConfig, "rl", [f"checkpoint={pretrained}", *options]))
    assert tuned is not None
    report = write_report([pretrained, tuned], tuned / "report.html")
    console.rule(f"done in {clock(time.monotonic() - started)}")
    console.print(closing_table(pretrained, tuned))
    console.print(f"runs     {shown(pretrained)}  {shown(tuned)}", soft_wrap=True)
    console.print(f"report   open {shown(report)} in a browser", soft_wrap=True)
    if list(tuned.glob("wandb/offline-run-*")):
        console.print(f"W&B      offline; upload with: wandb sync {shown(tuned)}/wandb/offline-run-*", soft_wrap=True)


def closing_table(pretrained: Path, tuned: Path) -> Table:
    """First and last values of both stages, then sums over their records."""
    table = Table("", "unit", "first", "last")
    for column in table.columns[2:]:
        column.justify = "right"
    for stage, run in (("pretrain", pretrained), ("rl", tuned)):
        records = read_records(run / "metrics.jsonl")
        for key in CHANGES[stage]:
            values = of(records, key)
            table.add_row(METRICS[key].label, METRICS[key].unit, METRICS[key].text(values[0]), METRICS[key].text(values[-1]))
        for key, how in TOTALS[stage]:
            if values := of(records, key):  # one rank has no copies to tell of
                table.add_row(
                    f"{METRICS[key].label} ({stage}, {how})", METRICS[key].unit, "", METRICS[key].text(total(values, how))
                )
        table.add_section()
    return table


def of(records: Records, key: str) -> list[float]:
    return [value for record in records if isinstance(value := record.get(key), int | float)]


def total(values: list[float], how: str) -> float:
    ordered = sorted(values)
    return {
        "median": ordered[len(ordered) // 2],
        "mean": sum(values) / len(values),
        "sum": sum(values),
        "max": ordered[-1],
    }[how]


def main(argv: Sequence[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print("usage: python -m launch.demo [name=value ...]\n\nOptions are those that launch.pretrain and launch.rl share.")
        return 0
    return guarded(lambda: demo(list(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
