"""Calls that hang: the process writes its stacks into its log, and if ranks wait in a collective, the driver finds in the logs
which rank did not arrive.

A rank that waits is inside torch.distributed, or NCCL's watchdog says so; a rank that is elsewhere, or says nothing, is the one
that the others wait for.
"""

from __future__ import annotations

import faulthandler
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import IO, Any, TypeVar

from trainer.run_dir import shown

Class = TypeVar("Class", bound=type)
ROOMS = {"kernels", "parallel", "trainer", "rl"}
CALLED = ("trainer/worker.py", "rl/engine/actor.py")  # whose methods the driver calls
SHARE = 0.8  # of the timeout of collectives, after which stacks are written: before the first rank gives up
TAIL_BYTES = 256 * 2**10  # of a log, where its last stacks and warnings are
TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)  # in what gloo and NCCL raise
CUT_OFF = re.compile(r"connection (closed|reset) by peer|remote process exit", re.IGNORECASE)  # in what they raise
WENT_ON = "what took so long has ended"  # written after the stacks of a call that ended after all
STANDS_STILL = "it wrote no stack, so its whole process or machine stands still"
PLACES = 3  # that are shown of the way to where a process is
NCCL_WAITS = re.compile(r"Watchdog caught collective operation timeout: WorkNCCL\(.*?OpType=(\w+)")
PEER_WAITS = re.compile(
    r"failed to receive signal from (rank \d+)"
)  # what a GPU prints that waits in peer memory, and gives up
JOINED = "has joined on"  # in what a rank logs when it has; above it are the words of one that had its place before
FRAME = re.compile(r'^  File "(.+)", line (\d+) in (\S+)$', re.MULTILINE)


class StackWatch:
    """Writes all stacks of this process into `log` when something takes longer than `after_s`, and that it has ended when it
    has. It works without the GIL."""

    def __init__(self, log: IO[str], after_s: float) -> None:
        self.log, self.after_s, self.started = log, after_s, 0.0

    def __enter__(self) -> None:
        self.started = time.monotonic()
        faulthandler.dump_traceback_later(self.after_s, repeat=True, file=self.log)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        took_s = time.monotonic() - self.started
        if kind is None and took_s >= self.after_s:
            self.log.write(f"{WENT_ON}, after {took_s:.1f} s\n")


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
    place: str  # the innermost lines of ours, or why there are none


def whereabouts(log: str) -> Whereabouts:
    """What the end of a rank's log tells, after its last stacks were written."""
    nccl = NCCL_WAITS.findall(log)
    _, found, stacks = log.rpartition("Timeout (")
    if WENT_ON in stacks:
        found = ""
    threads = [FRAME.findall(thread) for thread in re.split(r"^Thread 0x.*$", stacks, flags=re.MULTILINE)]
    frames = next((t for t in threads if any(file.endswith(CALLED) for file, _, _ in t)), []) if found else []
    ours = [frame for frame in frames if ROOMS & {folder.name for folder in list(Path(frame[0]).parents)[:2]}]
    lines = [f"{name} {'/'.join(Path(file).parts[-2:])}:{line}" for file, line, name in ours[:PLACES]]
    place = " < ".join(lines) if lines else STANDS_STILL
    calls = [name for file, _, name in frames if file.endswith("distributed/distributed_c10d.py")]
    waits_in = calls[-1] if calls else nccl[-1].lower() if nccl else None  # the outermost of torch's is what we called
    if waits_in is None and (peers := PEER_WAITS.findall(log)):
        waits_in = f"the memory that ranks share, for {' and '.join(dict.fromkeys(peers))}"
    return Whereabouts(waits_in, place)


def report(logs: Mapping[str, Path]) -> str:
    """Who hangs, and in which operation the others wait for it; `logs`: process -> file."""
    found = {name: whereabouts(of_this_process(file)) for name, file in logs.items()}
    waiting = [f"{name} waits in {one.waits_in} ({one.place})" for name, one in found.items() if one.waits_in is not None]
    missing = [f"{name} hangs ({one.place})" for name, one in found.items() if one.waits_in is None]
    folder = next(iter(logs.values())).parent
    return f"a collective did not end in time: {'; '.join(missing + waiting)}. The stacks of all ranks are in {shown(folder)}"


def gave_up(log_file: Path) -> bool:
    """Whether NCCL, or a GPU, says in a rank's log that it has waited too long for another one, and ends this one."""
    said = of_this_process(log_file)
    return any(pattern.search(said) is not None for pattern in (NCCL_WAITS, PEER_WAITS))


def of_this_process(log_file: Path) -> str:
    """The end of a rank's log, without what one wrote that was lost and had its place before."""
    return tail(log_file).rpartition(JOINED)[2]


def tail(log_file: Path) -> str:
    """The end of a log; nothing if there is none yet."""
    if not log_file.exists():
        return ""
    with open(log_file, "rb") as log:
        log.seek(max(0, log_file.stat().st_size - TAIL_BYTES))
        return log.read().decode(errors="replace")
