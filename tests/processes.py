"""Finding the processes of a run by the file that each logs to."""

from __future__ import annotations

from pathlib import Path

import psutil


def process_of(role: str, ancestor: int | None = None, folder: Path | None = None) -> psutil.Process | None:
    """The process of `role`, such as engine/0, below process `ancestor`, or below this one; None if there is none.

    `folder`: where it logs to, for who may still find processes of the same role that somebody else had.
    """
    name = f"{role.replace('/', '_')}.log"
    for process in psutil.Process(ancestor).children(recursive=True):
        try:
            logs = [path for file in process.open_files() if (path := Path(file.path)).name == name]
            if any(folder is None or path.parent == folder for path in logs):
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):  # it has just ended
            continue
    return None
