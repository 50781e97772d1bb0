"""Shows in the terminal what a run is doing: `python -m launch.watch RUN [--once]`. It reads only the run's folder.

A finished run is shown once. Others are refreshed every two seconds, until they have finished or Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kernels.errors import UserError
from launch.cli import guarded
from trainer.hangs import tail
from trainer.metrics import ETA_STEPS, METRICS, STEP_WORDS, Stage, clock, seconds_left
from trainer.records import parsed_record
from trainer.run_dir import option, read_config, read_status, shown

REFRESH_S = 2.0
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 36  # of a curve
MESSAGES = 6
STEP_LINE = re.compile(rf"({'|'.join(STEP_WORDS.values())}) +\d+/\d")  # of the driver's log
COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}
SHOWN: dict[Stage, tuple[str, ...]] = {
    "pretrain": (
        *("train/loss", "eval/bits_per_byte", "train/grad_norm", "train/lr", "train/skipped"),
        *("moe/max_vio", "moe/rank_imbalance", "perf/tokens_per_s", "perf/tokens_per_s_per_device", "perf/mfu"),
        *("time/step_s", "time/communication_exposed_s", "perf/gpu_idle_share", "perf/dollars_per_million_tokens"),
        *("time/checkpoint_s", "time/memory_checkpoint_s", "perf/checkpoint_share", "mem/peak_gib"),
    ),
    "rl": (
        *("reward/mean", "reward/eval_mean", "train/loss", "train/entropy", "train/grad_norm", "train/skipped"),
        *("rollout/stale_token_share", "rollout/staleness_max", "rollout/length_mean", "moe/max_vio", "rollout/engines"),
        *("rollout/tokens_per_s", "perf/tokens_per_s", "perf/tokens_per_s_per_device", "perf/mfu", "time/step_s"),
        *("time/communication_exposed_s", "perf/gpu_idle_share", "perf/dollars_per_million_tokens"),
        *("perf/checkpoint_share", "mem/peak_gib"),
    ),
}


@dataclass
class Curves:
    """The numbers of a run so far. `update` reads what has been added since; a file that was cut back is read again."""

    file: Path
    step: int = 0
    values: dict[str, list[float]] = field(default_factory=dict)
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=ETA_STEPS))  # durations of the last steps
    _read: int = 0  # bytes
    _inode: int = 0

    def update(self) -> None:
        if not self.file.exists():
            return
        state = self.file.stat()
        if state.st_ino != self._inode or state.st_size < self._read:
            self.step, self.values, self._read, self._inode = 0, {}, 0, state.st_ino
            self.recent_s.clear()
        with open(self.file, "rb") as lines:
            lines.seek(self._read)
            for line in lines:
                if not line.endswith(b"\n"):  # it is being written
                    break
                self._read += len(line)
                self._add(parsed_record(line, self.file))

    def _add(self, record: Mapping[str, Any]) -> None:
        self.step = int(record["step"])
        for key, value in record.items():
            if key in METRICS and isinstance(value, int | float) and math.isfinite(value):
                self.values.setdefault(key, []).append(float(value))
        if "time/step_s" in record:
            self.recent_s.append(self.values["time/step_s"][-1])


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve of at most `width` characters, from the smallest to the largest value; each is a mean of neighbours."""
    if not values:
        return ""
    count = min(width, len(values))
    means = []
    for index in range(count):
        part = values[index * len(values) // count : (index + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    spread = (high - low) or 1.0
    return "".join(BARS[round((mean - low) / spread * (len(BARS) - 1))] for mean in means)


def messages(run: Path, attempt: int) -> list[str]:
    """The last things that a person should know: warnings of all processes, and what the driver said beside the steps."""
    folder = run / "logs" / f"attempt_{attempt}"
    found = []
    for file in sorted(folder.glob("*.log")):
        lines = tail(file).splitlines()
        if file.stem == "driver":
            said = [text for line in lines if (text := line.strip().partition("  ")[2])]
            told = [text for text in said if not STEP_LINE.match(text)]
            if len(told) < len(said):  # steps are made, and what was planned is no news any more
                told = told[next((place for place, text in enumerate(told) if text.startswith("starting ")), 0) :]
            found += [f"driver: {text}" for text in told][-MESSAGES:]
        else:
            found += [f"{file.stem}: {line}" for line in lines if " WARNING " in line or " ERROR " in line][-MESSAGES // 2 :]
    return found[-MESSAGES:]


# ---------------------------------------------------------------- the picture


def picture(run: Path, curves: Curves, now: float) -> Panel:
    """Everything about the run, as of `now` (seconds since the epoch)."""
    status = read_status(run)
    stage: Stage = status["kind"]
    total = option(read_config(run), "train.steps" if stage == "pretrain" else "loop.rounds", int)
    state = str(status["state"])
    parts: list[Any] = [_progress(stage, state, curves, total, now), _numbers(stage, curves)]
    told = messages(run, status["attempt"])
    if told:
        parts.append(Text("\n".join(told), style="dim"))
    title = Text.assemble((state, COLOURS[state]), f", attempt {status['attempt']}: {shown(run)}")
    revision = Text(f"revision {status['git']}")
    return Panel(Group(*parts), title=title, title_align="left", subtitle=revision, subtitle_align="right")


def _progress(stage: Stage, state: str, curves: Curves, total: int, now: float) -> Table:
    grid = Table.grid(padding=(0, 2))
    words = f"{STEP_WORDS[stage]} {curves.step:,} of {total:,}"
    if state == "running":
        left = seconds_left(list(curves.recent_s), curves.step, total)
        words += "" if left is None else f", ETA {clock(left)}"
        if curves.file.exists() and (silent := now - curves.file.stat().st_mtime) > 10 * REFRESH_S:
            words += f", last record {clock(silent)} ago ({datetime.fromtimestamp(now - silent):%H:%M:%S})"
    grid.add_row(ProgressBar(total=total, completed=curves.step, width=WIDTH), words)
    return grid


def _numbers(stage: Stage, curves: Curves) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "first", "last", "unit"):
        table.add_column(name, justify="right" if name in ("first", "last") else "left")
    table.add_column("from first to last")
    for key in SHOWN[stage]:
        if values := curves.values.get(key):
            metric = METRICS[key]
            table.add_row(metric.label, metric.text(values[0]), metric.text(values[-1]), metric.unit, sparkline(values))
    return table


def watch(run: Path, once: bool) -> None:
    """Shows the run until it has finished, or once."""
    read_status(run)
    curves, console = Curves(run / "metrics.jsonl"), Console()
    curves.update()
    if once or read_status(run)["state"] == "finished":
        console.print(picture(run, curves, time.time()))
        return
    try:
        with Live(picture(run, curves, time.time()), console=console, auto_refresh=False) as live:
            while read_status(run)["state"] != "finished":
                time.sleep(REFRESH_S)
                curves.update()
                live.update(picture(run, curves, time.time()), refresh=True)
    except FileNotFoundError as error:
        raise UserError(f"{shown(run)} is gone: {error.filename}") from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.watch", description="Shows what a run is doing.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/latest-pretrain")
    parser.add_argument("--once", action="store_true", help="show it once, whatever its state")
    arguments = parser.parse_args()
    return guarded(lambda: watch(arguments.run, arguments.once))


if __name__ == "__main__":
    sys.exit(main())
