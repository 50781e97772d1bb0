"""GPUs that read each other's memory compute what one device computes, and so do GPUs that send messages, in chunks or not."""

from __future__ import annotations

import os
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parallel.peer_memory import PeerMemory, view, within_reach
from parallel.placement import TransportKind
from parallel.schedule.pipeline import Degrees
from parallel.topology import World, join, leave
from tests.distributed.ranks import run_ranks
from tests.distributed.test_moe_layer import CASES, close, equal, one_device, spread
from tests.gpu.needs import RANKS, gpus, linked

pytestmark = [pytest.mark.gpu, gpus(2)]


def read_the_next(world: World, wait: str = "barrier") -> tuple[bool, list[list[int]]]:
    """What a rank finds in the next one's memory, round after round in two blocks. Ranks set out late in turn."""
    blocks = [PeerMemory(world, 4096) for _ in range(2)]
    found = []
    for turn in range(20):
        block = blocks[turn % 2]
        if turn % world.size == world.rank:
            torch.cuda._sleep(10_000_000)
        view(block.own, 0, (1024,), torch.int32).fill_(1000 * world.rank + turn)
        getattr(block, wait)()
        found.append(view(block.of_rank[(world.rank + 1) % world.size], 0, (1024,), torch.int32).unique().tolist())
    return within_reach(world), found


@linked(RANKS)
@pytest.mark.parametrize("wait", ["barrier", "meet"])
def test_ranks_see_what_others_wrote_before_they_met(wait: str) -> None:
    for rank, (reachable, found) in enumerate(run_ranks(read_the_next, RANKS, wait, kind="cuda")):
        assert reachable, "the GPUs of this machine are not linked"
        assert found == [[1000 * ((rank + 1) % RANKS) + turn] for turn in range(20)]


def isolated(rank: int, size: int, folder: str) -> None:
    """A rank that is shown its own GPU alone, as Ray does."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    world = join(dist.FileStore(f"{folder}/store", size), rank, size, torch.device("cuda", 0), timeout_s=120)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(read_the_next(world)))
    leave(world)


@linked(RANKS)
def test_ranks_that_see_one_gpu_each(tmp_path: Path) -> None:
    mp.start_processes(isolated, (RANKS, str(tmp_path)), nprocs=RANKS, start_method="spawn")
    for rank in range(RANKS):
        reachable, found = pickle.loads((tmp_path / str(rank)).read_bytes())
        assert reachable and found == [[1000 * ((rank + 1) % RANKS) + turn] for turn in range(20)]


def never_met(rank: int, size: int, folder: str) -> None:
    """Rank 0 waits for rank 1, which lives and does not come."""
    world = join(dist.FileStore(f"{folder}/store", size), rank, size, torch.device("cuda", rank), timeout_s=5)
    block, told = PeerMemory(world, 4096), Path(folder) / "told"
    if rank == 0:
        block.barrier()
        with pytest.raises(RuntimeError):
            torch.cuda.synchronize()
        told.touch()
    while not told.exists():
        time.sleep(0.1)
    sys.stdout.flush()
    os._exit(0)  # nothing can be done with this GPU any more, nor with the group


@linked(2)
def test_a_rank_that_does_not_come_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    mp.start_processes(never_met, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    assert time.monotonic() - started < 90
    assert "rank 0 failed to receive signal from rank 1" in capfd.readouterr().out


def test_two_levels_equal_experts_on_one_device() -> None:
    """Of one node of two ranks, or two of one: each hop in turn has something to carry; four GPUs have both."""
    check_against_one_device(min(RANKS, 8), "two_level")


@pytest.mark.parametrize("kind", [pytest.param("peer_memory", marks=linked(2)), "messages"])
def test_sharded_experts_equal_experts_on_one_device(kind: TransportKind) -> None:
    check_against_one_device(2, kind)


def check_against_one_device(size: int, kind: TransportKind) -> None:
    by_rank = run_ranks(spread, size, range(CASES), "none", kind, kind="cuda")
    for seed in range(CASES):
        expected = one_device(seed, size)
        for micro, wanted in enumerate(expected["tokens"]):
            for index in range(3):
                parts = [rank[seed]["tokens"][micro][index].cpu() for rank in by_rank]
                close(torch.cat(parts, dim=1 if index == 2 else 0), wanted[index], f"case {seed}, micro-batch {micro}")


def test_no_number_depends_on_the_degrees() -> None:
    """Float32 here; with the bfloat16 kernels in test_chunks.py."""
    for kind in ("messages", "two_level"):
        check_degrees(kind)


def check_degrees(kind: TransportKind) -> None:
    whole = run_ranks(spread, 2, range(CASES), "none", kind, kind="cuda")
    cut = run_ranks(spread, 2, range(CASES), "none", kind, [Degrees(2, 3), Degrees(16, 1)], kind="cuda")
    for one, other in zip(cut, whole, strict=True):
        for found, wanted in zip(one, other, strict=True):
            equal(found, wanted)
