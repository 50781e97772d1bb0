"""Measures Tessera's own operations against others on this machine: `python -m launch.bench NAME`.

Prints one table per case and writes every number to bench-<name>.json. Options are written name=value; `--help` lists them.
Without a name it runs every benchmark that has competitors (benchmarks/overview.py).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kernels.errors import UserError
from launch.benchmarks import (
    checkpoints,
    collectives,
    experts,
    fssdp,
    learning,
    old_tokens,
    overview,
    placement,
    pretrain,
    record,
    rl,
    rollout,
    router,
    schedule,
    vocab_loss,
    weights,
)
from launch.benchmarks.contest import Work
from launch.benchmarks.options import SHAPES, FileOptions, Options, read_options
from launch.benchmarks.peers import GENERATION_PEERS, PACKAGES
from launch.benchmarks.timing import measure_ceilings

CTRL_C, SIGTERM = 130, 143  # exit codes, as shells have them
TABLE_WIDTH = 200  # columns where the output is no terminal


@dataclass(frozen=True)
class Benchmark:
    options: type[FileOptions]
    defaults: Mapping[str, Mapping[str, Any]]  # of each type of device
    peers: Mapping[str, Callable[[], Any] | None]  # how to load each; None where the measurement makes it itself
    measure: Callable[..., Iterator[Any]]  # of cases, each with failures and notes beside what its table shows
    table: Callable[[Any], Table] = record.table


BENCHMARKS = {
    "experts": Benchmark(experts.ExpertsOptions, experts.DEFAULTS, experts.PEERS, experts.measure),
    "vocab_loss": Benchmark(vocab_loss.VocabLossOptions, vocab_loss.DEFAULTS, vocab_loss.PEERS, vocab_loss.measure),
    "router": Benchmark(router.RouterOptions, router.DEFAULTS, router.PEERS, router.measure),
    "fssdp": Benchmark(fssdp.FssdpOptions, fssdp.DEFAULTS, fssdp.PEERS, fssdp.measure),
    "collectives": Benchmark(collectives.CollectivesOptions, collectives.DEFAULTS, {}, collectives.measure, collectives.table),
    "placement": Benchmark(placement.PlacementOptions, placement.DEFAULTS, {}, placement.measure, placement.table),
    "schedule": Benchmark(schedule.ScheduleOptions, schedule.DEFAULTS, {}, schedule.measure, schedule.table),
    "pretrain": Benchmark(pretrain.PretrainOptions, pretrain.DEFAULTS, pretrain.PEERS, pretrain.measure, pretrain.table),
    "rollout": Benchmark(rollout.RolloutOptions, rollout.DEFAULTS, GENERATION_PEERS, rollout.measure, rollout.table),
    "rl": Benchmark(rl.IterationOptions, rl.DEFAULTS, GENERATION_PEERS, rl.measure, rl.table),
    "learning": Benchmark(learning.LearningOptions, learning.DEFAULTS, {}, learning.measure, learning.table),
    "old_tokens": Benchmark(old_tokens.OldTokensOptions, old_tokens.DEFAULTS, {}, old_tokens.measure, old_tokens.table),
    "weights": Benchmark(weights.WeightsOptions, weights.DEFAULTS, {}, weights.measure, weights.table),
    "checkpoints": Benchmark(checkpoints.CheckpointsOptions, checkpoints.DEFAULTS, {}, checkpoints.measure, checkpoints.table),
}


def bench(name: str, arguments: Sequence[str]) -> Path:
    """Runs one benchmark and returns the JSON file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    benchmark = BENCHMARKS[name]
    options = read_options(benchmark.options, _defaults(name, device), arguments)
    asked = options.model_dump().get("peers")  # the router's only peer is plain torch
    contenders = _contenders(benchmark.peers, asked, device)
    versions = {peer: PACKAGES[peer].version() for peer in contenders if peer in PACKAGES}
    where, ceilings = record.surroundings(device, versions), measure_ceilings(device)
    console = _console()
    console.print(record.heading(ceilings, where), highlight=False)
    cases: list[Any] = []
    for case in benchmark.measure(options, contenders, device, ceilings):
        cases.append(case)
        record.write(options.out, name, options.model_dump(mode="json"), where, ceilings, cases)
        console.print(benchmark.table(case))
        for note in case.notes:
            console.print(note, soft_wrap=True, markup=False, highlight=False)
        for peer, why in case.failures.items():
            console.print(f"{peer} could not do this: {why}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"every number is in {options.out}", soft_wrap=True, highlight=False)
    return options.out


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)


def compare() -> int:
    """All that others do as well; the exit code."""
    found: list[overview.Line] = []
    failures: dict[str, str] = {}
    for name, told in overview.run(overview.COMPARED):
        if isinstance(told, Path):
            found += overview.read(told)
        else:
            failures[name] = told
    console = _console()
    console.print(overview.table(found))
    if not torch.cuda.is_available():
        console.print(overview.WITHOUT_GPU, soft_wrap=True, highlight=False)
    for name, why in failures.items():
        console.print(f"{name}: {why}", soft_wrap=True, markup=False, highlight=False)
    return int(any(why != overview.NEEDS_TWO for why in failures.values()))


def _defaults(name: str, device: torch.device) -> dict[str, Any]:
    return {**BENCHMARKS[name].defaults[device.type], "out": f"bench-{name}.json"}


def _contenders(
    peers: Mapping[str, Callable[[], Work] | None], asked: Sequence[str] | None, device: torch.device
) -> dict[str, Callable[[], Work] | None]:
    """Plain torch always; the packages that were asked for, or else those that are here. They run on a GPU only."""
    able = {peer for peer in peers if peer not in PACKAGES or (device.type == "cuda" and PACKAGES[peer].installed())}
    for peer in asked or ():
        if device.type != "cuda":
            raise UserError(f"peers = {peer} needs a GPU, and torch finds none here")
        if peer not in able:
            raise UserError(f"peers = {peer} is not installed; it needs {', '.join(PACKAGES[peer].modules)}")
    return {
        peer: load for peer, load in peers.items() if peer in able and (asked is None or peer not in PACKAGES or peer in asked)
    }


def usage(names: Sequence[str]) -> str:
    """A page: the options of these benchmarks, one under the other."""
    lines = [
        f"usage: python -m launch.bench {'|'.join(BENCHMARKS)} [name=value ...]",
        f"       python -m launch.bench    # {', '.join(overview.COMPARED)}, and one table of ours beside the fastest other",
    ]
    if any(issubclass(BENCHMARKS[name].options, Options) for name in names):
        lines += ["", "models, and their sizes:"]
        lines += [f"  {name:<17}{', '.join(f'{key} {value}' for key, value in vars(s).items())}" for name, s in SHAPES.items()]
    for name in names:
        benchmark = BENCHMARKS[name]
        lines += ["", f"options of {name}, with their defaults on a GPU and on a CPU:"]
        on_gpu, on_cpu = (_defaults(name, torch.device(kind)) for kind in ("cuda", "cpu"))
        for key, field in benchmark.options.model_fields.items():
            default = on_gpu.get(key, "" if field.default is None else field.default)
            on_both = default if on_gpu.get(key) == on_cpu.get(key) else f"{default} or {on_cpu[key]}"
            note = field.description if field.description and key != "out" else ""
            lines.append(f"  {f'{key}={on_both}':<41} {note}".rstrip())
    return "\n".join([*lines, "", "A size that is given replaces that of the model. Lists are written a,b."])


def run(arguments: Sequence[str]) -> int:
    """What the arguments ask for; the exit code. UserError for a benchmark that is none, or an option that is none of its."""
    if not arguments:
        return compare()
    name, *rest = arguments
    if name not in BENCHMARKS:
        close = get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"{name} is no benchmark; {hint}choices: {', '.join(BENCHMARKS)}")
    bench(name, rest)
    return 0


class Terminated(KeyboardInterrupt):
    """By SIGTERM, as `timeout` and SLURM send it: what ends at Ctrl-C ends in the same way."""


@contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """Raises `Terminated` in the `with` block once: those who send a signal to a group may send it twice."""

    def end(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 2 for a person's mistake, 130 for Ctrl-C, 143 for SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(usage([name for name in BENCHMARKS if name in arguments] or list(BENCHMARKS)))
        return 0
    try:
        with ending_at_sigterm():
            return run(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        name, code = ("SIGTERM", SIGTERM) if isinstance(error, Terminated) else ("Ctrl-C", CTRL_C)
        print(f"\nstopped by {name}; the file holds the cases that were finished", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
