"""Runs a function on several ranks of this machine, gloo on CPUs or NCCL on GPUs, and collects what each returns."""

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

# Ranks are forked from a server that has imported what takes seconds.
mp.get_context("forkserver").set_forkserver_preload(["tests.distributed.preloaded"])


def run_ranks(function: Callable[..., Any], size: int, *args: Any, kind: str = "cpu") -> list[Any]:
    """`function(world, *args)` on every rank; a failure on any rank fails the caller with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, folder, function, args, kind)
        # The server's DeepSpeed is for GPUs where there are any; ranks on the CPUs of such a machine import their own.
        method = "spawn" if kind == "cpu" and torch.cuda.is_available() else "forkserver"
        mp.start_processes(_rank, arguments, nprocs=size, start_method=method)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...], kind: str) -> None:
    os.environ["DS_ACCELERATOR"] = kind
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, rank)
    world = join(store, rank, size, device, timeout_s=120)
    result = function(world, *args)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
    leave(world)
