"""Pages that all ranks of a host read: what was written before a barrier is there, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from kernels.errors import UserError
from parallel import peer_memory
from parallel.peer_memory import PeerMemory, view, within_reach
from parallel.topology import World
from parallel.transport import transport_kind
from tests.distributed.ranks import run_ranks
from trainer.config.run import ParallelConfig


def exchange(world: World, folder: str) -> tuple[bool, list[list[float]], int]:
    peer_memory.SHARED_FOLDER = Path(folder)
    blocks = [PeerMemory(world, 4096) for _ in range(2)]
    world.barrier()
    left = len(list(Path(folder).glob("*"))) if Path(folder).exists() else 0
    found = []
    for turn in range(10):
        block = blocks[turn % 2]
        view(block.own, 64, (4, 8), torch.float32).fill_(100 * world.rank + turn)
        block.meet() if turn % 3 else block.barrier()
        found.append([float(view(other, 64, (4, 8), torch.float32).unique()) for other in block.of_rank])
    return within_reach(world), found, left


@pytest.mark.parametrize("missing", [False, True])
def test_ranks_see_what_others_wrote(tmp_path: Path, missing: bool) -> None:
    folder = tmp_path / "gone" if missing else tmp_path
    for reachable, found, left in run_ranks(exchange, 3, str(folder)):
        assert reachable and left == 0
        assert found == [[100.0 * rank + turn for rank in range(3)] for turn in range(10)]


def choose(world: World) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    for ranks_per_node in (1, 2, 4):
        split = replace(world, ranks_per_node=ranks_per_node)
        for wanted in get_args(ParallelConfig.model_fields["transport"].annotation):
            try:
                found[wanted, ranks_per_node] = transport_kind(wanted, split)
            except UserError as error:
                found[wanted, ranks_per_node] = str(error)
    return found


def test_the_transport_is_what_suits_the_nodes() -> None:
    """Memory is read where it is in reach; several nodes of several ranks have two levels."""
    for found in run_ranks(choose, 4):
        assert [found["auto", ranks] for ranks in (1, 2, 4)] == ["messages", "two_level", "peer_memory"]
        assert {found["messages", ranks] for ranks in (1, 2, 4)} == {"messages"}
        assert found["two_level", 2] == "two_level" and found["peer_memory", 4] == "peer_memory"
        assert "4 ranks on 4 nodes of 1 leave one level only" in found["two_level", 1]
        assert "4 ranks on 1 node of 4 leave one level only" in found["two_level", 4]
        for ranks in (1, 2):
            assert "cannot read each other's memory" in found["peer_memory", ranks]
        assert all("transport=auto" in text for text in found.values() if " " in text)


def test_without_room_in_memory_the_file_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, count: int) -> None:
        monkeypatch.undo()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peer_memory, "SHARED_FOLDER", tmp_path)
    monkeypatch.setattr(peer_memory.os, "posix_fallocate", full)
    with peer_memory._shared_file(100) as file:
        assert Path(file.name).parent != tmp_path and Path(file.name).stat().st_size == 100
