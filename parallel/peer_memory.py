"""Memory of every rank that all ranks read in place: over NVLink between GPUs, as shared pages between processes on a CPU.

It reaches as far as one node. What a rank wrote is seen by the others behind a barrier, and may be written anew behind the next
one, when all have read it; so two blocks in turns need one barrier an exchange. GPUs wait for each other in a kernel of the
current stream, or the stream waits by itself, and the host goes on.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.topology import World

FLAG_BYTES = 16  # of a counter of `meet`, with what keeps the next one apart
WRITE, WAIT_AT_LEAST = 0, 0  # CU_STREAM_WRITE_VALUE_DEFAULT, CU_STREAM_WAIT_VALUE_GEQ: cyclic, so counters may overflow
SHARED_FOLDER = Path("/dev/shm")  # of memory, not of a disk, where there is one


class PeerMemory:
    """`nbytes` bytes of each rank, as many on all of them. Made by all ranks together.

    Once one is made, every rank is through with what it had started before, so blocks that it replaces may be dropped.
    """

    def __init__(self, world: World, nbytes: int, group: dist.ProcessGroup | None = None) -> None:
        """`group`: of all ranks, in which CPUs wait for each other; None: their first one."""
        self.world, self.nbytes, self._group, self._met = world, nbytes, group, 0
        self.of_rank = self._mapped() if world.device.type == "cuda" else _shared_pages(world, nbytes)
        self.pointers_W = torch.tensor([block.data_ptr() for block in self.of_rank], device=world.device)

    def _mapped(self) -> list[Tensor]:
        from torch.distributed import _symmetric_memory as symmetric

        # A process may be shown its own GPU alone, as number 0; PyTorch takes equal numbers on a host for one and the same GPU.
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        torch.cuda.synchronize()
        behind = -(-self.nbytes // FLAG_BYTES) * FLAG_BYTES
        nbytes = behind + self.world.size * FLAG_BYTES
        own = symmetric.empty(nbytes, dtype=torch.uint8, device=self.world.device)
        own[behind:].zero_()
        torch.cuda.synchronize()
        assert dist.group.WORLD is not None, "ranks have joined"
        self._handle = symmetric.rendezvous(own, group=dist.group.WORLD)
        ranks = range(self.world.size)
        blocks = [own if r == self.world.rank else self._handle.get_buffer(r, (nbytes,), torch.uint8) for r in ranks]
        self._flags_W = [block.data_ptr() + behind for block in blocks]
        return [block[: self.nbytes] for block in blocks]

    @property
    def own(self) -> Tensor:
        return self.of_rank[self.world.rank]

    def barrier(self) -> None:
        """Behind it every rank sees what all had written before it.

        Who waits longer than a collective may says for which rank, on standard output, and fails: a GPU whose peer is gone
        would wait for as long as its process lives, and its host would not see it.
        """
        if self.world.device.type == "cuda":
            self._handle.barrier(channel=0, timeout_ms=int(1000 * self.world.timeout_s))
        else:
            dist.barrier(self._group)

    def meet(self) -> None:
        """A barrier for a stream beside the one that computes: of a GPU it takes no processor.

        A waiting kernel would keep one from products that take all of them, so these would begin without it and end late, on
        all ranks in turn. Here the stream itself writes to each rank's memory how often it has met, and waits until all have
        written that to this one's. Who waits for a rank that is gone waits until its process ends.
        """
        if self.world.device.type == "cpu":
            self.barrier()
            return
        from cuda.bindings import driver  # of PyTorch's own requirements, where it is built for GPUs

        stream, rank = torch.cuda.current_stream(self.world.device).cuda_stream, self.world.rank
        others = [other for other in range(self.world.size) if other != rank]
        self._met += 1
        for other in others:
            _check(driver.cuStreamWriteValue32(stream, self._flags_W[other] + FLAG_BYTES * rank, self._met, WRITE))
        for other in others:
            _check(driver.cuStreamWaitValue32(stream, self._flags_W[rank] + FLAG_BYTES * other, self._met, WAIT_AT_LEAST))


def _check(answer: tuple[Any]) -> None:
    """What the driver says to an order."""
    if int(answer[0]):
        raise RuntimeError(f"the CUDA driver does not let a stream write to, or wait for, memory: {answer[0]}")


def view(block: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A part of a block of bytes from byte `start` on, as a tensor."""
    return block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def within_reach(world: World) -> bool:
    """Whether every rank can read every other's memory in place. Collective; the same answer on all ranks."""
    if world.size == 1 or world.topology.nodes > 1:
        return False
    able = _gpus_reach(world) if world.device.type == "cuda" else _pages_reach(world)
    answer = torch.tensor(int(able), device=world.device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def _gpus_reach(world: World) -> bool:
    names: list[str] = [""] * world.size
    dist.all_gather_object(names, gpu_name(world.device))
    own = names[world.rank]
    return all(found for name, found in nvlinks(own, names).items() if name != own)


def gpu_name(device: torch.device) -> str:
    """Of a GPU, the same in all processes."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def nvlinks(own: str, names: Iterable[str]) -> dict[str, bool]:
    """name -> whether NVLink joins that GPU to the GPU `own` of this machine; those of other machines it does not.

    The driver is asked about GPUs by name, because a process may be shown its own one alone.
    """
    import pynvml

    pynvml.nvmlInit()
    here, found = pynvml.nvmlDeviceGetHandleByUUID(own), dict[str, bool]()
    for name in names:
        try:
            other = pynvml.nvmlDeviceGetHandleByUUID(name)
        except pynvml.NVMLError_NotFound:
            found[name] = False
            continue
        status = pynvml.nvmlDeviceGetP2PStatus(here, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) if name != own else None
        found[name] = status == pynvml.NVML_P2P_STATUS_OK
    pynvml.nvmlShutdown()
    return found


def _pages_reach(world: World) -> bool:
    """Host names may be alike on several hosts, so a file tells."""
    with _shared_file(1) as file:
        names: list[str] = [""] * world.size
        dist.all_gather_object(names, file.name)
        found = all(Path(name).exists() for name in names)
        world.barrier()
    return found


def _shared_pages(world: World, nbytes: int) -> list[Tensor]:
    """Pages of files whose names are gone again before anybody uses them, so they vanish with the processes."""
    with _shared_file(nbytes) as file:
        names: list[str] = [""] * world.size
        dist.all_gather_object(names, file.name)
        blocks = [torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8) for name in names]
        world.barrier()
    return blocks


@contextmanager
def _shared_file(nbytes: int) -> Iterator[Any]:
    """In memory where there is room, which containers often have little of; else in the folder for temporary files."""
    if os.access(SHARED_FOLDER, os.W_OK):
        with tempfile.NamedTemporaryFile(dir=SHARED_FOLDER) as file:
            if _allocated(file.fileno(), nbytes):
                yield file
                return
    with tempfile.NamedTemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        yield file


def _allocated(descriptor: int, nbytes: int) -> bool:
    """Asks for the room now: at the first write it would be a signal."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True
