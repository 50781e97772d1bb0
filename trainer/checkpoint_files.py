"""Names of a checkpoint's folder, and checksums of its files; without torch, because keepers start without it."""

from __future__ import annotations

import hashlib
from pathlib import Path

Checksum = dict[str, int | str]


def folder_name(step: int) -> str:
    return f"step_{step:06d}"


def step_of(folder: Path) -> int:
    """Of a folder with such a name."""
    return int(folder.name.removeprefix("step_"))


def checksum(path: Path) -> Checksum:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
