"""Runs a function on several gloo ranks of this machine and collects what each returns."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parallel.topology import join, leave


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """`function(world, *args)` on every rank; a failure on any rank fails the caller with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (size, folder, function, args), nprocs=size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    world = join(store, rank, size, torch.device("cpu"), timeout_s=120)
    result = function(world, *args)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
    leave(world)
