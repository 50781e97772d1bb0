"""On a GPU a trace shows kernels, and a memory snapshot is there when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trainer.tracing import Tracing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device")]


def test_kernels_and_memory_are_traced(tmp_path: Path) -> None:
    tracing = Tracing(torch.device("cuda", 0), memory=True)
    matrix = torch.randn(512, 512, device="cuda")
    (matrix @ matrix).sum().item()
    written = tracing.end(tmp_path, rank=0, node=0)
    events = json.loads(written.events.read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert written.memory and (tmp_path / "rank_0.memory.pickle").stat().st_size > 0
