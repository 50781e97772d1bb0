"""Checkpoints: sharded safetensors, beside a JSON record that makes them whole.

    step_000120/
        meta.json           written last: what this is, git revision, position in the data, checksums of all other files
        config.yaml         the resolved configuration of the run
        tokenizer.json
        state/*.safetensors what all ranks have, split over them by torch.distributed.checkpoint; and own-RANK-*: its experts
        ...                 what the stage adds, for example rollout.json

A checkpoint is written into a hidden folder beside its place and renamed when it is complete, so one that can be seen is whole.
Nothing in it is a pickle: tensors are safetensors, everything else is JSON or YAML.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from kernels.errors import UserError
from parallel.topology import World
from trainer.config import ModelConfig

FORMAT = 3
FILE_BYTES = 256 * 2**20  # of a rank's own tensors; twice as much is in memory while one is written


@dataclass(frozen=True)
class CheckpointMeta:
    """What meta.json holds besides checksums."""

    kind: str  # pretrain or rl
    step: int  # steps or rounds completed
    updates: int  # optimizer updates since the optimizer state was new
    model: dict[str, Any]  # a ModelConfig
    git: str
    position: dict[str, Any]  # where the data stands; the stage decides


def folder_name(step: int) -> str:
    return f"step_{step:06d}"


def write(
    folder: Path,
    shared: Iterable[tuple[str, Tensor]],
    own: Iterable[tuple[str, Tensor]],
    meta: CheckpointMeta,
    files: Mapping[str, str],
    world: World,
) -> None:
    """Writes a checkpoint; all ranks call it together, and return when it can be seen.

    Args:
        folder: its final place; its parent exists.
        shared: (name, tensor) pairs, the same on all ranks; each is written once.
        own: (name, tensor) pairs that only this rank has. A tensor need not outlive the next one.
        files: further text files, name -> content; rank 0's are written.

    Raises:
        UserError: the disk is full or not writable. The partial folder is removed; older checkpoints are untouched.
    """
    staging = folder.with_name(f".{folder.name}.partial")
    if world.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "state").mkdir(parents=True)
    world.barrier()
    state = {name: tensor.detach().contiguous() for name, tensor in shared}
    try:
        dcp.save(state, storage_writer=_Writer(staging / "state", world.rank, own), no_dist=world.size == 1)
        if world.rank == 0:
            _finish(staging, folder, meta, files)
    except (CheckpointException, OSError) as error:
        _give_up(staging, folder, error, world)
    world.barrier()


class _Writer(HuggingFaceStorageWriter):
    """Writes a rank's own tensors beside its part of the shared ones; a failure of either is told to all ranks."""

    def __init__(self, folder: Path, rank: int, own: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder, self._rank, self._own = folder, rank, own

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        for index, tensors in enumerate(_batches(self._own)):
            with open(self._folder / f"own-{self._rank:05d}-{index:05d}.safetensors", "wb") as out:
                out.write(save(tensors))
                out.flush()
                os.fsync(out.fileno())
        return super().write_data(plan, planner)


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


def _finish(staging: Path, folder: Path, meta: CheckpointMeta, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        (staging / name).write_text(content, encoding="utf-8")
    sums = {str(p.relative_to(staging)): _checksum(p) for p in sorted(staging.rglob("*")) if p.is_file()}
    with open(staging / "meta.json", "w", encoding="utf-8") as out:
        json.dump({"format": FORMAT, **asdict(meta), "files": sums}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    if folder.exists():  # an attempt that was cut off after this very step
        shutil.rmtree(folder)
    staging.replace(folder)


def _give_up(staging: Path, folder: Path, error: CheckpointException | OSError, world: World) -> None:
    if world.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
    # The other ranks' failures arrive as (exception, traceback).
    causes = [error] if isinstance(error, OSError) else [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, UserError):
            raise cause
    numbers = {cause.errno for cause in causes if isinstance(cause, OSError)}
    free_mib = shutil.disk_usage(folder.parent).free / 2**20
    if numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or free_mib < 1:
        raise UserError(
            f"no space to write the checkpoint {folder}: {free_mib:.0f} MiB are free. Older checkpoints are intact. "
            "Free some space, or set runs_dir to another disk, and start again with resume=auto"
        ) from error
    if numbers & {errno.EACCES, errno.EROFS, errno.EPERM}:
        raise UserError(
            f"the checkpoint {folder} cannot be written: {error}. Check the permissions of {folder.parent}"
        ) from error
    raise error


def _checksum(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# ---------------------------------------------------------------- reading


def read_meta(folder: Path, model: ModelConfig | None = None) -> CheckpointMeta:
    """The record of a checkpoint, after checking every file against its checksum and, if given, the model.

    Raises:
        UserError: no checkpoint, a damaged or missing file, another format, or another model.
    """
    try:
        record = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        files, found_format = record.pop("files"), record.pop("format")
        meta = CheckpointMeta(**record)
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no checkpoint: it has no meta.json. Give a folder such as runs/NAME/checkpoints/step_000120"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'meta.json'} is damaged ({error}); use an older checkpoint beside it") from None
    if found_format != FORMAT:
        raise UserError(f"{folder} has checkpoint format {found_format}; this version reads format {FORMAT}")
    for name, expected in files.items():
        _check_file(folder, name, expected)
    if model is not None:
        _check_model(folder, meta.model, model.model_dump(mode="json"))
    return meta


def _check_file(folder: Path, name: str, expected: dict[str, int | str]) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder / 'meta.json'} names a file outside its folder: {name}")
    if not path.is_file():
        raise UserError(f"the checkpoint {folder} is damaged: {name} is missing; use an older checkpoint beside it")
    found = _checksum(path)
    if found != expected:
        raise UserError(
            f"the checkpoint {folder} is damaged: {name} has {found['bytes']} bytes with sha256 {str(found['sha256'])[:12]}…, "
            f"expected {expected['bytes']} bytes with {str(expected['sha256'])[:12]}…; use an older checkpoint beside it"
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
    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted((folder / "state").glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by name, whatever ranks wrote them; each comes from its file when it is asked for."""
    return _Tensors(folder)


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
    for partial in checkpoints.glob(".step_*.partial"):
        shutil.rmtree(partial)
