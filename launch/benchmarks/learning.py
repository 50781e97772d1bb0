"""`python -m launch.bench learning`: whether ways to generate learn the same, in as many rounds, decoding steps and seconds.

Whole runs of launch.rl with one rank and one engine in one process. Runs with one seed begin with the same weights, warmed up
once, and draw the same prompts. The last policies are compared by their reward on held-out prompts and on prompts like the
trained ones, with one answer each. A difference between two modes is that of the means over seeds; its error is the standard
error of the per-seed differences, so it includes everything that a seed changes, also the noise of the evaluation.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from rich.table import Table

from launch.benchmarks.options import FileOptions, Listed, OneOrMore
from launch.benchmarks.timing import Ceilings
from rl.evaluation import Estimate
from trainer.config.rl import RLConfig
from trainer.records import read_records


class LearningOptions(FileOptions):
    checkpoint: Path = Field(description="where the warm-up begins: a run folder, a checkpoint, a Hugging Face folder")
    modes: OneOrMore[str] = Field(description="of conf/rollout, with options after +: april+rollout.over_provision=1.5")
    seeds: OneOrMore[int]
    rounds: PositiveInt
    prompts: PositiveInt = Field(description="that an evaluation draws")
    common: Listed[str] = Field(description="options of launch.rl for all runs")
    jobs: PositiveInt = Field(1, description="runs at a time")
    runs_dir: Path = Field(Path("runs"), description="where the run folders go")

    @model_validator(mode="after")
    def _modes_differ(self) -> Self:
        if len(set(self.modes)) < len(self.modes) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"modes = {','.join(self.modes)} and seeds = {','.join(map(str, self.seeds))} must not repeat")
        return self

    def config(self, seed: int, start: Path, *options: str) -> RLConfig:
        """A run's; what is given later holds."""
        from launch.cli import load  # here, since the other benchmarks do without Hydra and Ray

        fixed = ["logger=jsonl", "cluster.ranks=1", f"seed={seed}", f"checkpoint={start}", f"loop.rounds={self.rounds}"]
        fixed += [f"runs_dir={self.runs_dir}", f"loop.checkpoint_every={self.rounds}", f"task.eval_prompts={self.prompts}"]
        return load(RLConfig, "rl", [*fixed, *self.common, *options])

    def of_mode(self, mode: str, seed: int, start: Path) -> RLConfig:
        name, *options = mode.split("+")
        return self.config(seed, start, "warmup.steps=0", f"rollout={name}", *options)


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    kind: {
        "checkpoint": "runs/latest-pretrain", "modes": "sync,april", "seeds": "0,1,2", "rounds": 32, "prompts": 512,
        "common": "",
    }
    for kind in ("cuda", "cpu")
}  # fmt: skip


@dataclass(frozen=True)
class FinalRewards:
    """Of the policy that a run ends with, one answer for each drawn prompt."""

    held_out: Estimate
    training: Estimate  # prompts of the side of the split that was trained


@dataclass(frozen=True)
class Curve:
    """A run. What it counts is over its rounds, one number each; evaluations: (round, held-out reward)."""

    seed: int
    folder: str
    final: FinalRewards
    evaluations: tuple[tuple[int, float], ...]
    trained: tuple[float, ...]  # mean reward of the groups that were learned
    tokens: tuple[float, ...]  # generated
    decode_steps: tuple[float, ...]
    rollout_s: tuple[float, ...]
    update_s: tuple[float, ...]
    stale: tuple[float, ...]  # share of the learned tokens
    oldest: int
    mismatch: float  # nats a token, mean over rounds
    length_ratio: float  # rollout/length_bias of the last round

    def reward_after(self, decode_steps: float) -> float:
        """Held-out reward when this many steps were decoded, on the line between two evaluations."""
        at = np.concatenate([[0.0], np.cumsum(self.decode_steps)])
        return float(np.interp(decode_steps, [at[done] for done, _ in self.evaluations], [r for _, r in self.evaluations]))


@dataclass(frozen=True)
class Mode:
    """Its runs, one a seed, in the order of the seeds."""

    name: str
    runs: tuple[Curve, ...]

    @property
    def held_out(self) -> list[float]:
        return [run.final.held_out.mean for run in self.runs]

    @property
    def training(self) -> list[float]:
        return [run.final.training.mean for run in self.runs]


@dataclass(frozen=True)
class Comparison:
    """All modes; `decode_steps`: as many as the mode had that needed least, so all have been there."""

    work: str
    modes: tuple[Mode, ...]
    decode_steps: float
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure(
    options: LearningOptions, contenders: Mapping[str, Any], device: torch.device, ceilings: Ceilings
) -> Iterator[Comparison]:
    """One case, when all runs are done."""
    for mode in options.modes:
        options.of_mode(mode, 0, options.checkpoint)  # all mistakes before anything is started
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as processes:
        warm = [
            processes.submit(_warmed_up, options.config(seed, options.checkpoint), options.prompts) for seed in options.seeds
        ]
        runs: dict[tuple[str, int], Future[Curve]] = {}
        for seed, start in zip(options.seeds, warm, strict=True):
            for mode in options.modes:
                config = options.of_mode(mode, seed, start.result())
                runs[mode, seed] = processes.submit(_curve, config, options.prompts)
        modes = tuple(Mode(mode, tuple(runs[mode, seed].result() for seed in options.seeds)) for mode in options.modes)
    least = min(sum(run.decode_steps) for mode in modes for run in mode.runs)
    final = modes[0].runs[0].final
    work = (
        f"{options.rounds} rounds, {options.prompts} draws an evaluation: {final.held_out.prompts} distinct held-out and "
        f"{final.training.prompts} distinct training prompts"
    )
    yield Comparison(work, modes, least, notes=tuple(_agreements(modes)))


def _warmed_up(config: RLConfig, prompts: int) -> Path:
    from launch.benchmarks.one_process import reinforce_here

    return reinforce_here(config, rounds=False, prompts=prompts)[0]


def _curve(config: RLConfig, prompts: int) -> Curve:
    from launch.benchmarks.one_process import reinforce_here

    folder, final = reinforce_here(config, rounds=True, prompts=prompts)
    assert final is not None
    records: list[dict[str, Any]] = read_records(folder / "metrics.jsonl")
    rounds = [record for record in records if record["step"] > 0]

    def each(key: str) -> tuple[float, ...]:
        return tuple(record[key] for record in rounds)

    return Curve(
        seed=config.seed,
        folder=str(folder),
        final=FinalRewards(*final),
        evaluations=tuple((r["step"], r["reward/eval_mean"]) for r in records if "reward/eval_mean" in r),
        trained=each("reward/mean"),
        tokens=each("rollout/new_tokens"),
        decode_steps=each("rollout/decode_steps"),
        rollout_s=each("time/rollout_s"),
        update_s=each("time/train_s"),
        stale=each("rollout/stale_token_share"),
        oldest=int(max(each("rollout/staleness_max"))),
        mismatch=mean(each("policy/mismatch_abs")),
        length_ratio=rounds[-1]["rollout/length_bias"],
    )


@dataclass(frozen=True)
class Difference:
    """Of means over seeds, and one standard error of it; NaN of a single seed."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; NaN of a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def difference(those: Sequence[float], first: Sequence[float]) -> Difference:
    """Paired by seed."""
    gaps = [one - other for one, other in zip(those, first, strict=True)]
    return Difference(mean(gaps), standard_error(gaps))


def _agreements(modes: Sequence[Mode]) -> Iterator[str]:
    first, *others = modes
    for mode in others:
        for what, those, ours in (
            ("held-out", mode.held_out, first.held_out),
            ("training", mode.training, first.training),
        ):
            gap = difference(those, ours)
            if not math.isnan(gap.error):
                agrees = "within" if abs(gap.mean) <= 2 * gap.error else "more than"
                yield f"{mode.name} less {first.name}, {what} prompts: {gap}, {agrees} two standard errors"


def table(case: Comparison) -> Table:
    shown = Table(title=case.work, title_justify="left")
    for column in (
        "mode", "held-out", "each seed", "one's error", "less the first", f"after {case.decode_steps:,.0f} steps",
        "training prompts", "less the first", "decoding steps", "tokens", "rollout s", "update s", "stale", "oldest",
        "mismatch", "length ratio",
    ):  # fmt: skip
        shown.add_column(column, justify="left" if column == "mode" else "right")
    first = case.modes[0]
    for mode in case.modes:
        runs, errors = mode.runs, [run.final.held_out.error or 0.0 for run in mode.runs]
        shown.add_row(
            mode.name,
            f"{mean(mode.held_out):.3f}",
            ", ".join(f"{reward:.3f}" for reward in mode.held_out),
            f"{mean(errors):.3f}",
            "" if mode is first else str(difference(mode.held_out, first.held_out)),
            f"{mean(run.reward_after(case.decode_steps) for run in runs):.3f}",
            f"{mean(mode.training):.3f}",
            "" if mode is first else str(difference(mode.training, first.training)),
            f"{mean(sum(run.decode_steps) for run in runs):,.0f}",
            f"{mean(sum(run.tokens) for run in runs):,.0f}",
            f"{mean(sum(run.rollout_s) for run in runs):.1f}",
            f"{mean(sum(run.update_s) for run in runs):.1f}",
            f"{mean(mean(run.stale) for run in runs):.0%}",
            f"{max(run.oldest for run in runs)}",
            f"{mean(run.mismatch for run in runs):.4f}",
            f"{mean(run.length_ratio for run in runs):.3f}",
        )
    return shown
