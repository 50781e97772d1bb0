"""Reports a run to the person who started it: on the console, in metrics.jsonl and at W&B, all by one call."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from kernels.errors import UserError
from trainer.config.run import LoggerConfig
from trainer.console import tell
from trainer.hangs import tail
from trainer.memory import resident_gib
from trainer.metrics import AXES, UNKNOWN, USE, Stage, Value, Values, clock, console_line, emit, seconds_left
from trainer.records import Change, read_records, summary
from trainer.run_dir import RunDir, State, shown
from trainer.stopping import Stopped

if TYPE_CHECKING:
    import wandb

WANDB_S = 60.0  # in which W&B lets a run in, or it is tracked offline
UPLOAD_S = 120.0  # that the end of a run waits for what W&B has not got yet
REFUSED = re.compile(r"update \d+ is refused: .*")  # in the log of a rank, trainer/step.py
MEMORY_EVERY_S = 5.0  # measuring it reads the page tables of every process


class Tracker:
    """Tracks one run; `with Tracker(...) as tracker` also writes how the run ended and closes its folder.

    The console gets one line a step and what `say` is told, with the time since the start, and no control characters; the
    same lines are in the attempt's log driver.log. The run takes `devices` now, each for `dollars_per_hour` if that is known.
    """

    def __init__(
        self,
        run: RunDir,
        stage: Stage,
        logger: LoggerConfig,
        total_steps: int,
        devices: int,
        dollars_per_hour: float | None = None,
    ) -> None:
        self.run, self.stage, self.logger, self.total_steps = run, stage, logger, total_steps
        self.devices, self.dollars_per_hour = devices, dollars_per_hour
        self.started = time.monotonic()
        self.began = -1  # the step after which the newest attempt went on; -1: from the start
        self.last: tuple[int, float] | None = None  # step and time of the newest record of this attempt
        self.durations: list[float] = []  # seconds of the steps of this attempt
        self.stepped_s, self.paused_s = 0.0, 0.0  # their sum, and what of it was for checkpoints
        self.told_unknown = False
        self.peak_gib, self.measured = 0.0, -MEMORY_EVERY_S
        self.wandb: wandb.Run | None = None

    def __enter__(self) -> Self:
        try:
            self.run.log_file("driver").parent.mkdir(parents=True, exist_ok=True)
            self.say(self.run.note)
            self.wandb = self._start_wandb()
        except BaseException as error:  # Ctrl-C while W&B is waited for, a full disk
            with _behind(error):
                self.run.close(_end_of(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._tell_wandb(lambda run: run.finish(exit_code=0 if error is None else 1))
        finally:  # a second Ctrl-C does not wait for W&B, and the folder says how the run ended all the same
            with _behind(error):
                self.run.close(_end_of(error))
        if error is None:
            changes = summary(self.stage, read_records(self.run.metrics_file))
            if changes:
                tell(summary_table(changes))
        with _behind(error):
            self.say(f"{'finished' if error is None else 'stopped'}: {shown(self.run.path)}")

    # ------------------------------------------------------------ what happens

    def say(self, text: str) -> None:
        """A line on the console and in the log. UserError if that cannot be written."""
        line = f"{clock(time.monotonic() - self.started):>7}  {text}"
        tell(line)
        _append(self.run.log_file("driver"), line)

    def begin(self, step: int) -> None:
        """An attempt goes on after `step`, or from the start (-1): drops the records of what it does again."""
        self.run.rewind(step)
        self.began = step

    def pause(self) -> None:
        """Ranks are started: the time until the next record is not that of a step."""
        self.last = None

    def log(self, step: int, values: Values) -> None:
        """Records a step. Adds the time since the last record, what follows from it, tokens per second and memory.

        Raises:
            KeyError: a key that trainer/metrics.py does not declare.
            UserError: metrics.jsonl cannot be written.
        """
        complete = emit({**values, **self._measured(step, values)})
        record = {"stage": self.stage, "step": step, **complete}
        _append(self.run.metrics_file, json.dumps(record))
        scalars = {key: value for key, value in complete.items() if isinstance(value, int | float)}
        self._tell_wandb(lambda run: run.log({AXES[self.stage]: step, **scalars}))
        if values.get("train/skipped"):
            log = self.run.log_file("trainer/0")
            reasons = REFUSED.findall(tail(log))
            self.say(reasons[-1] if reasons else f"an update was skipped, see {shown(log)}")
        if not self.told_unknown and {"time/step_s", "train/tokens"} <= complete.keys():
            self.told_unknown = True
            if unknown := [f"{USE[key]} ({why})" for key, why in UNKNOWN.items() if key not in complete]:
                self.say(f"steps lack {', '.join(unknown)}")
        eta_s = seconds_left(self.durations, step, self.total_steps)
        self.say(console_line(self.stage, step, self.total_steps, complete, eta_s))

    def _measured(self, step: int, values: Values) -> dict[str, Value]:
        now = time.monotonic()
        measured: dict[str, Value] = {}
        if self.last is not None and self.last[0] == step - 1:
            self.durations.append(now - self.last[1])
            measured |= self._of_step(now - self.last[1], values)
        self.last = (step, now)
        tokens, seconds = values.get("train/tokens"), values.get("time/train_s")
        if isinstance(tokens, int | float) and isinstance(seconds, int | float):
            measured |= {
                "perf/tokens_per_s": tokens / seconds,
                "perf/tokens_per_s_per_device": tokens / seconds / self.devices,
            }
        if now - self.measured >= MEMORY_EVERY_S:
            self.measured = now
            self.peak_gib = max(self.peak_gib, resident_gib())
        return {**measured, "mem/peak_gib": self.peak_gib}

    def _of_step(self, step_s: float, values: Values) -> dict[str, Value]:
        for key in ("time/checkpoint_s", "time/memory_checkpoint_s"):
            paused_s = values.get(key)
            self.paused_s += paused_s if isinstance(paused_s, int | float) else 0.0
        self.stepped_s += step_s
        told: dict[str, Value] = {"time/step_s": step_s, "perf/checkpoint_share": self.paused_s / self.stepped_s}
        idle_s, tokens = values.get("time/gpu_idle_s"), values.get("train/tokens")
        if isinstance(idle_s, int | float):
            told["perf/gpu_idle_share"] = min(1.0, idle_s / step_s)  # the samples lag behind the step by a part of a second
        if isinstance(tokens, int | float) and tokens and self.dollars_per_hour is not None:
            dollars = self.dollars_per_hour * self.devices * step_s / 3600
            told["perf/dollars_per_million_tokens"] = dollars / tokens * 1e6
        return told

    # ------------------------------------------------------------ W&B

    def _start_wandb(self) -> wandb.Run | None:
        mode = self.logger.wandb
        if mode == "off":
            return None
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        import wandb  # here, because it takes half a second, and runs without W&B do without it
        from wandb.errors import CommError, UsageError

        logging.getLogger("wandb").setLevel(logging.ERROR)
        try:
            with _nobody_at_the_keyboard():
                run = self._init_wandb(mode)
        except (CommError, UsageError) as error:
            folder = shown(self.run.path / "wandb")
            self.say(f"W&B cannot be reached ({error}); tracking offline, `wandb sync {folder}/offline-run-*` sends it later")
            wandb.teardown()  # its process would say that the run is in use
            mode = "offline"
            run = self._init_wandb(mode)
        run.define_metric(AXES[self.stage])
        run.define_metric("*", step_metric=AXES[self.stage])
        if mode == "online":
            self.say(f"W&B: {run.url}")
            self._make_workspace(run)
        return run

    def _make_workspace(self, run: wandb.Run) -> None:
        """Where the project has none yet. W&B's trouble with it is said, and harms nothing."""
        try:
            from trainer.workspace import ensure_workspace  # here, because only runs that are online need it

            self.say(f"W&B workspace: {ensure_workspace(run.entity, run.project, self.stage)}")
        except Stopped:
            raise
        except Exception as error:  # of many libraries and of a server: all of it is said
            command = f"python -m launch.report {shown(self.run.path)} --wandb"
            self.say(f"no W&B workspace ({_first_line(error)}); `{command}` tries again")

    def _tell_wandb(self, call: Callable[[wandb.Run], None]) -> None:
        """A W&B that fails is told nothing more, and the run goes on."""
        if self.wandb is None:
            return
        files = shown(self.run.path / "wandb")
        try:
            call(self.wandb)
        except Stopped:  # while it gets the rest at the end, which nothing else waits for
            self.wandb = None
            self.say(f"W&B is not waited for any longer; `wandb sync {files}/run-*` sends the rest")
        except Exception as error:  # of W&B's own process, which may have died in many ways
            self.wandb = None
            self.say(
                f"W&B has failed ({_first_line(error)}); the run goes on without it. `wandb sync {files}/run-*` sends the rest"
            )

    def _init_wandb(self, mode: Any) -> wandb.Run:
        import wandb

        return wandb.init(
            project=self.logger.project,
            entity=self.logger.entity,
            name=self.run.path.name,
            id=self.run.id,
            job_type=self.stage,
            resume="allow",
            mode=mode,
            dir=self.run.path,
            config=yaml.safe_load(self.run.config_text),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                init_timeout=WANDB_S,
                finish_timeout=UPLOAD_S,
                finish_timeout_raises=True,
            ),
        )


def _end_of(error: BaseException | None) -> State:
    """What status.json says of a run that ended with it."""
    return "finished" if error is None else "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"


@contextmanager
def _behind(error: BaseException | None) -> Iterator[None]:
    """A folder that cannot be written, as on a full disk, is told and does not take the place of what ended the run before."""
    try:
        yield
    except UserError as unwritten:
        if error is None:
            raise
        tell(str(unwritten))


@contextmanager
def _nobody_at_the_keyboard() -> Iterator[None]:
    """At a terminal W&B would ask for a login that it does not find, and wait; whoever began the run may have left."""
    terminal = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal


def _append(file: Path, line: str) -> None:
    try:
        with open(file, "a", encoding="utf-8", errors="backslashreplace") as out:
            out.write(line + "\n")
    except OSError as error:
        raise UserError(f"{shown(file)} cannot be written: {error.strerror}; make room for it") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def summary_table(changes: Sequence[Change], title: str | None = None) -> str:
    """A plain-text table of first and last values, for the end of a run."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("metric")
    table.add_column("unit")
    table.add_column("first", justify="right")
    table.add_column("last", justify="right")
    for change in changes:
        table.add_row(change.label, change.unit, change.first, change.last)
    console = Console(width=100, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
