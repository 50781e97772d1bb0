"""`python -m launch.bench`: all benchmarks that have competitors, one after the other, and a table of ours and the fastest
other.

Each runs with its defaults for this machine in a process of its own, so that all memory is freed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from launch.benchmarks.contest import OURS

COMPARED = ("experts", "vocab_loss", "router", "fssdp", "pretrain")
WITHOUT_GPU = "without a GPU ours are the references, which are made to repeat bit for bit and not to be fast"
NEEDS_TWO = "needs two GPUs"
VARIANTS = {"no_copies", "waits", "local"}  # of ours, in fssdp


@dataclass(frozen=True)
class Line:
    """Ours beside the fastest other, in milliseconds; None where no other could."""

    work: str
    ours_ms: float
    peer: str | None
    peer_ms: float | None


def options(name: str, gpus: int) -> list[str] | None:
    """What a benchmark is told on a machine with this many GPUs; None if it cannot run there."""
    if name == "fssdp" and gpus == 1:
        return None
    return [f"ranks={gpus}"] if name == "pretrain" and gpus > 1 and gpus & (gpus - 1) == 0 else []


def run(names: Sequence[str], folder: Path = Path()) -> Iterator[tuple[str, Path | str]]:
    """(name, its file, or why there is none) of each, once it has run; what it prints goes where this process prints."""
    gpus = torch.cuda.device_count()
    for name in names:
        told = options(name, gpus)
        if told is None:
            yield name, NEEDS_TWO
            continue
        out = folder / f"bench-{name}.json"
        benchmark = subprocess.Popen([sys.executable, "-m", "launch.bench", name, f"out={out}", *told])
        try:
            code = benchmark.wait()
        except BaseException:  # a signal, which it need not have had: it ends its ranks
            benchmark.terminate()
            benchmark.wait()
            raise
        yield name, out if code == 0 else f"ended with code {code}"


def lines(record: dict[str, Any]) -> Iterator[Line]:
    """Of a benchmark's file."""
    for case in record["cases"]:
        if "updates" in case:
            times = {name: one["time"]["median_ms"] for name, one in case["updates"].items()}
            yield _line(case["work"], times.pop(OURS), times)
            continue
        for direction in dict.fromkeys(row["direction"] for row in case["rows"]):
            rows = [row for row in case["rows"] if row["direction"] == direction]
            times = {row["peer"]: row["theirs"]["time"]["median_ms"] for row in rows if row["peer"] not in VARIANTS}
            yield _line(f"{case['work']}: {direction}", rows[0]["ours"]["time"]["median_ms"], times)


def _line(work: str, ours_ms: float, times: dict[str, float]) -> Line:
    fastest = min(times, key=lambda name: times[name], default=None)
    return Line(work, ours_ms, fastest, None if fastest is None else times[fastest])


def table(found: Sequence[Line]) -> Table:
    shown = Table(title="ours beside the fastest other", title_justify="left")
    for name in ("work", "fastest other", "ms", "ours ms", "ratio"):
        shown.add_column(name, justify="left" if name in ("work", "fastest other") else "right")
    for line in found:
        theirs = (
            ("", "", "") if line.peer_ms is None else (line.peer, f"{line.peer_ms:.3f}", f"{line.peer_ms / line.ours_ms:.2f}x")
        )
        shown.add_row(line.work, theirs[0], theirs[1], f"{line.ours_ms:.3f}", theirs[2])
    return shown


def read(path: Path) -> list[Line]:
    return list(lines(json.loads(path.read_text(encoding="utf-8"))))
