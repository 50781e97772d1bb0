"""Operators are built by one process at a time, and one that was killed over it keeps nobody waiting."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from select import select

import pytest
import torch.utils.cpp_extension as torch_build

from parallel.operators import building, folder

ROOT = Path(__file__).parents[2]
HOLDS = """
import sys, time
import torch.utils.cpp_extension as torch_build
from parallel.operators import building
with building():
    baton = torch_build.FileBaton(sys.argv[1])
    print("asks", flush=True)
    assert baton.try_acquire()
print("holds", flush=True)
time.sleep(600)
"""
WAITS_S = 2  # for what must not happen


def test_a_live_process_is_waited_for_and_a_killed_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()  # as torch leaves it behind
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDS, tmp_path / "lock"]
    hold = partial(
        subprocess.Popen, command, env=environment, stdout=subprocess.PIPE, bufsize=0
    )  # select sees all that is left
    with hold() as first, hold() as second:
        processes = {first.stdout: first, second.stdout: second}
        try:
            for stdout in processes:
                assert stdout is not None and stdout.readline() == b"asks\n"
            (one,) = select(list(processes), [], [], 60)[0]
            assert one.readline() == b"holds\n"
            assert not select(list(processes), [], [], WAITS_S)[0], "both hold it"
            processes.pop(one).kill()
            (other,) = processes
            assert other.readline() == b"holds\n"
        finally:
            first.kill()
            second.kill()


def test_torch_keeps_its_own_way_outside() -> None:
    own = torch_build.FileBaton
    with pytest.raises(ZeroDivisionError), building():
        assert torch_build.FileBaton is not own
        _ = 1 / 0
    assert torch_build.FileBaton is own


@pytest.mark.cpu_adam
def test_an_operator_loads_where_a_killed_process_was_building_it(tmp_path: Path) -> None:
    with building():
        built = Path(torch_build._get_build_directory("cpu_adam", verbose=False))
    copy = tmp_path / "cpu_adam"
    shutil.copytree(built, copy)  # with its times: nothing is to be compiled
    (copy / "lock").touch()
    program = "import parallel.offload as o; o.check_offload('cpu', None)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=200)
    assert (copy / "lock").exists(), "it is torch's; another program may be building"


def test_each_virtual_environment_keeps_its_own_where_nobody_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder("/one/.venv") == folder("/one/.venv") != folder("/other/.venv")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/said")
    with building():
        assert os.environ["TORCH_EXTENSIONS_DIR"] == "/said"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    with building():
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(folder(sys.prefix))
