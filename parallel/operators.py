"""DeepSpeed's operators, compiled at their first use: once for each virtual environment, by one process at a time, and by the
next if that is killed over it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.utils.cpp_extension as torch_build
from torch.utils.file_baton import FileBaton


class Baton:
    """In place of torch's FileBaton, which its maker holds for as long as there is a file, and all others wait for: for ever,
    once the maker was killed. This one is a lock, which ends with its process."""

    def __init__(self, lock_file_path: str) -> None:
        self._file = os.open(f"{lock_file_path}.tessera", os.O_CREAT | os.O_WRONLY)

    def try_acquire(self) -> bool:
        """Waits, too: where another has built it meanwhile, building again takes 10 ms and finds nothing to do."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        os.close(self._file)


def folder(environment: str) -> Path:
    """Where operators of a virtual environment are kept. Torch has one folder for all of a user, and compiles them again
    whenever another environment than the last asks."""
    return Path.home() / ".cache" / "tessera_operators" / hashlib.sha256(environment.encode()).hexdigest()[:8]


@contextmanager
def building() -> Iterator[None]:
    """In it an operator that DeepSpeed loads, and torch builds, waits for live processes only. TORCH_EXTENSIONS_DIR says where
    it is kept, if that is set."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder(sys.prefix)))
    torch_build.FileBaton = Baton  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch_build.FileBaton = FileBaton  # type: ignore[misc]
