"""Traces the next steps of a run in progress: `python -m launch.trace RUN [--steps N] [--ranks 0 3] [--engines 1]
[--tokens N] [--memory]`.

The request is a file in the run's folder, which the run's driver looks for before every step; this command waits for the trace.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from kernels.errors import UserError
from launch.cli import guarded
from trainer.config.rl import MOST_TRACED_TOKENS
from trainer.run_dir import is_open, read_status, shown, traces_of, write_atomically
from trainer.tracing import MOST_STEPS, REQUEST, TraceRequest

LOOK_S = 0.2


def trace(run: Path, request: TraceRequest) -> Path:
    """Asks for a trace and waits for it; returns its folder.

    Raises:
        UserError: the run is not going on, ends before, is asked for another trace already, or cannot make this one.
    """
    run = run.resolve()
    _require_running(run)
    before, file = set(traces_of(run)), run / REQUEST
    if file.exists():
        raise UserError(f"{shown(file)} asks for a trace already; wait for that one, or remove the file")
    log = _driver_log(run)
    told = log.stat().st_size if log.exists() else 0
    try:
        write_atomically(file, request.model_dump_json())
    except OSError as error:
        raise UserError(f"{shown(file)} cannot be written: {error.strerror}") from error
    try:
        while not (new := sorted(set(traces_of(run)) - before)):
            _require_running(run)
            if (failure := _failure(log, told)) is not None:
                raise UserError(failure)
            time.sleep(LOOK_S)
    finally:
        file.unlink(missing_ok=True)
    return new[-1]


def _driver_log(run: Path) -> Path:
    return run / "logs" / f"attempt_{read_status(run)['attempt']}" / "driver.log"


def _failure(log: Path, start: int) -> str | None:
    """What the driver has said about a trace since then that is not one."""
    if not log.exists():
        return None
    with open(log, "rb") as lines:
        lines.seek(start)
        said = [line.strip().partition("  ")[2] for line in lines.read().decode(errors="replace").splitlines()]
    return next((text for text in said if text.startswith(("the trace ", "a trace of "))), None)


def _require_running(run: Path) -> None:
    state = read_status(run)["state"]
    if state == "running" and not is_open(run):
        state = "not going on, though it says so: no command has it open, so it was killed"
    if state != "running":
        raise UserError(f"{shown(run)} is {state}; only a run in progress can be traced")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.trace", description="Traces the next steps of a run that goes on.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/latest-pretrain")
    parser.add_argument("--steps", type=int, default=1, help=f"how many steps or rounds, at most {MOST_STEPS}")
    parser.add_argument("--ranks", type=int, nargs="+", help="which ranks; all, if neither these nor engines are given")
    parser.add_argument("--engines", type=int, nargs="+", help="which engines of RL; all, if neither ranks nor these are given")
    parser.add_argument("--tokens", type=int, default=64, help="how many decoding steps of an engine, the first of the rounds")
    parser.add_argument("--memory", action="store_true", help="with a snapshot of what the GPU's allocator did")
    arguments = parser.parse_args()

    def work() -> None:
        everybody = arguments.ranks is None and arguments.engines is None
        try:
            request = TraceRequest(
                steps=arguments.steps,
                ranks="all" if everybody else arguments.ranks or (),
                engines="all" if everybody else arguments.engines or (),
                tokens=arguments.tokens,
                memory=arguments.memory,
            )
        except ValidationError as error:
            raise UserError(
                f"--steps {arguments.steps} should be from 1 to {MOST_STEPS}, --tokens {arguments.tokens} from 1 to "
                f"{MOST_TRACED_TOKENS}"
            ) from error
        for file in sorted(trace(arguments.run, request).iterdir()):
            print(shown(file))

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
