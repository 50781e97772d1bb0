"""Checkpoints: safetensors files of each rank, and a JSON record that is written last.

    step_000120/
        meta.json           written last: what this is, git revision, position in the data, checksums of all other files
        config.yaml         the resolved configuration of the run
        tokenizer.json
        state/*.safetensors rank_RANK: what a rank has in memory; rank_RANK_NUMBER: what it has on a disk; NAME@START is a
                            part of a tensor of which several ranks have parts
        state.json          state of the driver: in RL the unfinished samples

A checkpoint is written into a hidden folder beside its place and renamed when it is complete, so a visible one is complete.
Training goes on meanwhile. Nothing in it is a pickle: tensors are safetensors, everything else is JSON or YAML.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.errors import UserError
from parallel.topology import World
from trainer.checkpoint_files import Checksum, checksum, step_of
from trainer.config.model import ModelConfig
from trainer.json_text import first_problem, parsed
from trainer.model.transformer import require_plausible

FORMAT = 6
FILE = re.compile(r"[\w.@-]{1,99}(/[\w.@-]{1,99})?", re.ASCII)  # the name of one of its files: what any disk can hold
FRAGMENT = re.compile(r"(.+)@(\d{1,18})")  # the name of a tensor, and where in it, flattened, the values of this one begin


@dataclass(frozen=True)
class CheckpointMeta:
    """What meta.json holds besides checksums."""

    kind: str  # pretrain or rl
    step: int  # steps or rounds completed
    updates: int  # optimizer updates since the optimizer state was new
    model: dict[str, Any]  # a ModelConfig
    git: str
    position: dict[str, Any]  # where the data stands; the stage decides


META, SUMS = TypeAdapter(CheckpointMeta), TypeAdapter(dict[str, Checksum])


def model_of(folder: Path, meta: CheckpointMeta) -> ModelConfig:
    """The model of a checkpoint. Raises Damaged where the record describes none, or one for which its files are too small."""
    try:
        model = ModelConfig(**meta.model)
    except (ValidationError, TypeError) as error:
        raise Damaged(f"{folder / 'meta.json'} describes no model of ours: {str(error).splitlines()[0]}") from None
    if model.vocab_size is None:
        raise Damaged(f"{folder / 'meta.json'} describes a model without a vocabulary")
    files = [folder / name for name in tensor_files(_read_record(folder)[1])]
    try:
        require_plausible(model, sum(file.stat().st_size for file in files if file.is_file()), str(folder / "meta.json"))
    except UserError as error:
        raise Damaged(str(error)) from None
    return model


def fragment_name(name: str, start: int) -> str:
    return f"{name}@{start}"


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
        require_model(folder, meta, model)
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
        raise _damaged(folder, damage)


def verify_file(folder: Path, name: str) -> None:
    """Checks one file against its checksum. Raises Damaged."""
    files = _read_record(folder)[1]
    damage = _damage(folder, name, files[name]) if name in files else f"meta.json does not name {name}"
    if damage is not None:
        raise _damaged(folder, damage)


def _damaged(folder: Path, damage: str) -> Damaged:
    return Damaged(f"the checkpoint {folder} is damaged: {damage}; one beside it may be whole")


def _read_record(folder: Path) -> tuple[CheckpointMeta, dict[str, Checksum]]:
    """meta.json: what it says, and the checksums of the other files."""
    file = folder / "meta.json"
    if not file.is_file():  # also nothing that is read without an end
        raise UserError(
            f"{folder} is not a checkpoint: it has no meta.json. Give a folder such as runs/NAME/checkpoints/step_000120"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _no_record(file, str(error)) from None
    return parse_record(text, file)


def parse_record(text: str, file: Path) -> tuple[CheckpointMeta, dict[str, Checksum]]:
    """What meta.json says, and the checksums of the other files. `file` is what errors call it.

    Raises:
        UserError: another format. Damaged: it is no record.
    """
    try:
        record = parsed(text)
        files, found_format = record.pop("files"), record.pop("format")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_record(file, str(error)) from None
    if found_format != FORMAT:
        raise UserError(f"{file.parent} has checkpoint format {found_format}; this version reads format {FORMAT}")
    try:
        meta, sums = META.validate_python(record), SUMS.validate_python(files)
    except ValidationError as error:
        raise _no_record(file, first_problem(error)) from None
    if strange := [name for name in sums if not FILE.fullmatch(name)]:
        raise _no_record(file, f"{strange[0][:99]!r} is no name of a file in its folder")
    return meta, sums


def _no_record(file: Path, reason: str) -> Damaged:
    return Damaged(f"{file} is damaged ({reason}); a checkpoint beside it may be whole")


def _damage(folder: Path, name: str, expected: Checksum) -> str | None:
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except RuntimeError:
        return f"{name} is a link that leads to itself"
    if not inside:
        return f"meta.json names a file outside its folder: {name}"
    if not path.is_file():
        return f"{name} is missing"
    try:
        found = checksum(path)
    except OSError as error:  # of a disk that fails
        return f"{name} cannot be read: {error.strerror}"
    if found == expected:
        return None
    return (
        f"{name} has {found['bytes']} bytes with sha256 {str(found['sha256'])[:12]}…, "
        f"expected {expected.get('bytes')} bytes with {str(expected.get('sha256'))[:12]}…"
    )


def require_model(folder: Path, meta: CheckpointMeta, model: ModelConfig) -> None:
    """Raises UserError if the checkpoint in `folder`, of which `meta` is the record, holds another model."""
    usual = {name: field.default for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    found, wanted = usual | meta.model, model.model_dump(mode="json")
    names = sorted(found.keys() | wanted.keys())
    different = [
        f"model.{n}: checkpoint {found.get(n)}, configuration {wanted.get(n)}" for n in names if found.get(n) != wanted.get(n)
    ]
    if different:
        raise UserError(
            f"{folder} holds another model:\n  " + "\n  ".join(different) + "\nUse its values, or another checkpoint"
        )


class TensorFile(Protocol):
    """An open safetensors file, wherever it lies."""

    shapes: Mapping[str, Sequence[int]]  # of its tensors

    def tensor(self, name: str) -> Tensor: ...


class LocalFile:
    """Raises OSError or SafetensorError where it is none."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")
        self.shapes: Mapping[str, Sequence[int]] = {name: self._file.get_slice(name).get_shape() for name in self._file.keys()}  # noqa: SIM118 - no mapping

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self._file.get_tensor(name).clone()
        return found


class _Tensors(Mapping[str, Tensor]):
    """Of several files, which are opened here. `place` is where errors say that they are."""

    def __init__(self, place: Path, files: Mapping[str, Callable[[], TensorFile]]) -> None:
        self._place = place
        self._files: dict[str, TensorFile] = {}
        self._fragments: dict[str, list[tuple[int, str, TensorFile]]] = {}  # in the order of where they begin
        self._shapes: dict[str, tuple[int, ...]] = {}  # of tensors that lie in fragments
        for name in sorted(files):
            with self._sound(name):
                file = files[name]()
            for key in file.shapes:
                if fragment := FRAGMENT.fullmatch(key):
                    self._fragments.setdefault(fragment[1], []).append((int(fragment[2]), key, file))
                else:
                    self._files[key] = file
        for fragments in self._fragments.values():
            fragments.sort(key=lambda one: one[:2])

    @contextmanager
    def _sound(self, what: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise Damaged(f"the checkpoint {self._place} is damaged: {what}: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise Damaged(f"the checkpoint {self._place} has no tensor {name}")
        with self._sound(name):
            if name in self._files:
                return self._files[name].tensor(name)
            return torch.cat([file.tensor(key) for _, key, file in self._fragments[name]]).view(self._shapes[name])

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter([*self._files, *self._shapes])

    def __len__(self) -> int:
        return len(self._files) + len(self._shapes)

    def require_shapes(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Those that lie in fragments can be asked for from here on."""
        for name, wanted in expected.items():
            if name in self._files:
                found = self._files[name].shapes[name]
                if list(found) != list(wanted):
                    raise Damaged(f"the checkpoint {self._place}: {name} has shape {list(found)}, expected {list(wanted)}")
            elif name in self._fragments:
                self._require_all(name, math.prod(wanted))
                self._shapes[name] = tuple(wanted)
            else:
                raise Damaged(f"the checkpoint {self._place} has no tensor {name}")

    def _require_all(self, name: str, size: int) -> None:
        """Its fragments are `size` values, one after another."""
        end = 0
        for start, key, file in self._fragments[name]:
            if start != end or len(file.shapes[key]) != 1:
                raise Damaged(f"the checkpoint {self._place}: {key} does not begin where the part before it ends, at {end}")
            end += file.shapes[key][0]
        if end != size:
            raise Damaged(f"the checkpoint {self._place} has {end} values of {name}, expected {size}")


def read(folder: Path, expected: Mapping[str, Sequence[int]] | None = None) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by name, whatever ranks wrote them; each comes from its file when it is asked for.

    Of the files that meta.json names, and of no others.

    Raises:
        Damaged: a file is none, or one of the `expected` tensors is missing or has another shape.
    """
    names = tensor_files(_read_record(folder)[1])
    return read_files(folder, {name: partial(LocalFile, folder / name) for name in names}, expected or {})


def tensor_files(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


def read_files(
    place: Path, files: Mapping[str, Callable[[], TensorFile]], expected: Mapping[str, Sequence[int]]
) -> Mapping[str, Tensor]:
    """`read` of files that are opened by these functions; errors say that they are at `place`."""
    tensors = _Tensors(place, files)
    tensors.require_shapes(expected)
    return tensors


# ---------------------------------------------------------------- which ones there are


def available(checkpoints: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (p for p in checkpoints.glob("step_*") if p.name[5:].isdecimal() and (p / "meta.json").is_file())
    return sorted(found, key=step_of)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What a person has named as a checkpoint, and may not be allowed to look into. Raises UserError for that."""
    try:
        yield
    except OSError as error:
        raise UserError(f"checkpoint={path} cannot be read: {error.strerror or error}") from None


def resolve(path: Path) -> Path:
    """The checkpoint that a person means by a run folder, its checkpoints folder, or the checkpoint itself.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    with readable(path):
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


def set_aside(folder: Path) -> Path:
    """Hides a checkpoint at once, so that one that can be seen is whole. Where it waits to be removed."""
    hidden = folder.with_name(f".{folder.name}.old.partial")
    if hidden.exists():
        shutil.rmtree(hidden)
    return folder.replace(hidden)


def prune(newest: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints up to this one, which was written just now, and what cut-off writers left.

    Later ones count for nothing: they were damaged when the run went on from one before them.
    """
    upto = [one for one in available(newest.parent) if step_of(one) <= step_of(newest)]
    for old in upto[:-keep]:
        set_aside(old)
    for leftover in newest.parent.glob(".step_*.partial"):
        shutil.rmtree(leftover)
