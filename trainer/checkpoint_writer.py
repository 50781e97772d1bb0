"""Writes checkpoints while training goes on; checkpoint.py says what they contain."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from kernels.errors import UserError
from parallel.topology import World
from trainer.checkpoint import FORMAT, CheckpointMeta, Damaged, parse_record, prune, set_aside
from trainer.checkpoint_files import Checksum, checksum
from trainer.tensor_files import save_tensors

FILE_BYTES = 256 * 2**20  # of tensors that come from a disk; twice as much is in memory while one file is written
SLAB_BYTES = 256 * 2**20  # of copies in the host's memory
ALIGNMENT = 64  # bytes
DISK_FULL = "Free some space; runs_dir=... puts runs on another disk"
T = TypeVar("T")
log = logging.getLogger("tessera")


@dataclass(frozen=True)
class Shelf:
    """Where checkpoints are put, as one rank sees it: one folder for all ranks, or one for those of each node."""

    leads: bool  # of the ranks that share the folder the one that does what is done once
    way_out: str  # where there is no space
    share: Callable[[Path, Sequence[str]], None] | None = None  # (checkpoint, this rank's files): before older ones may go


class Writer:
    """Writes this rank's part of checkpoints while training goes on, one checkpoint at a time.

    Training waits for a copy of its state into the host's memory, and for the checkpoint before if that is still being written.
    State that lies on a disk (parallel.offload=nvme) has no such copy: training also stands still until that is in its files.
    All ranks make their writers together, and call each method together.
    """

    def __init__(self, world: World, shelf: Shelf | None = None) -> None:
        """Without a shelf all ranks share folders on a disk."""
        self.world = world
        self.shelf = Shelf(leads=world.rank == 0, way_out=DISK_FULL) if shelf is None else shelf
        # The ranks' threads agree over a group of their own, so that they never meet a collective of training.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._copies = HostCopies(pinned=world.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._crash: BaseException | None = None
        self.took_s = math.nan  # from the beginning of the last whole checkpoint to its end

    @property
    def busy(self) -> bool:
        """Whether this rank's part of a checkpoint is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        folder: Path,
        tensors: Iterable[tuple[str, Tensor]],
        meta: CheckpointMeta,
        files: Mapping[str, str],
        keep: int,
        passing: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        """Begins a checkpoint, after `settle`; returns when the tensors may change again.

        Args:
            folder: its final place; its parent exists.
            tensors: (name, tensor) pairs; each name is given by one rank only.
            files: further text files, name -> content; those of the rank that leads are written.
            keep: how many of the newest checkpoints stay, once this one is whole.
            passing: further pairs that are written before this returns. A tensor need not outlive the next one.
        """
        assert self._thread is None, "settle() comes before the next checkpoint"
        started = time.perf_counter()
        staging = folder.with_name(f".{folder.name}.partial")
        if self.shelf.leads:
            shutil.rmtree(staging, ignore_errors=True)
        self.world.barrier()
        copies = self._copies.take(tensors)
        failure = self._write_passing(staging, folder, passing)
        work = partial(self._write, started, staging, folder, copies, failure, meta, files, keep)
        self._thread = threading.Thread(target=self._guarded, args=(work,), name=folder.name, daemon=True)
        self._thread.start()

    def settle(self) -> str | None:
        """Waits for the checkpoint under way; says why it could not be written, the same on all ranks, or None if all is well.

        Older checkpoints are untouched by a failure, and nothing is left of the one that failed.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        if self._crash is not None:
            raise self._crash
        failure, self._failure = self._failure, None
        return failure

    def _guarded(self, work: Callable[[], str | None]) -> None:
        try:
            self._failure = work()
        except BaseException as error:  # raised again in the thread that waits
            self._crash = error

    def _write_passing(self, staging: Path, folder: Path, passing: Iterable[tuple[str, Tensor]]) -> str | None:
        """Why it failed, if it did; the thread tells it to the other ranks."""
        try:
            for index, tensors in enumerate(_batches(passing)):
                save_tensors(tensors, self._state_file(staging, f"_{index:05d}"))
        except (OSError, SafetensorError) as error:
            return self._why_not_written(folder, error)
        except UserError as error:  # where the tensors come from
            return str(error)
        return None

    def _write(
        self,
        started: float,
        staging: Path,
        folder: Path,
        state: dict[str, Tensor],
        failure: str | None,
        meta: CheckpointMeta,
        files: Mapping[str, str],
        keep: int,
    ) -> str | None:
        """In the thread: the ranks' files, then what makes them a checkpoint; why it failed, if it did.

        `failure` is why this rank's part has failed already. After each part the ranks agree on whether to go on.
        """
        shelf = self.shelf
        sums, failure = self._write_state(staging, folder, state) if failure is None else ({}, failure)
        outcomes = self._from_all((sums, failure))
        failure = next((failure for _, failure in outcomes if failure is not None), None)
        if failure is None:
            everything = {name: one for sums, _ in outcomes for name, one in sums.items()}
            failure = self._done(folder, lambda: _finish(staging, folder, meta, files, everything), shelf.leads)
        if failure is None and shelf.share is not None:
            share = shelf.share
            failure = self._done(folder, lambda: share(folder, sorted(sums)), True)
            if failure is not None and shelf.leads:
                shutil.rmtree(folder, ignore_errors=True)
        if failure is None:
            self.took_s = time.perf_counter() - started
            log.info("checkpoint %s is complete after %.1f s", folder.name, self.took_s)
            if shelf.leads:
                _remove_older(folder, keep)
        elif shelf.leads:
            log.error("%s", failure)
            shutil.rmtree(staging, ignore_errors=True)
        return failure

    def _done(self, folder: Path, work: Callable[[], None], by_me: bool) -> str | None:
        """Why `work` failed, on this rank or another, or None."""
        failure = None
        try:
            if by_me:
                work()
        except OSError as error:
            failure = self._why_not_written(folder, error)
        return next(filter(None, self._from_all(failure)), None)

    def _write_state(self, staging: Path, folder: Path, state: dict[str, Tensor]) -> tuple[dict[str, Any], str | None]:
        """(checksums of this rank's files, why it failed)."""
        try:
            whole = self._state_file(staging)
            save_tensors(state, whole)
            sums = {}
            for file in whole.parent.glob(f"{whole.stem}*"):
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
                sums[str(file.relative_to(staging))] = checksum(file)
            return sums, None
        except (OSError, SafetensorError) as error:
            return {}, self._why_not_written(folder, error)

    def _state_file(self, staging: Path, number: str = "") -> Path:
        """One of this rank's, in a folder that is made where its parent is still there."""
        folder = staging / "state"
        staging.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        return folder / f"rank_{self.world.rank:05d}{number}.safetensors"

    def _from_all(self, own: T) -> list[T]:
        """Every rank's, in the order of the ranks."""
        gathered: list[Any] = [own] * self.world.size
        if self._group is not None:
            dist.all_gather_object(gathered, own, group=self._group)
        return gathered

    def _why_not_written(self, folder: Path, error: OSError | SafetensorError) -> str:
        found = re.search(r"os error (\d+)", str(error))  # so safetensors tells it
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        free_mib = shutil.disk_usage(folder.parent).free / 2**20 if folder.parent.exists() else math.nan
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or free_mib < 1:
            return (
                f"no space to write the checkpoint {folder}: {free_mib:.0f} MiB are free. Older checkpoints are intact. "
                f"{self.shelf.way_out}"
            )
        hint = f". Check the permissions of {folder.parent}" if number in (errno.EACCES, errno.EPERM, errno.EROFS) else ""
        return f"the checkpoint {folder} cannot be written: {error}{hint}"


class HostCopies:
    """Copies in the host's memory, kept from one checkpoint to the next: new memory takes longer than the copy.

    For a GPU's tensors it is pinned, and no copy waits for the one before: into pageable memory they take several times as
    long. They share slabs, because pinned memory comes in powers of two.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._slabs: list[Tensor] = []  # bytes

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies that are valid until the next call; returns when the tensors may change again."""
        copies: dict[str, Tensor] = {}
        index = used = 0
        for name, tensor in tensors:
            size = tensor.nbytes
            while index < len(self._slabs) and used + size > self._slabs[index].numel():
                index, used = index + 1, 0
            if index == len(self._slabs):
                self._slabs.append(torch.empty(max(size, SLAB_BYTES), dtype=torch.uint8, pin_memory=self._pinned))
            copies[name] = self._slabs[index][used : used + size].view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor.detach(), non_blocking=True)
            used += -(-size // ALIGNMENT) * ALIGNMENT
        if self._pinned:
            torch.cuda.synchronize()
        return copies


def _batches(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Copies of about FILE_BYTES together."""
    batch: dict[str, Tensor] = {}
    for name, tensor in tensors:
        batch[name] = tensor.detach().to("cpu", copy=True)
        if sum(held.nbytes for held in batch.values()) >= FILE_BYTES:
            yield batch
            batch = {}
    if batch:
        yield batch


def _remove_older(folder: Path, keep: int) -> None:
    """Where that fails, as with a file that somebody has open on NFS, it is tried again after the next checkpoint."""
    try:
        prune(folder, keep)
    except OSError as error:
        log.error("checkpoints older than %s, which is whole, cannot be removed: %s", folder, error)


def bring(record: str, folder: Path, copy: Callable[[Path], dict[str, Checksum]], files: Mapping[str, str], keep: int) -> None:
    """A checkpoint that lies elsewhere, on a disk as `folder`: by one process, without ranks.

    Args:
        record: its meta.json.
        copy: brings its files to a folder; what has arrived there.
        files, keep: as in `Writer.start`.

    Raises:
        OSError: it cannot be written. Damaged: what has arrived is not what the record says.
    """
    meta, sums = parse_record(record, folder / "meta.json")
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        found = copy(staging)
        if found != sums:
            wrong = sorted(name for name in sums if found.get(name) != sums[name])
            raise Damaged(f"{', '.join(wrong)} did not arrive as written")
        _finish(staging, folder, meta, files, dict(sums))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _remove_older(folder, keep)


def _finish(staging: Path, folder: Path, meta: CheckpointMeta, files: Mapping[str, str], sums: dict[str, Any]) -> None:
    for name, content in files.items():
        _write_through(staging / name, content)
    sums |= {name: checksum(staging / name) for name in files}
    record = {"format": FORMAT, **asdict(meta), "files": dict(sorted(sums.items()))}
    _write_through(staging / "meta.json", json.dumps(record, indent=1))
    old = set_aside(folder) if folder.exists() else None  # one of this very step that turned out to be damaged
    staging.replace(folder)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _write_through(file: Path, text: str) -> None:
    """To the disk itself: older checkpoints go when this one is whole, and the machine may lose its power then."""
    with open(file, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
