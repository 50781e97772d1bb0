"""Checkpoints: safetensors files of each rank, beside a JSON record that makes them whole.

    step_000120/
        meta.json           written last: what this is, git revision, position in the data, checksums of all other files
        config.yaml         the resolved configuration of the run
        tokenizer.json
        state/*.safetensors rank_RANK of what a rank has in memory, rank_RANK_NUMBER of what it has on a disk
        ...                 what the stage adds, for example rollout.json

A checkpoint is written into a hidden folder beside its place and renamed when it is complete, so one that can be seen is whole.
Training goes on meanwhile. Nothing in it is a pickle: tensors are safetensors, everything else is JSON or YAML.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernels.errors import UserError
from parallel.topology import World
from trainer.config.model import ModelConfig
from trainer.json_text import parsed
from trainer.model.transformer import require_plausible

FORMAT = 4
FILE_BYTES = 256 * 2**20  # of tensors that come from a disk; twice as much is in memory while one file is written
T = TypeVar("T")
log = logging.getLogger("tessera")


@dataclass(frozen=True)
class CheckpointMeta:
    """What meta.json holds besides checksums."""

    kind: str  # pretrain or rl
    step: int  # steps or rounds completed
    updates: int  # optimizer updates since the optimizer state was new
    model: dict[str, Any]  # a ModelConfig
    git: str
    position: dict[str, Any]  # where the data stands; the stage decides


Checksum = dict[str, int | str]
META, SUMS = TypeAdapter(CheckpointMeta), TypeAdapter(dict[str, Checksum])


def model_of(folder: Path, meta: CheckpointMeta) -> ModelConfig:
    """The model of a checkpoint. Raises Damaged where the record describes none."""
    try:
        model = ModelConfig(**meta.model)
    except (ValidationError, TypeError) as error:
        raise Damaged(f"{folder / 'meta.json'} describes no model of ours: {str(error).splitlines()[0]}") from None
    if model.vocab_size is None:
        raise Damaged(f"{folder / 'meta.json'} describes a model without a vocabulary")
    files = [folder / name for name in _read_record(folder)[1] if name.endswith(".safetensors")]
    require_plausible(model, sum(file.stat().st_size for file in files if file.is_file()), str(folder / "meta.json"))
    return model


def folder_name(step: int) -> str:
    return f"step_{step:06d}"


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
                sums[str(file.relative_to(staging))] = _checksum(file)
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
    sums |= {name: _checksum(staging / name) for name in files}
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


def _checksum(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# ---------------------------------------------------------------- reading


class Damaged(UserError):
    """A checkpoint that is not what was written; one beside it may be."""


def read_meta(folder: Path, model: ModelConfig | None = None) -> CheckpointMeta:
    """The record of a checkpoint, after comparing its model with `model`, if given. `verify` looks at the other files.

    Raises:
        UserError: no checkpoint, another format, or another model. Damaged: the record is.
    """
    meta, _ = _read_record(folder)
    if model is not None:
        _check_model(folder, meta.model, model.model_dump(mode="json"))
    return meta


def verify(folder: Path, world: World | None = None) -> None:
    """Checks every file against its checksum. With a world, its ranks share the files and all raise if one must.

    Raises:
        Damaged: names the file.
    """
    rank, size = (world.rank, world.size) if world is not None else (0, 1)
    names = sorted(files := _read_record(folder)[1])
    damage = next(filter(None, (_damage(folder, name, files[name]) for name in names[rank::size])), None)
    found: list[str | None] = [damage]
    if size > 1:
        found = [None] * size
        dist.all_gather_object(found, damage)
    for damage in filter(None, found):
        raise Damaged(f"the checkpoint {folder} is damaged: {damage}; one beside it may be whole")


def _read_record(folder: Path) -> tuple[CheckpointMeta, dict[str, Checksum]]:
    """meta.json: what it says, and the checksums of the other files."""
    file = folder / "meta.json"
    if not file.is_file():  # also nothing that is read without an end
        raise UserError(
            f"{folder} is no checkpoint: it has no meta.json. Give a folder such as runs/NAME/checkpoints/step_000120"
        )
    try:
        record = parsed(file.read_text(encoding="utf-8"))
        files, found_format = record.pop("files"), record.pop("format")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_record(file, str(error)) from None
    if found_format != FORMAT:
        raise UserError(f"{folder} has checkpoint format {found_format}; this version reads format {FORMAT}")
    try:
        return META.validate_python(record), SUMS.validate_python(files)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _no_record(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _no_record(file: Path, reason: str) -> Damaged:
    return Damaged(f"{file} is damaged ({reason}); a checkpoint beside it may be whole")


def _damage(folder: Path, name: str, expected: Checksum) -> str | None:
    path = folder / name
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        return f"meta.json names a file outside its folder: {name}"
    if not path.is_file():
        return f"{name} is missing"
    found = _checksum(path)
    if found == expected:
        return None
    return (
        f"{name} has {found['bytes']} bytes with sha256 {str(found['sha256'])[:12]}…, "
        f"expected {expected.get('bytes')} bytes with {str(expected.get('sha256'))[:12]}…"
    )


def _check_model(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = sorted(found.keys() | wanted.keys())
    different = [
        f"model.{n}: checkpoint {found.get(n)}, configuration {wanted.get(n)}" for n in names if found.get(n) != wanted.get(n)
    ]
    if different:
        raise UserError(
            f"{folder} holds another model:\n  " + "\n  ".join(different) + "\nUse its values, or another checkpoint"
        )


class _Tensors(Mapping[str, Tensor]):
    """Of the files that meta.json names, and of no others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        for name in sorted(_read_record(folder)[1]):
            if name.endswith(".safetensors"):
                with self._sound(name):
                    file = safe_open(folder / name, framework="pt")
                    self._files |= dict.fromkeys(file.keys(), file)

    @contextmanager
    def _sound(self, what: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise Damaged(f"the checkpoint {self._folder} is damaged: {what}: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise Damaged(f"the checkpoint {self._folder} has no tensor {name}")
        with self._sound(name):
            tensor: Tensor = self._files[name].get_tensor(name).clone()
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def require_shapes(self, expected: Mapping[str, Sequence[int]]) -> None:
        for name, wanted in expected.items():
            if name not in self._files:
                raise Damaged(f"the checkpoint {self._folder} has no tensor {name}")
            with self._sound(name):
                found = self._files[name].get_slice(name).get_shape()
            if list(found) != list(wanted):
                raise Damaged(f"the checkpoint {self._folder}: {name} has shape {list(found)}, expected {list(wanted)}")


def read(folder: Path, expected: Mapping[str, Sequence[int]] | None = None) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by name, whatever ranks wrote them; each comes from its file when it is asked for.

    Raises:
        Damaged: a file is none, or one of the `expected` tensors is missing or has another shape.
    """
    tensors = _Tensors(folder)
    tensors.require_shapes(expected or {})
    return tensors


# ---------------------------------------------------------------- which ones there are


def available(checkpoints: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in checkpoints.glob("step_*") if (p / "meta.json").is_file())


def resolve(path: Path) -> Path:
    """The checkpoint that a person means by a run folder, its checkpoints folder, or the checkpoint itself.

    Raises:
        UserError: there is none.
    """
    if (path / "meta.json").is_file():
        return path
    for checkpoints in (path / "checkpoints", path):
        found = available(checkpoints)
        if found:
            return found[-1]
    reason = "does not exist" if not path.exists() else "holds no checkpoint"
    raise UserError(
        f"checkpoint={path} {reason}. Give a run folder, one of its checkpoints, or a folder in the Hugging Face layout"
    )


def prune(checkpoints: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what cut-off writers left."""
    for old in available(checkpoints)[:-keep]:
        shutil.rmtree(old)
    for leftover in checkpoints.glob(".step_*.partial"):
        shutil.rmtree(leftover)
