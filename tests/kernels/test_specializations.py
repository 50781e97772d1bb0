"""Tokens and experts of a rank differ from layer to layer and from step to step, and no kernel is compiled for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_kernels_of_a_layer_are_compiled_once_for_all_numbers_of_tokens_and_experts() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-m", "tests.kernels.specializations"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert said.returncode == 0, said.stderr[-4000:]
    told = json.loads(said.stdout)
    assert told["more"] == {}
    assert {"hopper.rows.kernel", "hopper.columns.kernel", "triton_expert_order._order_kernel"} <= told["first"].keys()
