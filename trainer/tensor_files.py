"""Safetensors files that other members of a team can read, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

READ_AND_WRITE = 0o666


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """`save_file`, for those who may use the folder: the library's own files are its user's alone.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    save_file(dict(tensors), file, None if metadata is None else dict(metadata))
    file.chmod(file.parent.stat().st_mode & READ_AND_WRITE)
