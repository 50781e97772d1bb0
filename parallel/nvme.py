"""Masters and moments of experts in a file on a local disk, read and written by DeepSpeed's asynchronous I/O.

Source: Rajbhandari et al., "ZeRO-Infinity", arXiv 2104.07857, section 5.2. While one expert is used, the next is read and the
one before is written, so the host keeps three experts, however many there are.

DeepSpeed's threads look neither at how many bytes a transfer moved nor at its error. So the disk's blocks are reserved before
anything is written, and the sum of an expert's bits, kept in memory, tells on reading whether they are those that were written.
The file has no name: nobody else can open it, and the system removes it with the process, however that ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from kernels.errors import UserError
from parallel.adamw import MOMENTS
from parallel.expert_states import ExpertState, ExpertStates
from parallel.operators import building
from parallel.sparse_collectives import Shapes

IN_FLIGHT = 3  # experts that the host keeps: the one in use, the next and the one before
ALIGNMENT = 4096  # bytes; direct transfers start and end at multiples of a disk's blocks
BLOCK_BYTES, QUEUE_DEPTH = 2**20, 32  # of one request, and how many are with the disk at once
FLOAT32 = 4


def expert_bytes(parts: Shapes) -> int:
    """That one expert takes in the file, and in the host's memory while it is there."""
    values = sum(torch.Size(part).numel() for part in parts) * (1 + len(MOMENTS))
    return -(-values * FLOAT32 // ALIGNMENT) * ALIGNMENT


class StatesOnDisk(ExpertStates):
    def __init__(self, rows: int, parts: Shapes, folder: Path) -> None:
        """All zeros. The file lies in `folder`.

        Raises:
            UserError: no such folder, not writable, too small, not on a disk; or DeepSpeed's operator is not available.
        """
        self.rows, self.parts, self._folder = rows, parts, folder
        self._bytes = expert_bytes(parts)
        self._places = list(range(rows))  # of each row in the file
        self._sums = [0] * rows  # of what each place holds
        operator = _operator()
        self._file = _reserved(folder, rows * self._bytes)
        # Its own list of open files tells DeepSpeed, which wants a path, the way to a file without a name.
        self._path = f"/proc/self/fd/{self._file.fileno()}"
        handles = [operator.aio_handle(BLOCK_BYTES, QUEUE_DEPTH, False, True, 1) for _ in range(2)]
        self._reader, self._writer = (_Transfers(handle) for handle in handles)
        self._buffers = _locked(handles[0], IN_FLIGHT, self._bytes)
        weakref.finalize(self, _free, handles[0], self._buffers)
        self._states = [_split(buffer, parts) for buffer in self._buffers]
        self._visited = False

    def _visit(self, rows: Sequence[int], *, change: bool) -> Generator[ExpertState]:
        """
        Raises:
            UserError: the disk lost what had been written.
        """
        assert not self._visited, "a visit ends before the next begins: they share buffers"
        self._visited = True
        try:
            if rows:
                self._start_reading(rows[0], 0)
            for index, row in enumerate(rows):
                slot = index % IN_FLIGHT
                self._finish_reading(row, slot)
                if index + 1 < len(rows):
                    self._start_reading(rows[index + 1], (index + 1) % IN_FLIGHT)
                yield self._states[slot]
                if change:
                    self._writer.wait()  # for the row before, whose buffer the next but one will take
                    self._start_writing(row, slot)
        finally:  # also where the caller has left the loop: the threads must be done with buffers and handles
            self._reader.wait()
            self._writer.wait()
            self._visited = False

    def reorder(self, order: Sequence[int]) -> None:
        """Nothing moves."""
        self._places = [self._places[row] for row in order]

    def _start_reading(self, row: int, slot: int) -> None:
        place = self._places[row]
        size = os.fstat(self._file.fileno()).st_size
        if size < (place + 1) * self._bytes:  # DeepSpeed would end the process
            raise self._lost(place, f"it ends after {size} bytes")
        started = self._reader.handle.async_pread(self._buffers[slot], self._path, place * self._bytes)
        self._reader.started(started, self._folder)

    def _finish_reading(self, row: int, slot: int) -> None:
        self._reader.wait()
        place = self._places[row]
        if _sum(self._buffers[slot]) != self._sums[place]:
            raise self._lost(place, "what was read is not what had been written")

    def _start_writing(self, row: int, slot: int) -> None:
        place = self._places[row]
        self._sums[place] = _sum(self._buffers[slot])
        started = self._writer.handle.async_pwrite(self._buffers[slot], self._path, place * self._bytes)
        self._writer.started(started, self._folder)

    def _lost(self, place: int, why: str) -> UserError:
        return UserError(
            f"the disk of parallel.nvme_dir={self._folder} on {socket.gethostname()} lost optimizer state, bytes "
            f"{place * self._bytes} to {(place + 1) * self._bytes} of this rank's file: {why}. The kernel's log may say more. "
            "Choose another disk, or parallel.offload=cpu, and start again with resume=auto"
        )


class _Transfers:
    """One way, one transfer at a time."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self._under_way = False

    def started(self, answer: int, folder: Path) -> None:
        if answer != 0:
            raise UserError(f"a file in parallel.nvme_dir={folder} cannot be opened for direct transfers any more")
        self._under_way = True

    def wait(self) -> None:
        if self._under_way:  # with nothing under way DeepSpeed would end the process
            self.handle.wait()
            self._under_way = False


def _split(buffer: Tensor, parts: Shapes) -> ExpertState:
    """Views of a buffer: for each part the master and its moments."""
    tensors, first = [], 0
    for part in parts:
        size = torch.Size(part).numel()
        for _ in range(1 + len(MOMENTS)):
            tensors.append(buffer[first : first + size].view(part))
            first += size
    step = 1 + len(MOMENTS)
    moments = tuple(dict(zip(MOMENTS, tensors[i + 1 : i + step], strict=True)) for i in range(0, len(tensors), step))
    return ExpertState(tuple(tensors[::step]), moments)


def _sum(buffer: Tensor) -> int:
    return int(buffer.view(torch.int64).sum())


# ---------------------------------------------------------------- what the machine must have


def _operator() -> Any:
    """DeepSpeed's operator, compiled by the first process that asks for it on a machine.

    Raises:
        UserError: it cannot be compiled or loaded.
    """
    # After RANK and WORLD_SIZE are set; it also takes a second. For CPUs: the buffers lie on the host, and it needs no nvcc.
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    try:
        with building():
            return AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # whatever DeepSpeed, torch's build or the linker raise
        reason = str(error).partition("\n")[0].partition(": [")[0].rstrip(".")  # without the compiler's command line
        raise UserError(
            f"parallel.offload=nvme needs DeepSpeed's asynchronous I/O, which cannot be compiled here: {reason}. Install g++ "
            "and libaio with its headers (Debian and Ubuntu: libaio-dev, Fedora: libaio-devel), put g++ and ninja on the PATH, "
            "or set parallel.offload=cpu"
        ) from error


def _reserved(folder: Path, size: int) -> IO[bytes]:
    """A file of `size` zeros without a name, whose blocks are its own.

    Raises:
        UserError: the folder is not there, not writable, or too small, or its file system has no direct transfers.
    """
    name = f"parallel.nvme_dir={folder} on {socket.gethostname()}"
    if not folder.is_dir():
        raise UserError(f"{name} is not a folder; make it, on a local disk, or give another")
    try:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it lives as long as the states
    except OSError as error:
        raise UserError(f"{name} is not writable: {error.strerror}. Check its permissions, or give another") from error
    free = shutil.disk_usage(folder).free
    small = UserError(
        f"{name} is too small: this rank's share of the optimizer needs {size:,} bytes and {free:,} are free. Make room, give "
        "another disk, take more ranks, or set parallel.offload=cpu"
    )
    if size > free:
        raise small
    try:
        os.close(os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT))
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # other ranks reserve at the same time
            raise small from error
        raise UserError(f"{name} has no direct transfers: {error.strerror}. Give a folder on a local disk") from error
    return file


def _locked(handle: Any, count: int, size: int) -> list[Tensor]:
    """Buffers of `size` bytes as float32, in pages that stay in memory: DeepSpeed copies what lies elsewhere.

    Raises:
        UserError: this process may not lock so much.
    """
    libc, probe = ctypes.CDLL(None, use_errno=True), torch.empty(count * size, dtype=torch.uint8)
    pages = ctypes.c_void_p(probe.data_ptr()), ctypes.c_size_t(probe.nbytes)
    if libc.mlock(*pages) != 0:  # DeepSpeed would end the process
        raise UserError(
            f"parallel.offload=nvme keeps {count} experts, {count * size:,} bytes, in locked memory, and this process may not: "
            f"{os.strerror(ctypes.get_errno())}. Raise the limit (ulimit -l; for a container --ulimit memlock=-1)"
        )
    libc.munlock(*pages)
    example = torch.empty(0, dtype=torch.float32)
    return [handle.new_cpu_locked_tensor(size // FLOAT32, example).zero_() for _ in range(count)]


def _free(handle: Any, buffers: list[Tensor]) -> None:
    for buffer in buffers:
        handle.free_cpu_locked_tensor(buffer)
