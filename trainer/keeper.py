"""The process of a node that keeps checkpoints in its memory, and outlives the ranks.

Its folder is in the node's memory (SHARED_MEMORY) and has the layout of checkpoint.py. The ranks of the node write their files
and the record there; the files of other ranks are in the folders of their nodes. Each rank also sends its files to the keeper
of the next node; kept_checkpoints.py has the ranks' side. A keeper starts in a fraction of a second and takes little memory,
because it imports no torch.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kernels.errors import UserError
from trainer.checkpoint_files import Checksum, checksum, folder_name, step_of
from trainer.locks import locked

SHARED_MEMORY = Path("/dev/shm")
RECORD = "meta.json"


@dataclass(frozen=True)
class Kept:
    """What one keeper has of one step."""

    record: str | None  # meta.json
    files: dict[str, Checksum]  # of all others, as they are now


class Keeper:
    """Keeps checkpoints in a folder in the memory of its node, which is gone when this process is. A Ray actor."""

    def __init__(self) -> None:
        self._folder: OwnFolder | None = None

    def folder(self) -> Path:
        """Before all others. Raises UserError where there is none to be had."""
        if self._folder is None:
            self._folder = OwnFolder(SHARED_MEMORY)
        return self._folder.path

    def take(self, step: int, name: str, offset: int, chunk: bytes) -> None:
        """A part of a file of a rank on another node."""
        file = self._partial(step, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            left = memoryview(chunk)
            while left:
                offset += (written := os.pwrite(descriptor, left, offset))
                left = left[written:]
        finally:
            os.close(descriptor)

    def close(self, step: int, name: str) -> None:
        """All of the file has been taken."""
        self._partial(step, name).replace(self._file(step, name))

    def kept(self) -> dict[int, Kept]:
        """By step."""
        folders = [path for path in self.folder().glob("step_*") if path.is_dir()]
        return {step_of(path): _kept(path) for path in folders}

    def keep_only(self, step: int | None) -> None:
        """Removes all other steps, and what was cut off."""
        for path in self.folder().iterdir():
            if path.is_dir() and (step is None or path.name != folder_name(step)):
                shutil.rmtree(path)

    def text(self, step: int, name: str) -> str:
        return self._file(step, name).read_text(encoding="utf-8")

    def copy(self, step: int, name: str, to: Path) -> Checksum:
        """A file, to a disk; what has arrived there."""
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(self._file(step, name), to)
        with open(to, "rb") as copied:
            os.fsync(copied.fileno())
        return checksum(to)

    def read(self, step: int, name: str, offset: int, size: int) -> bytes:
        """A part of a file."""
        with open(self._file(step, name), "rb") as file:
            file.seek(offset)
            return file.read(size)

    def _file(self, step: int, name: str) -> Path:
        path = self.folder() / folder_name(step) / name
        assert path.resolve().is_relative_to(self.folder().resolve()), f"{name} leads out of a checkpoint"
        return path

    def _partial(self, step: int, name: str) -> Path:
        file = self._file(step, name)
        return file.with_name(f".{file.name}.partial")


def _kept(folder: Path) -> Kept:
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("[!.]*")) if path.is_file()}
    record = files.pop(RECORD, None)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = list(pool.map(checksum, files.values()))
    return Kept(None if record is None else record.read_text("utf-8", "replace"), dict(zip(files, sums, strict=True)))


class OwnFolder:
    """A new folder that no other user can read, and that is removed when this process ends, however it ends.

    Those of keepers that were killed with all that watched over them are removed here.
    """

    def __init__(self, memory: Path) -> None:
        parent = _parent(memory)
        with open(parent / ".lock", "w") as others:
            fcntl.flock(others, fcntl.LOCK_EX)
            for left in parent.glob("keeper-*"):
                _remove_if_left(left)
            self.path = Path(tempfile.mkdtemp(prefix="keeper-", dir=parent))
            self._lock = locked(self.path / ".lock")
        # A shell reads the end of its input when this process is gone; it is nobody's child, because Ray kills those as well.
        command = ["sh", "-c", 'exec 3<&0; (read -r _ <&3; rm -rf -- "$0") > /dev/null 2>&1 &', str(self.path)]
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._shell.wait()


def _remove_if_left(folder: Path) -> None:
    """Unless its keeper lives. One that was killed just now has a shell that is removing it as well."""
    with suppress(FileNotFoundError):
        if locked(folder / ".lock") is not None:  # closed again at once
            shutil.rmtree(folder)


def _parent(memory: Path) -> Path:
    """This user's, for all keepers of the machine."""
    parent = memory / f"tessera-{os.getuid()}"
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"checkpoints in memory need a folder in {memory}: {error.strerror}; make it writable, or set "
            "memory_checkpoint_every=0"
        ) from error
    if parent.is_symlink() or parent.stat().st_uid != os.getuid():
        raise UserError(f"{parent} is another user's, so checkpoints cannot be kept there; remove it")
    return parent
