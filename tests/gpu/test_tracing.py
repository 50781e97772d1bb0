"""On a GPU a trace shows kernels, and a memory snapshot is there when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rl.engine.actor import EngineActor
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.trajectory import Sample
from tests.gpu.needs import gpus, hopper
from tests.models import tiny_model
from trainer.model.transformer import LanguageModel
from trainer.tracing import Traced, TraceRequest, Tracing

pytestmark = [pytest.mark.gpu, gpus(1)]


def test_kernels_and_memory_are_traced(tmp_path: Path) -> None:
    tracing = Tracing(torch.device("cuda", 0), memory=True)
    matrix = torch.randn(512, 512, device="cuda")
    (matrix @ matrix).sum().item()
    written = tracing.end(tmp_path, "rank_0")
    assert isinstance(written, Traced)
    events = json.loads(written.events.read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert written.memory and (tmp_path / "rank_0.memory.pickle").stat().st_size > 0


@hopper()
def test_an_engine_traces_its_first_tokens_with_kernels_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.engine.actor.log_to", lambda file: file.open("a"))  # the test keeps its own output
    config = tiny_model(hidden_size=64, expert_hidden_size=32, max_positions=64, vocab_size=20)
    settings = EngineSettings(4, 40, 30, None, Sampling(1.0, 0), 1)
    actor = EngineActor(config, settings, "bfloat16", tmp_path / "engine_0.log", 60)
    model = LanguageModel.initialize(config, seed=0, batch_invariant=True)
    actor._engine.load_weights(model.state(), 0)
    actor.submit([Sample(uid, uid, (2, 3)) for uid in range(4)])
    actor.start_trace(TraceRequest(steps=1, ranks="all", engines=(0,), tokens=4, memory=True))
    for _ in range(4):
        actor.advance(2)
    written = actor.end_trace(tmp_path)
    assert isinstance(written, Traced) and written.memory and (tmp_path / "engine_0.memory.pickle").stat().st_size > 0
    events = json.loads(written.events.read_text())["traceEvents"]
    assert sum(event["name"] == "generate 2 tokens a row" and event.get("cat") == "user_annotation" for event in events) == 2
    assert any(event.get("cat") == "kernel" for event in events)
