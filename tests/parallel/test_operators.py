"""Operators are built by one process at a time, and one that was killed over it keeps nobody waiting."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.cpp_extension as torch_build

from parallel.operators import building

ROOT = Path(__file__).parents[2]
HOLDS = """
import sys, time
import torch.utils.cpp_extension as torch_build
from parallel.operators import building
with building():
    torch_build.FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""
ASKS = HOLDS.replace("time.sleep(600)", "")


def test_a_live_process_is_waited_for_and_a_killed_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()  # as torch leaves it behind
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    hold = [sys.executable, "-c", HOLDS, tmp_path / "lock"]
    with subprocess.Popen(hold, env=environment, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            with subprocess.Popen([sys.executable, "-c", ASKS, tmp_path / "lock"], env=environment) as asker:
                with pytest.raises(subprocess.TimeoutExpired):
                    asker.wait(timeout=12)
                holder.kill()
                assert asker.wait(timeout=60) == 0
        finally:
            holder.kill()


def test_torch_keeps_its_own_way_outside() -> None:
    own = torch_build.FileBaton
    with pytest.raises(ZeroDivisionError), building():
        assert torch_build.FileBaton is not own
        _ = 1 / 0
    assert torch_build.FileBaton is own


@pytest.mark.cpu_adam
def test_an_operator_loads_where_a_killed_process_was_building_it(tmp_path: Path) -> None:
    built = Path(torch_build._get_build_directory("cpu_adam", verbose=False))
    copy = tmp_path / "cpu_adam"
    shutil.copytree(built, copy)  # with its times: nothing is to be compiled
    (copy / "lock").touch()
    program = "import parallel.offload as o; o.check_offload('cpu', None)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=200)
    assert (copy / "lock").exists(), "it is torch's; another program may be building"
