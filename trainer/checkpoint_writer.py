"""Writing checkpoints behind the back of training; what they are is in checkpoint.py."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kernels.errors import UserError
from parallel.topology import World
from trainer.checkpoint import FORMAT, CheckpointMeta, checksum, prune

FILE_BYTES = 256 * 2**20  # of tensors that come from a disk; twice as much is in memory while one file is written
T = TypeVar("T")
log = logging.getLogger("tessera")


class Writer:
    """Writes this rank's part of checkpoints behind the back of training, one checkpoint at a time.

    Training waits for a copy of its state into the host's memory, and for the checkpoint before if that is still being written.
    State that lies on a disk (parallel.offload=nvme) has no such copy: training also stands still until that is in its files.
    All ranks make their writers together, and call each method together.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        # The ranks' threads agree over a group of their own, so that they never meet a collective of training.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._copies: dict[str, Tensor] = {}  # kept from one checkpoint to the next: new memory takes longer than the copy
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._crash: BaseException | None = None

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
            files: further text files, name -> content; rank 0's are written.
            keep: how many of the newest checkpoints stay, once this one is whole.
            passing: further pairs that are written before this returns. A tensor need not outlive the next one.
        """
        assert self._thread is None, "settle() comes before the next checkpoint"
        staging = folder.with_name(f".{folder.name}.partial")
        if self.world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        self.world.barrier()
        copies = {name: self._copied(name, tensor.detach()) for name, tensor in tensors}
        self._copies = copies
        failure = self._write_passing(staging, folder, passing)
        work = partial(self._write, staging, folder, copies, failure, meta, files, keep)
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

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        return copy.copy_(tensor)

    def _guarded(self, work: Callable[[], str | None]) -> None:
        try:
            self._failure = work()
        except BaseException as error:  # raised again in the thread that waits
            self._crash = error

    def _write_passing(self, staging: Path, folder: Path, passing: Iterable[tuple[str, Tensor]]) -> str | None:
        """Why it failed, if it did; the thread tells it to the other ranks."""
        try:
            for index, tensors in enumerate(_batches(passing)):
                save_file(tensors, self._state_file(staging, f"_{index:05d}"))
        except (OSError, SafetensorError) as error:
            return _why_not_written(folder, error)
        except UserError as error:  # where the tensors come from
            return str(error)
        return None

    def _write(
        self,
        staging: Path,
        folder: Path,
        state: dict[str, Tensor],
        failure: str | None,
        meta: CheckpointMeta,
        files: Mapping[str, str],
        keep: int,
    ) -> str | None:
        """In the thread: the ranks' files, then on rank 0 all that makes them a checkpoint; why it failed, if it did.

        `failure` is why this rank's part has failed already.
        """
        started = time.perf_counter()
        sums, failure = self._write_state(staging, folder, state) if failure is None else ({}, failure)
        outcomes = self._from_all((sums, failure))
        failure = next((failure for _, failure in outcomes if failure is not None), None)
        if failure is None and self.world.rank == 0:
            try:
                _finish(staging, folder, meta, files, {name: one for sums, _ in outcomes for name, one in sums.items()})
                prune(folder.parent, keep)
            except OSError as error:
                failure = _why_not_written(folder, error)
        failure = self._from_all(failure)[0]
        if failure is None:
            log.info("checkpoint %s is whole after %.1f s", folder.name, time.perf_counter() - started)
        elif self.world.rank == 0:
            log.error("%s", failure)
            shutil.rmtree(staging, ignore_errors=True)
        return failure

    def _write_state(self, staging: Path, folder: Path, state: dict[str, Tensor]) -> tuple[dict[str, Any], str | None]:
        """(checksums of this rank's files, why it failed)."""
        try:
            whole = self._state_file(staging)
            save_file(state, whole)
            sums = {}
            for file in whole.parent.glob(f"{whole.stem}*"):
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
                sums[str(file.relative_to(staging))] = checksum(file)
            return sums, None
        except (OSError, SafetensorError) as error:
            return {}, _why_not_written(folder, error)

    def _state_file(self, staging: Path, number: str = "") -> Path:
        """One of this rank's, in a folder that exists."""
        folder = staging / "state"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"rank_{self.world.rank:05d}{number}.safetensors"

    def _from_all(self, own: T) -> list[T]:
        """Every rank's, in the order of the ranks."""
        gathered: list[Any] = [own] * self.world.size
        if self._group is not None:
            dist.all_gather_object(gathered, own, group=self._group)
        return gathered


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


def _finish(staging: Path, folder: Path, meta: CheckpointMeta, files: Mapping[str, str], sums: dict[str, Any]) -> None:
    for name, content in files.items():
        (staging / name).write_text(content, encoding="utf-8")
    sums |= {name: checksum(staging / name) for name in files}
    with open(staging / "meta.json", "w", encoding="utf-8") as out:
        json.dump({"format": FORMAT, **asdict(meta), "files": dict(sorted(sums.items()))}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    old = folder.with_name(f".{folder.name}.old.partial")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():  # one of this very step that turned out to be damaged
        folder.replace(old)
    staging.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _why_not_written(folder: Path, error: OSError | SafetensorError) -> str:
    found = re.search(r"os error (\d+)", str(error))  # so safetensors tells it
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    free_mib = shutil.disk_usage(folder.parent).free / 2**20
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or free_mib < 1:
        return (
            f"no space to write the checkpoint {folder}: {free_mib:.0f} MiB are free. Older checkpoints are intact. "
            "Free some space; runs_dir=... puts runs on another disk"
        )
    return f"the checkpoint {folder} cannot be written: {error}. Check the permissions of {folder.parent}"
