"""What a disk gives back is what memory would have kept, and a disk that does not is told of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from parallel.expert_states import ExpertState, ExpertStates, StatesInMemory
from parallel.nvme import IN_FLIGHT, StatesOnDisk, expert_bytes
from parallel.sparse_collectives import Shapes

pytestmark = pytest.mark.cpu_adam

DISK = Path(tempfile.gettempdir())
PARTS = ((6, 5), (5, 3))
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def add(states: ExpertStates, rows: list[int], seed: int) -> None:
    """Something else to each tensor of each row."""

    def change(row: int, state: ExpertState) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + row)
        for tensor in state.tensors():
            tensor.add_(torch.randn(tensor.shape, generator=generator))

    states.change(rows, change)


def copied(states: ExpertStates, rows: list[int]) -> list[torch.Tensor]:
    return [tensor.clone() for state in states.read(rows) for tensor in state.tensors()]


def in_memory(rows: int, parts: Shapes) -> StatesInMemory:
    """Zeros, as a new file has."""
    states = StatesInMemory(rows, parts, torch.device("cpu"))
    for state in states.read(range(rows)):
        for master in state.masters:
            master.zero_()
    return states


@pytest.mark.aio
@settings(max_examples=25)
@given(st.integers(1, 8), shapes, shapes, st.data())
def test_a_disk_keeps_what_memory_keeps(
    rows: int, first: tuple[int, int], second: tuple[int, int], data: st.DataObject
) -> None:
    memory, disk = in_memory(rows, (first, second)), StatesOnDisk(rows, (first, second), DISK)
    for seed in range(data.draw(st.integers(1, 3))):
        some, order = data.draw(st.permutations(range(rows))), data.draw(st.permutations(range(rows)))
        some = some[: data.draw(st.integers(0, rows))]
        for states in (memory, disk):
            add(states, some, seed)
            states.reorder(order)
        asked = data.draw(st.permutations(range(rows)))
        for found, wanted in zip(copied(disk, asked), copied(memory, asked), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.aio
def test_few_experts_are_in_memory_and_nothing_has_a_name(tmp_path: Path) -> None:
    disk = StatesOnDisk(10, PARTS, tmp_path)
    add(disk, list(range(10)), 0)
    assert len({state.masters[0].data_ptr() for state in disk.read(range(10))}) == IN_FLIGHT
    assert not list(tmp_path.iterdir()) and os.fstat(disk._file.fileno()).st_mode & 0o777 == 0o600
    assert os.fstat(disk._file.fileno()).st_blocks * 512 >= 10 * expert_bytes(PARTS), "blocks are reserved"


@pytest.mark.aio
def test_a_reader_may_leave_and_a_change_that_fails_changes_nothing() -> None:
    disk = StatesOnDisk(6, PARTS, DISK)
    add(disk, list(range(6)), 0)
    before = copied(disk, list(range(6)))
    next(iter(disk.read(range(6))))

    def fail(row: int, state: ExpertState) -> None:
        state.masters[0].zero_()
        raise KeyError(row)

    with pytest.raises(KeyError):
        disk.change(range(6), fail)
    assert all(torch.equal(*pair) for pair in zip(copied(disk, list(range(6))), before, strict=True))


class Watched:
    """A handle of DeepSpeed that notes what it is asked for."""

    def __init__(self, handle: Any, name: str, notes: list[str]) -> None:
        self._handle, self._name, self._notes = handle, name, notes
        self.async_pread = self.async_pwrite = self._start

    def _start(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        self._notes.append(f"{self._name} {offset // expert_bytes(PARTS)}")
        start = self._handle.async_pread if self._name == "read" else self._handle.async_pwrite
        return int(start(buffer, path, offset))

    def wait(self) -> None:
        self._notes.append(f"wait for {self._name}")
        self._handle.wait()


@pytest.mark.aio
def test_the_next_is_read_and_the_one_before_is_written_while_one_is_used() -> None:
    disk, notes = StatesOnDisk(4, PARTS, DISK), list[str]()
    for name, transfers in (("read", disk._reader), ("write", disk._writer)):
        transfers.handle = Watched(transfers.handle, name, notes)
    disk.change(range(4), lambda row, state: notes.append(f"use {row}"))
    first = ["read 0", "wait for read", "read 1", "use 0", "write 0"]
    second = ["wait for read", "read 2", "use 1", "wait for write", "write 1"]
    third = ["wait for read", "read 3", "use 2", "wait for write", "write 2"]
    assert notes == [*first, *second, *third, "wait for read", "use 3", "wait for write", "write 3", "wait for write"]


@pytest.mark.aio
@pytest.mark.parametrize("lost", ["bytes", "an old write", "the end"])
def test_what_the_disk_lost_is_told(lost: str) -> None:
    disk = StatesOnDisk(5, PARTS, DISK)
    file, size = disk._file.fileno(), expert_bytes(PARTS)
    add(disk, list(range(5)), 0)
    old = os.pread(file, size, 3 * size)
    add(disk, list(range(5)), 1)
    if lost == "the end":
        os.ftruncate(file, 4 * size - 1)
    else:
        os.pwrite(file, old if lost == "an old write" else b"\x01", 3 * size)
    where = rf"parallel\.nvme_dir={DISK} on .* lost .* bytes {3 * size} to {4 * size} of this rank's file: "
    with pytest.raises(UserError, match=where + ("it ends after" if lost == "the end" else "what was read is not")):
        copied(disk, list(range(5)))
    copied(disk, [0, 1, 2])  # the others are there, and the threads are well


@pytest.mark.aio
def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib, parallel.nvme as n\n"
        f"states = n.StatesOnDisk(64, ((256, 256),), pathlib.Path({str(tmp_path)!r}))\n"
        "print('there', flush=True)\ntime.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("there" in line for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.iterdir())


@pytest.mark.aio
def test_a_folder_that_will_not_do_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"parallel\.nvme_dir={tmp_path}/none on .* is not a folder; make it"):
        StatesOnDisk(1, PARTS, tmp_path / "none")
    with pytest.raises(UserError, match=r"parallel\.nvme_dir=/sys on .* is not writable: .* Check its permissions"):
        StatesOnDisk(1, PARTS, Path("/sys"))
    huge = ((2**24, 2**20), (2**20, 2**23))
    with pytest.raises(UserError, match=rf"too small: .* needs {2 * expert_bytes(huge):,} bytes and [\d,]+ are free"):
        StatesOnDisk(2, huge, tmp_path)


def test_without_a_compiler_there_is_a_way_out(tmp_path: Path) -> None:
    program = (
        "import pathlib, parallel.nvme as n\nfrom kernels.errors import UserError\n"
        f"try: n.StatesOnDisk(1, ((8, 8),), pathlib.Path({str(tmp_path)!r}))\n"
        "except UserError as error: print('told:', error)"
    )
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert "told: parallel.offload=nvme needs DeepSpeed's asynchronous I/O" in done.stdout, done.stdout + done.stderr
    assert "cannot be compiled here: Error building extension 'pin_memory'. Install g++" in done.stdout
    assert "libaio-dev" in done.stdout and "or set parallel.offload=cpu" in done.stdout
