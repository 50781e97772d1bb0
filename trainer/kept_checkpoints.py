"""Checkpoints in the memory of nodes: which are complete after a loss, and how ranks send and read them.

The ranks of a node write their files, and the record, into the folder of its keeper (keeper.py), and each sends its files to
the keeper of the next node, so a checkpoint survives the loss of any one node, and of all ranks. What is read is checked
against the record, as on a disk, and is JSON or safetensors.

Source: Wang et al., "GEMINI: Fast Failure Recovery in Distributed Training with In-Memory Checkpoints", SOSP 2023.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError, RayError, RayTaskError
from safetensors.torch import load
from torch import Tensor

from kernels.errors import UserError
from parallel.topology import World
from trainer.checkpoint import (
    CheckpointMeta,
    Damaged,
    LocalFile,
    TensorFile,
    parse_record,
    read_files,
    require_model,
    tensor_files,
)
from trainer.checkpoint_files import folder_name, step_of
from trainer.config.model import ModelConfig
from trainer.keeper import RECORD, Kept

CHUNK_BYTES = 4 * 2**20  # of a file on its way to another node
CHUNKS_UNDER_WAY = 2  # of a rank; they lie in Ray's object store
LENGTH_BYTES = 8  # of the number at the start of a safetensors file, of the bytes of its header


class KeeperLost(RuntimeError):
    """A keeper died while a rank was reading."""


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
        length = int.from_bytes(self._read(0, LENGTH_BYTES), "little")
        self._data = LENGTH_BYTES + length  # where it begins
        self._header = json.loads(self._read(LENGTH_BYTES, length))
        self.shapes: Mapping[str, Sequence[int]] = {n: told["shape"] for n, told in self._header.items() if n != "__metadata__"}

    def tensor(self, name: str) -> Tensor:
        told = self._header[name]
        start, end = told["data_offsets"]
        alone = json.dumps({name: {**told, "data_offsets": [0, end - start]}}).encode()
        data = self._read(self._data + start, end - start)
        return load(b"".join((len(alone).to_bytes(LENGTH_BYTES, "little"), alone, data)))[name]

    def _read(self, offset: int, size: int) -> bytes:
        try:
            part: bytes = ray.get(self._keeper.read.remote(self._step, self._name, offset, size))
            return part
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
