"""Runs a program that a model wrote: no network, no files but its own, bounded time, memory, disk, processes and output.

A program's crash, endless loop or flood is its own fault and an `Outcome`; a sandbox that cannot be set up is a `UserError`.
How programs are isolated is in `rl/rewards/sandbox_process.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Literal, get_args

from kernels.errors import UserError

# namespaces: Linux's; none: limits only, so the program has the network and every file of whoever runs it
Isolation = Literal["namespaces", "none"]
SANDBOX = Path(__file__).with_name("sandbox_process.py")
CHUNK = 1 << 16
LOOK_S = 0.05  # between two looks at how much memory all processes take
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Limits:
    """What one program may use. `memory_mib` is what each of its processes may ask for, and what all of them may take together;
    what one inherits from another counts for both. `processes` counts threads, too; `output_kib` is of its standard output.
    Without isolation a process that detaches is not counted."""

    timeout_s: float
    memory_mib: int = 1024
    disk_mib: int = 64
    processes: int = 16
    output_kib: int = 1024


@dataclass(frozen=True)
class Outcome:
    """How a program ended: by itself with `exit_code` (128 + signal), or stopped at a limit."""

    output: str
    exit_code: int | None
    stopped: Literal["timeout", "output", "memory"] | None = None


def run_program(source: str, stdin: str, limits: Limits, isolation: Isolation) -> Outcome:
    """Runs Python `source` with `stdin`. With namespaces, all that it started ends with it.

    Raises UserError when the machine does not allow the isolation.
    """
    isolated = isolation == "namespaces"  # then the program has a folder of its own inside
    job = {"source": source, "isolated": isolated, **asdict(limits), **_interpreter()}
    outside = nullcontext("") if isolated else tempfile.TemporaryDirectory()
    with outside as folder, tempfile.TemporaryFile() as about, tempfile.TemporaryFile() as given:
        if not isolated:
            Path(folder, "main.py").write_text(source, encoding="utf-8", errors="surrogatepass")
        about.write(json.dumps({**job, "folder": folder}).encode())
        given.write(stdin.encode(errors="surrogatepass"))
        about.seek(0)
        given.seek(0)
        report, reporting = os.pipe()
        with os.fdopen(report, "rb", buffering=0) as problems:
            with os.fdopen(reporting, "wb") as ours:
                process = _start(given, about, ours)
            outcome = _watch(process, limits)
            os.set_blocking(report, False)
            problem = problems.read(CHUNK)  # None: open still, and empty
    if problem:
        raise UserError(_refusal(problem.decode(errors="replace")))
    return outcome


def _start(given: IO[bytes], about: IO[bytes], report: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(SANDBOX), str(about.fileno()), str(report.fileno())],
        stdin=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[about.fileno(), report.fileno()],
        start_new_session=True,
    )


def check_isolation(isolation: Isolation) -> None:
    """Raises UserError when programs cannot be isolated here, or the word is unknown."""
    if isolation not in get_args(Isolation):
        raise UserError(f"isolation is {isolation!r}; it is one of: {', '.join(get_args(Isolation))}")
    if isolation == "namespaces" and sys.platform != "linux":
        raise UserError(_refusal(f"{sys.platform} has no namespaces"))
    found = run_program("print('ready')", "", Limits(timeout_s=30.0), isolation)
    if found.output != "ready\n":
        raise UserError(f"a program that prints a word gave {found} under isolation={isolation}; Python cannot run there")


def _refusal(problem: str) -> str:
    return (
        f"programs of the model cannot be isolated on this machine ({problem}). Allow user namespaces (sysctl "
        "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns; a container needs them from its host), or let "
        "these programs have the network and all your files: task.options.isolation=none"
    )


def _interpreter() -> dict[str, object]:
    """The interpreter, and the folders that it needs: as they are spelled, because links lead there, and as they are."""
    executable = Path(sys.executable)
    folders = {sys.prefix, sys.base_prefix, *(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix))}
    return {"python": os.path.realpath(executable.parent) + "/" + executable.name, "interpreter": sorted(folders)}


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> Outcome:
    """Reads what the process prints until it ends or has to be ended."""
    assert process.stdout is not None
    deadline = time.monotonic() + limits.timeout_s
    output, exit_code = bytearray(), None
    stopped: Literal["timeout", "output", "memory"] | None = None
    with process.stdout as stream:
        reads, look = True, time.monotonic() + LOOK_S
        while stopped is None and exit_code is None:
            if reads and wait([stream.fileno()], max(0.0, min(look, deadline) - time.monotonic())):
                chunk = os.read(stream.fileno(), CHUNK)
                output += chunk
                reads = bool(chunk)
            elif not reads:
                exit_code = _ended(process, min(look, deadline))
            if len(output) > limits.output_kib * 1024:
                stopped = "output"
            elif time.monotonic() >= deadline and exit_code is None:
                stopped = "timeout"
            elif time.monotonic() >= look:
                stopped = "memory" if memory_of(process.pid) > limits.memory_mib << 20 else None
                look = time.monotonic() + LOOK_S
    if exit_code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Outcome(output[: limits.output_kib * 1024].decode(errors="replace"), exit_code, stopped)


def _ended(process: subprocess.Popen[bytes], until: float) -> int | None:
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def memory_of(process: int) -> int:
    """Bytes in memory of a process and of all that it started and that did not leave it; 0 of one that is gone.

    Linux tells it. Where it does not (a kernel without CONFIG_PROC_CHILDREN, macOS) only the limit of each process holds.
    """
    total = 0
    waiting = [process]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            total += int((folder / "statm").read_text().split()[1]) * PAGE
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return total
