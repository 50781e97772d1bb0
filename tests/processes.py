"""Finding the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil


def process_of(role: str, ancestor: int | None = None, folder: Path | None = None) -> psutil.Process | None:
    """The process of `role`, such as engine/0, below process `ancestor`, or below this one; None if there is none.

    By the file that it logs to. `folder`: where that is, where there may still be processes of the same role that others had.
    """
    name = f"{role.replace('/', '_')}.log"

    def logs_there(process: psutil.Process) -> bool:
        logs = [path for file in process.open_files() if (path := Path(file.path)).name == name]
        return any(folder is None or path.parent == folder for path in logs)

    return _first(logs_there, ancestor)


def actor_of(kind: str, ancestor: int) -> psutil.Process | None:
    """The process of a Ray actor of class `kind`, which need not log."""
    return _first(lambda process: any(f"ray::{kind}" in word for word in process.cmdline()), ancestor)


def _first(wanted: Callable[[psutil.Process], bool], ancestor: int | None) -> psutil.Process | None:
    for process in psutil.Process(ancestor).children(recursive=True):
        try:
            if wanted(process):
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):  # it has just ended
            continue
    return None
