"""The output of a benchmark: one table per case on the console, and a JSON file with every number."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from launch.benchmarks.contest import Case, Row, Side
from launch.benchmarks.timing import Ceilings


def surroundings(device: torch.device, peers: Mapping[str, str]) -> dict[str, Any]:
    """Where and with what was measured; `peers` gives the version of each package that took part."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "device_type": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "peers": dict(peers),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(
    path: Path, benchmark: str, options: Mapping[str, Any], where: Mapping[str, Any], ceilings: Ceilings, cases: Sequence[Any]
) -> None:
    """Replaces the file, so that a run that ends early leaves the cases it has finished."""
    record = {
        "benchmark": benchmark,
        **where,
        "options": dict(options),
        "ceilings": dataclasses.asdict(ceilings),
        "cases": [dataclasses.asdict(case) for case in cases],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def heading(ceilings: Ceilings, where: Mapping[str, Any]) -> str:
    return (
        f"{where['device']}, torch {where['torch']}: {ceilings.product} {ceilings.tflops:.3g} TF/s, "
        f"copy of {ceilings.copy} {ceilings.copy_tbytes:.3g} TB/s"
    )


def table(case: Case) -> Table:
    """One line a peer and direction; of each pair of columns the first is the peer's. Errors are relative Frobenius norms.

    On a CPU there are no columns for memory.
    """
    shown = Table(title=case.work, title_justify="left")
    shown.add_column("work")
    shown.add_column("peer")
    names = [
        "ms",
        case.unit,
        "ours ms",
        case.unit,
        "ratio",
        "of ceiling",
        "error",
        "ours",
        "saved GB",
        "ours",
        "peak GB",
        "ours",
    ]
    if all(row.ours.memory is None for row in case.rows):
        del names[8:]
    for name in names:
        shown.add_column(name, justify="right")
    for row in case.rows:
        shown.add_row(row.direction, row.peer, *cells(row)[: len(names)])
    return shown


def cells(row: Row) -> list[str]:
    """The numbers of a line, as the table shows them."""
    return [
        *(part for side in (row.theirs, row.ours) for part in (f"{side.time.median_ms:.3f}", f"{side.rate:.4g}")),
        f"{row.ratio:.2f}x",
        f"{row.ceiling_fraction:.1%}",
        *(f"{side.error(row.direction):.1e}" for side in (row.theirs, row.ours)),
        *(gigabytes(side, "saved") for side in (row.theirs, row.ours)),
        *(gigabytes(side, "peak") for side in (row.theirs, row.ours)),
    ]


def gigabytes(side: Side, which: str) -> str:
    """Saved for backward; or the peak, and how much of it is weight gradients: `3.90 (1.21)`."""
    if side.memory is None:
        return ""
    if which == "saved":
        return f"{side.memory.saved / 1e9:.2f}"
    return f"{side.memory.peak / 1e9:.2f} ({side.memory.matrix_gradients / 1e9:.2f})"


def one_row(title: str, row: Mapping[str, str]) -> Table:
    """A case that is one line: its values below their names."""
    shown = Table(title=title, title_justify="left")
    for name in row:
        shown.add_column(name, justify="right")
    shown.add_row(*row.values())
    return shown
