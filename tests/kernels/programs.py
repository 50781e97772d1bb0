"""Programs of their own beside the tests, because Triton takes its driver and its mode from the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def said_by(module: str) -> str:
    """What `python -m module` prints, without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-m", module], capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment
    )
    assert said.returncode == 0, said.stderr[-4000:]
    return said.stdout
