"""Finding the processes of a run by the file that each logs to."""

from __future__ import annotations

from pathlib import Path

import psutil


def process_of(role: str, ancestor: int | None = None) -> psutil.Process | None:
    """The process of `role`, such as engine/0, below process `ancestor`, or below this one; None if there is none."""
    name = f"{role.replace('/', '_')}.log"
    for process in psutil.Process(ancestor).children(recursive=True):
        try:
            if any(Path(file.path).name == name for file in process.open_files()):
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):  # it has just ended
            continue
    return None
