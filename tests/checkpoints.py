"""Writing a checkpoint and waiting for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from kernels.errors import UserError
from parallel.topology import World
from trainer.checkpoint import CheckpointMeta, Writer


def write(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], meta: CheckpointMeta, files: Mapping[str, str], world: World
) -> None:
    """Returns when it is whole; UserError if it cannot be."""
    writer = Writer(world)
    writer.start(folder, tensors, meta, files, keep=99)
    failure = writer.settle()
    if failure is not None:
        raise UserError(failure)
