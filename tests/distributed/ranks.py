"""Runs a function on several ranks of this machine, gloo on CPUs or NCCL on GPUs, and collects what each returns."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parallel.topology import World, join, leave


def start_server() -> None:
    """Starts what ranks are forked from, which imports what would take each of them seconds.

    A process has one such server, and it imports what it was told when it started. So this is called before tests run: started
    by a benchmark among them, it would know that benchmark alone, and every rank of every later test would import the rest.
    """
    mp.get_context("forkserver").set_forkserver_preload(["tests.distributed.preloaded"])
    forkserver.ensure_running()


def run_ranks(function: Callable[..., Any], size: int, *args: Any, kind: str = "cpu") -> list[Any]:
    """`function(world, *args)` on every rank; a failure on any rank fails the caller with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, folder, function, args, kind)
        # The server's DeepSpeed is for GPUs where there are any; ranks on the CPUs of such a machine import their own.
        method = "spawn" if kind == "cpu" and torch.cuda.is_available() else "forkserver"
        if method == "forkserver":
            start_server()  # unless it runs
        mp.start_processes(_rank, arguments, nprocs=size, start_method=method)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(size)]


def run_cases(function: Callable[..., Any], size: int, cases: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """For each case what `run_ranks(function, size, *case)` returns; one after the other on the same ranks."""
    return [list(by_rank) for by_rank in zip(*run_ranks(_in_turns, size, function, cases), strict=True)]


def _in_turns(world: World, function: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [function(world, *case) for case in cases]


def _rank(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...], kind: str) -> None:
    os.environ["DS_ACCELERATOR"] = kind
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, rank)
    world = join(store, rank, size, device, timeout_s=120)
    result = function(world, *args)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
    leave(world)
