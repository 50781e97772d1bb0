"""The Hopper kernels compile for their chip where there is none, and the assembler has nothing to complain about."""

from __future__ import annotations

import importlib
import json

import pytest
import triton

import kernels.hopper
from kernels.errors import UserError
from tests.kernels.programs import said_by

LEAST_LAUNCHES = 28
MOST_SPILLED = 16  # bytes a thread; a register or two does not show


def test_every_launch_compiles_without_spills_or_serialized_products() -> None:
    launches = [json.loads(line) for line in said_by("tests.kernels.compile_for_hopper").splitlines()]
    assert len(launches) >= LEAST_LAUNCHES
    for launch in launches:
        # Serialized products cost a tenth of the speed: the assembler does so when it cannot tell that a loop over steps runs.
        assert launch["serialized"] == 0, launch
        assert launch["spilled"] <= MOST_SPILLED, launch


def test_another_triton_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    with pytest.raises(UserError, match=r"Triton 3\.6.*this is Triton 3\.9\.0; install torch 2\.11"):
        importlib.reload(kernels.hopper)
