"""Writing a checkpoint and waiting for it, also where there is no room."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from kernels.errors import UserError
from parallel.topology import World
from trainer.checkpoint import CheckpointMeta
from trainer.checkpoint_writer import Writer
from trainer.step import Trainer


def named_state(trainer: Trainer, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor): dense ones on every rank, an expert's on its owner and valid until the next expert's. Collective."""
    yield from trainer.shared_state(with_moments)
    shapes = {name: shape for name, shape in trainer.shapes(with_moments) if name.startswith("dense.")}
    dense = {name: torch.zeros(*shape, device=trainer.world.device) for name, shape in shapes.items()}
    for name, start, values in trainer.dense.fragments(with_moments):
        dense[name].view(-1)[start : start + values.numel()] = values
    for name, tensor in dense.items():
        yield name, trainer.world.sum(tensor)
    yield from trainer.experts.named_state(with_moments)


def save(trainer: Trainer, folder: Path, meta: CheckpointMeta, files: Mapping[str, str]) -> None:
    """`write` of all that a trainer needs to go on."""
    held, passing = trainer.state_to_save(with_moments=True), trainer.state_on_disk(with_moments=True)
    write(folder, held, meta, files, trainer.world, passing)


def write(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    meta: CheckpointMeta,
    files: Mapping[str, str],
    world: World,
    passing: Iterable[tuple[str, Tensor]] = (),
) -> None:
    """Returns when it is whole; UserError if it cannot be."""
    writer = Writer(world)
    writer.start(folder, tensors, meta, files, 99, passing)
    failure = writer.settle()
    if failure is not None:
        raise UserError(failure)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing more into one file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
