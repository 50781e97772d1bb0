"""The doctor finds what is wrong, says what to do, and its collectives and Ray are real."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from kernels.errors import UserError
from launch import doctor
from launch.doctor import (
    Check,
    attempted,
    check_collectives,
    check_packages,
    check_python,
    check_torch,
    check_tracking,
    nvlinks,
)
from trainer.config.run import LoggerConfig

REPOSITORY = Path(__file__).parents[2]
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tNV12\tPIX\t0-47
GPU1\tNV18\t X \tNV18\tSYS\t0-47
GPU2\tNV12\tNV18\t X \tSYS\t0-47
NIC0\tPIX\tSYS\tSYS\t X
"""


def test_this_machine_passes_and_the_table_names_every_part() -> None:
    command = [sys.executable, "-m", "launch.doctor", "cluster.object_store_mib=80", "runs_dir=/tmp"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in (
        "Python",
        "packages",
        "torch",
        "GPUs",
        "disk",
        "shared memory",
        "W&B",
        "DeepSpeed",
        "operators",
        "gloo",
        "Ray",
    ):
        assert name in result.stdout, name


def test_what_fails_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = [Check("one", "ok", "here"), Check("two", "warn", "slow", "hurry")]
    monkeypatch.setattr(doctor, "examine", lambda config: iter(found))
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == 0
    found.append(Check("three", "fail", "broken", "mend it"))
    assert doctor.main() == 1
    assert "mend it" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["doctor", "train.stepz=1"])
    assert doctor.main() == 2
    assert "did you mean train.steps?" in capsys.readouterr().err


def test_versions_are_those_of_the_project() -> None:
    assert check_python({"requires-python": ">=3.99"}).state == "fail"
    check = check_packages({"dependencies": ["numpy>=99", "no-such-package-here", "rich"]})
    assert check.state == "fail" and "numpy" in check.found and "no-such-package-here is missing" in check.found
    assert "rich" not in check.found


def test_a_gpu_that_torch_does_not_see_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_torch(driver_there=False).state == "ok"
    assert check_torch(driver_there=True).state == "fail"


@pytest.mark.parametrize(("dtype", "state"), [("bfloat16", "fail"), ("float32", "warn")])
def test_bfloat16_kernels_ask_for_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch, dtype: str, state: str) -> None:
    answers: dict[str, Any] = {"device_count": 1, "get_device_name": "NVIDIA L4", "get_device_capability": (8, 9)}
    for name, answer in (answers | {"mem_get_info": (20 * 2**30, 22 * 2**30)}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    check = doctor.check_gpus(dtype)
    assert (check.state, check.fix) == (state, "train.dtype=float32") and "8.9" in check.found


@pytest.mark.parametrize(("version", "dtype", "state"), [("3.6.1", "bfloat16", "ok"), ("3.9.0", "bfloat16", "fail")])
def test_bfloat16_kernels_ask_for_one_triton(monkeypatch: pytest.MonkeyPatch, version: str, dtype: str, state: str) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version)
    assert doctor.check_triton(True, dtype).state == state
    assert doctor.check_triton(False, dtype).state == "ok"


def test_what_offload_compiles_is_looked_at_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_ninja_available", lambda: True)
    monkeypatch.setattr(doctor, "get_cxx_compiler", lambda: sys.executable)  # something that is there
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    assert doctor.check_operators().state == "ok"
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    assert "libaio-dev" in doctor.check_operators().fix
    monkeypatch.setattr(doctor, "get_cxx_compiler", lambda: "no-such-compiler")
    monkeypatch.setattr(doctor, "is_ninja_available", lambda: False)
    check = doctor.check_operators()
    assert check.state == "warn" and check.found.startswith("no-such-compiler and ninja not on the PATH")


def test_the_weakest_pair_counts() -> None:
    assert nvlinks(TOPOLOGY) == 12
    assert nvlinks(TOPOLOGY.replace("NV12", "SYS")) == 0
    assert nvlinks("") == 0


def test_the_key_is_never_shown() -> None:
    logger = LoggerConfig(wandb="online", project="p", entity=None)
    check = check_tracking(logger, {"WANDB_API_KEY": "very secret"})
    assert check.state == "ok" and "secret" not in check.found + check.fix and "is set" in check.found
    assert check_tracking(logger, {}).state == "warn"
    assert check_tracking(logger.model_copy(update={"wandb": "auto"}), {}).found.startswith("offline")


def test_a_full_or_read_only_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    assert doctor.check_disk(tmp_path / "not" / "there").found.endswith("MiB/s")
    assert list(tmp_path.iterdir()) == [], "the probe is gone"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**30))
    check = doctor.check_disk(tmp_path)
    assert check.state == "warn" and check.found.startswith("1 GiB free")
    assert doctor.check_shared_memory(tmp_path, 256).state == "warn"
    assert doctor.check_shared_memory(tmp_path / "none", 256).state == "warn"
    assert doctor.check_disk(Path("/proc")).state == "fail"


def test_what_a_library_raises_is_the_finding() -> None:
    def broken() -> Check:
        raise RuntimeError("first line\n  the reason  \n")

    assert attempted("x", "do it", broken) == Check("x", "fail", "RuntimeError: the reason", "do it")

    def mistake() -> Check:
        raise UserError("no cluster at 1.2.3.4")

    assert attempted("x", "y", mistake).found.endswith("no cluster at 1.2.3.4")


def test_two_processes_really_exchange_rows() -> None:
    check = check_collectives("cpu", 2)
    assert (check.name, check.state) == ("gloo", "ok") and check.found.startswith("2 ranks")
