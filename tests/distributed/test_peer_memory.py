"""Pages that all ranks of a host read: what was written before a barrier is there, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.errors import UserError
from parallel import peer_memory
from parallel.peer_memory import PeerMemory, view, within_reach
from parallel.topology import World
from parallel.transport import reads_peer_memory
from tests.distributed.ranks import run_ranks


def exchange(world: World, folder: str) -> tuple[bool, list[list[float]], int]:
    peer_memory.SHARED_FOLDER = Path(folder)
    blocks = [PeerMemory(world, 4096) for _ in range(2)]
    world.barrier()
    left = len(list(Path(folder).glob("*"))) if Path(folder).exists() else 0
    found = []
    for turn in range(10):
        block = blocks[turn % 2]
        view(block.own, 64, (4, 8), torch.float32).fill_(100 * world.rank + turn)
        block.barrier()
        found.append([float(view(other, 64, (4, 8), torch.float32).unique()) for other in block.of_rank])
    return within_reach(world), found, left


@pytest.mark.parametrize("missing", [False, True])
def test_ranks_see_what_others_wrote(tmp_path: Path, missing: bool) -> None:
    folder = tmp_path / "gone" if missing else tmp_path
    for reachable, found, left in run_ranks(exchange, 3, str(folder)):
        assert reachable and left == 0
        assert found == [[100.0 * rank + turn for rank in range(3)] for turn in range(10)]


def choose(world: World) -> list[bool | str]:
    apart = World(world.rank, world.size, world.device, ranks_per_node=1)
    found: list[bool | str] = [reads_peer_memory("auto", world), reads_peer_memory("messages", world)]
    found.append(reads_peer_memory("auto", apart))
    try:
        reads_peer_memory("peer_memory", apart)
    except UserError as error:
        found.append(str(error))
    return found


def test_memory_is_read_where_it_is_in_reach() -> None:
    for here, by_wish, apart, error in run_ranks(choose, 2):
        assert here is True and by_wish is False and apart is False
        assert "cannot read each other's memory" in str(error) and "parallel.transport=auto" in str(error)


def test_without_room_in_memory_the_file_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, count: int) -> None:
        monkeypatch.undo()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peer_memory, "SHARED_FOLDER", tmp_path)
    monkeypatch.setattr(peer_memory.os, "posix_fallocate", full)
    with peer_memory._shared_file(100) as file:
        assert Path(file.name).parent != tmp_path and Path(file.name).stat().st_size == 100
