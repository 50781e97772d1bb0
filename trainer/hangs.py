"""A call that does not end: the process writes its stacks into its log, and where the ranks meet in a collective, the driver
reads there who did not come.

A rank that waits is inside torch.distributed, or NCCL's watchdog says so; one that is elsewhere, or says nothing, is what the
others wait for.
"""

from __future__ import annotations

import faulthandler
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import IO, Any, TypeVar

Class = TypeVar("Class", bound=type)
ROOMS = {"kernels", "parallel", "trainer", "rl"}
CALLED = ("trainer/worker.py", "rl/engine/actor.py")  # whose methods the driver calls
SHARE = 0.8  # of the timeout of collectives, after which stacks are written: before the first rank gives up
TAIL_BYTES = 256 * 2**10  # of a log, where its last stacks and warnings are
TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)  # in what gloo and NCCL raise
CUT_OFF = re.compile(r"connection (closed|reset) by peer|remote process exit", re.IGNORECASE)  # in what they raise
NCCL_WAITS = re.compile(r"Watchdog caught collective operation timeout: WorkNCCL\(.*?OpType=(\w+)")
FRAME = re.compile(r'^  File "(.+)", line (\d+) in (\S+)$', re.MULTILINE)


class StackWatch:
    """Writes all stacks of this process into `log` when something takes longer than `after_s`. It works without the GIL."""

    def __init__(self, log: IO[str], after_s: float) -> None:
        self.log, self.after_s = log, after_s

    def __enter__(self) -> None:
        faulthandler.dump_traceback_later(self.after_s, repeat=True, file=self.log)

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()


def watched(kind: Class) -> Class:
    """Public methods of the class run under its instance's `stack_watch`, once there is one."""
    for name, method in list(vars(kind).items()):
        if callable(method) and not name.startswith("_"):
            setattr(kind, name, _under_watch(method))
    return kind


def _under_watch(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.stack_watch is None:
            return method(self, *args, **kwargs)
        with self.stack_watch:
            return method(self, *args, **kwargs)

    return call


# ---------------------------------------------------------------- what the logs tell


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank was."""

    waits_in: str | None  # a collective; None where it is elsewhere
    place: str  # the innermost line of ours, or why there is none


def whereabouts(log: str) -> Whereabouts:
    """What the end of a rank's log tells, after its last stacks were written."""
    nccl = NCCL_WAITS.findall(log)
    _, found, stacks = log.rpartition("Timeout (")
    threads = [FRAME.findall(thread) for thread in re.split(r"^Thread 0x.*$", stacks, flags=re.MULTILINE)]
    frames = next((t for t in threads if any(file.endswith(CALLED) for file, _, _ in t)), []) if found else []
    ours = [frame for frame in frames if ROOMS & {folder.name for folder in list(Path(frame[0]).parents)[:2]}]
    place = f"{'/'.join(Path(ours[0][0]).parts[-2:])}:{ours[0][1]}, {ours[0][2]}" if ours else "it wrote no stack"
    calls = [name for file, _, name in frames if file.endswith("distributed/distributed_c10d.py")]
    waits_in = calls[-1] if calls else nccl[-1].lower() if nccl else None  # the outermost of torch's is what we called
    return Whereabouts(waits_in, place)


def report(logs: Mapping[str, Path]) -> str:
    """Who hangs, and in which operation the others wait for it; `logs`: process -> file."""
    found = {name: whereabouts(tail(file)) for name, file in logs.items()}
    waiting = [f"{name} waits in {one.waits_in} ({one.place})" for name, one in found.items() if one.waits_in is not None]
    missing = [f"{name} hangs ({one.place})" for name, one in found.items() if one.waits_in is None]
    folder = next(iter(logs.values())).parent
    return f"a collective did not end in time: {'; '.join(missing + waiting)}. The stacks of all ranks are in {folder}"


def tail(log_file: Path) -> str:
    """The end of a log; nothing if there is none yet."""
    if not log_file.exists():
        return ""
    with open(log_file, "rb") as log:
        log.seek(max(0, log_file.stat().st_size - TAIL_BYTES))
        return log.read().decode(errors="replace")
