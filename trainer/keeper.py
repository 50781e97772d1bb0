"""Checkpoints in the memory of nodes: who keeps them there, who sends and reads them, and which are whole after a loss.

A keeper is a process of each node that outlives the ranks. Its folder lies in the node's memory (SHARED_MEMORY) and has the
layout of checkpoint.py, in which the ranks of the node write their files and the record, while the files of other ranks are in
the folders of their nodes. Each rank also sends its files to the keeper of the next node, so a checkpoint survives the loss of
any one node, and of all ranks. What is read is checked against the record as on a disk, and is JSON or safetensors.

Source: Wang et al., "GEMINI: Fast Failure Recovery in Distributed Training with In-Memory Checkpoints", SOSP 2023.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError, RayError, RayTaskError
from safetensors.torch import load, save
from torch import Tensor

from kernels.errors import UserError
from parallel.topology import World
from trainer.checkpoint import (
    CheckpointMeta,
    Checksum,
    Damaged,
    LocalFile,
    TensorFile,
    checksum,
    folder_name,
    parse_record,
    read_files,
    require_model,
    step_of,
    tensor_files,
)
from trainer.config.model import ModelConfig

SHARED_MEMORY = Path("/dev/shm")
CHUNK_BYTES = 4 * 2**20  # of a file on its way to another node
CHUNKS_UNDER_WAY = 2  # of a rank; they lie in Ray's object store
RECORD = "meta.json"


class KeeperLost(RuntimeError):
    """A keeper died while a rank was reading."""


# ---------------------------------------------------------------- which are whole


@dataclass(frozen=True)
class Kept:
    """What one keeper has of one step."""

    record: str | None  # meta.json
    files: dict[str, Checksum]  # of all others, as they are now


@dataclass(frozen=True)
class Whole:
    """A checkpoint of which every file is kept somewhere as its record says."""

    step: int
    record: str
    keepers: dict[str, tuple[str, ...]]  # file -> who has it


def whole_ones(found: Mapping[str, Mapping[int, Kept]]) -> list[Whole]:
    """Those that can be put together from what each keeper has, by step; the newest first. Pure.

    Several ranks wrote a step, perhaps more than once and on other numbers of ranks; files belong to the record that has their
    checksums. What is torn or missing here may be whole with another keeper.
    """
    whole = []
    for step in sorted({step for steps in found.values() for step in steps}, reverse=True):
        kept = {name: steps[step] for name, steps in found.items() if step in steps}
        for record in sorted({one.record for one in kept.values() if one.record is not None}):
            try:
                meta, sums = parse_record(record, Path(folder_name(step), RECORD))
            except UserError:
                continue
            keepers = {file: tuple(k for k, one in kept.items() if one.files.get(file) == sum_) for file, sum_ in sums.items()}
            if meta.step == step and all(keepers.values()):
                whole.append(Whole(step, record, keepers))
    return whole


def following(nodes: Sequence[str]) -> dict[str, str]:
    """Which node also keeps what each of the nodes of these ranks has: the next one; itself where there is no other."""
    ring = list(dict.fromkeys(nodes))
    return dict(zip(ring, [*ring[1:], ring[0]], strict=True))


def outlives(nodes: Sequence[str], lost: Set[str]) -> bool:
    """Whether a checkpoint of ranks on these nodes is still whole without the ones that are lost."""
    return all(node not in lost or other not in lost for node, other in following(nodes).items())


# ---------------------------------------------------------------- the process


class Keeper:
    """Keeps checkpoints in a folder in the memory of its node, which is gone when this process is. A Ray actor."""

    def __init__(self) -> None:
        self._folder: OwnFolder | None = None
        self._opened: dict[tuple[int, str], LocalFile] = {}

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
        self._opened.clear()  # what is open takes its memory with it
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

    def shapes(self, step: int, name: str) -> str:
        """Of the tensors of a file, as JSON."""
        return json.dumps(dict(self._open(step, name).shapes))

    def tensor(self, step: int, name: str, tensor: str) -> bytes:
        """One of them, as a safetensors file."""
        return save({tensor: self._open(step, name).tensor(tensor)})

    def _open(self, step: int, name: str) -> LocalFile:
        if (step, name) not in self._opened:
            self._opened[step, name] = LocalFile(self._file(step, name))
        return self._opened[step, name]

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
            self._lock = _locked(self.path / ".lock")
        # A shell reads the end of its input when this process is gone; it is nobody's child, because Ray kills those as well.
        command = ["sh", "-c", 'exec 3<&0; (read -r _ <&3; rm -rf -- "$0") > /dev/null 2>&1 &', str(self.path)]
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._shell.wait()


def _remove_if_left(folder: Path) -> None:
    """Unless its keeper lives. One that was killed just now has a shell that is removing it as well."""
    with suppress(FileNotFoundError):
        if _locked(folder / ".lock") is not None:  # closed again at once
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


def _locked(file: Path) -> Any:
    """The open file, which nobody else has locked; None if somebody has."""
    lock = open(file, "w")  # noqa: SIM115 - held by who asked
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


# ---------------------------------------------------------------- what ranks do with it


@dataclass(frozen=True)
class MemoryShelf:
    """What a rank is told about where its checkpoints in memory lie."""

    keeper: str  # the name of that of its node
    folder: Path
    leads: bool  # it is the first of its node
    next: Any  # the keeper of the next node; None where all ranks are on one


def send(keeper: Any, folder: Path, names: Sequence[str]) -> None:
    """Sends files of a checkpoint to a keeper on another node. Raises OSError if they cannot be kept there."""
    step = step_of(folder)
    under_way: deque[ray.ObjectRef] = deque()
    try:
        for name in names:
            with open(folder / name, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    under_way.append(keeper.take.remote(step, name, file.tell() - len(chunk), chunk))
                    if len(under_way) > CHUNKS_UNDER_WAY:
                        ray.get(under_way.popleft())
            while under_way:
                ray.get(under_way.popleft())
            ray.get(keeper.close.remote(step, name))
    except RayTaskError as error:
        if not isinstance(error.cause, OSError):
            raise
        raise OSError(error.cause.errno, f"{error.cause.strerror}, on the node after this one") from error
    except RayActorError as error:
        raise OSError("the keeper of the node after this one is gone") from error


class RemoteFile:
    """A safetensors file that a keeper on another node has. Raises KeeperLost once that is gone."""

    def __init__(self, keeper: Any, step: int, name: str) -> None:
        self._keeper, self._step, self._name = keeper, step, name
        self.shapes: Mapping[str, Sequence[int]] = json.loads(self._asked(keeper.shapes.remote(step, name)))

    def tensor(self, name: str) -> Tensor:
        return load(self._asked(self._keeper.tensor.remote(self._step, self._name, name)))[name]

    def _asked(self, answer: ray.ObjectRef) -> Any:
        try:
            return ray.get(answer)
        except RayError as error:
            raise KeeperLost(f"{self._name} of step {self._step}, which another node had in its memory, is gone") from error


def open_whole(
    one: Whole,
    shelf: MemoryShelf,
    keepers: Mapping[str, Any],
    expected: Mapping[str, Sequence[int]],
    model: ModelConfig,
    world: World,
) -> tuple[CheckpointMeta, Mapping[str, Tensor]]:
    """What a checkpoint in memory says, and its tensors, each from this node where that has it. `keepers`: all, by name.

    Collective; raises on all ranks or on none.

    Raises:
        Damaged: a file is gone since, or is not as expected. UserError: another model.
    """
    place = shelf.folder / folder_name(one.step)
    meta, _ = parse_record(one.record, place / RECORD)
    require_model(place, meta, model)
    files: dict[str, Callable[[], TensorFile]] = {}
    for name in tensor_files(one.keepers):
        having = one.keepers[name]
        other = having[world.rank % len(having)]  # not all ask the same one
        here = shelf.keeper in having
        files[name] = partial(LocalFile, place / name) if here else partial(RemoteFile, keepers[other], one.step, name)
    tensors: Mapping[str, Tensor] = {}
    failure: str | None = None
    try:
        tensors = read_files(place, files, expected)
    except (Damaged, KeeperLost) as error:
        failure = str(error)
    failures = [failure] * world.size
    if world.size > 1:
        dist.all_gather_object(failures, failure)
    for why in filter(None, failures):
        raise Damaged(why)
    return meta, tensors
