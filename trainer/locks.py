"""A lock that ends with the process that has it, however that ends."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO


def locked(file: Path) -> IO[str] | None:
    """The file, made where there is none, with a lock for as long as it is open; None if somebody else has that.

    Raises OSError where it cannot be opened for writing.
    """
    lock = open(file, "w", encoding="utf-8")  # noqa: SIM115 - open for as long as whoever asked wants it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
