"""A benchmark on several ranks of this machine: one on each GPU over NCCL, or processes on a CPU over gloo."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kernels.errors import UserError
from launch.benchmarks.hosts import move_to
from launch.benchmarks.timing import Call, Timing, interleaved
from parallel.profiling import HEAD_START_CYCLES
from parallel.topology import World, join, leave

REPEATS = 20
TIMEOUT_S = 120.0
LOOK_S = 0.1  # between two looks at whether the ranks have a result, or are done
Options = TypeVar("Options")
Cases = TypeVar("Cases")
Found = TypeVar("Found")


def on_ranks(
    work: Callable[[World, Options, Cases], Found],
    ranks: int,
    options: Options,
    cases: Cases,
    kind: str,
    hosts: Sequence[str] = (),
) -> Found:
    """What `work` returns on rank 0. `hosts` (hosts.py) get equally many ranks each. Raises UserError without a GPU for every
    rank."""
    if kind == "cuda" and torch.cuda.device_count() < ranks:
        raise UserError(f"ranks = {ranks} needs as many GPUs, and there are {torch.cuda.device_count()}")
    # A fork could not use CUDA, which imports open; without it, ranks are forks of a server that has imported for all of them.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    mp.get_context("forkserver").set_forkserver_preload([work.__module__])
    queue = mp.get_context(method).SimpleQueue()
    with TemporaryDirectory() as folder:
        arguments = (work, ranks, options, cases, kind, folder, queue, hosts)
        found: list[Found] = []
        processes: list[Any] = []
        try:
            with signals_afterwards():
                started = mp.start_processes(_rank, arguments, nprocs=ranks, join=False, start_method=method)
                processes += started.processes
            while not started.join(timeout=LOOK_S):
                if not queue.empty():  # a rank does not end before all of its result is read
                    found.append(queue.get())
        except BaseException:  # a signal, which the ranks need not have had: nobody would wait for them, or leave their hosts
            for process in processes:
                process.kill()
                process.join()
            raise
    return found[0] if found else queue.get()


@contextmanager
def signals_afterwards() -> Iterator[None]:
    """Ctrl-C and SIGTERM in the `with` block act after it: half-started processes would be nobody's to end."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone has signals
        yield
        return
    before = {one: signal.signal(one, lambda number, frame: arrived.append(number)) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    for number in arrived:
        signal.raise_signal(number)


def _rank(
    rank: int, work: Any, ranks: int, options: Any, cases: Any, kind: str, folder: str, queue: Any, hosts: Sequence[str]
) -> None:
    if hosts:
        move_to(hosts[rank * len(hosts) // ranks])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cpu":
        torch.set_num_threads(1)
    world = join(dist.FileStore(f"{folder}/store", ranks), rank, ranks, device, TIMEOUT_S)
    found = work(world, options, cases)
    if rank == 0:
        queue.put(found)
    leave(world)


def slowest(calls: dict[str, Call], world: World, repeats: int | None, *, together: bool = False) -> dict[str, Timing]:
    """The times of each call on the rank that takes longest; all ranks call each as often.

    `together`: GPUs begin each call at the same time, when the host has started all of it, so what is timed is what they do.
    """
    one = torch.ones(1, device=world.device)

    def meet() -> None:
        torch.cuda._sleep(HEAD_START_CYCLES)
        dist.all_reduce(one)

    before = meet if together and world.device.type == "cuda" else None
    found = {}
    for name, timing in interleaved(calls, world.device, repeats or REPEATS, before).items():
        all_ranks: list[Any] = [None] * world.size
        dist.all_gather_object(all_ranks, timing)
        found[name] = max(all_ranks, key=lambda one: one.median_ms)
    return found
