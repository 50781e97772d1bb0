"""Gradients on their way from a GPU to the host: the bits of the GPU, whatever happens to their memory, and no waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel import offload
from parallel.adamw import AdamWSettings
from parallel.expert_optimizer import ExpertOptimizer
from parallel.expert_states import ExpertState
from parallel.offload import HostGradients, expert_optimizer
from tests.gpu.needs import gpus

pytestmark = [pytest.mark.gpu, pytest.mark.cpu_adam, gpus(1)]
PARTS = ((1024, 512), (512, 512))
SHAPES = tuple((6, *part) for part in PARTS)
LAYERS = [(3, 6), (1, 3), (0, 1)]  # rows of each layer, as backward comes by
SETTINGS = AdamWSettings(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip_norm=1.0)


def drawn(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(rows, *shape[1:], device="cuda", dtype=dtype) * 0.02 for shape in SHAPES)


def begun(offload: str, folder: Path, masters: tuple[Tensor, ...]) -> ExpertOptimizer:
    optimizer = expert_optimizer(offload, folder, 6, PARTS, SETTINGS, torch.device("cuda", 0))

    def begin(row: int, state: ExpertState) -> None:
        for found, master in zip(state.masters, masters, strict=True):
            found.copy_(master[row])

    optimizer.states.change(range(6), begin)
    return optimizer


@pytest.mark.parametrize("kind", ["cpu", pytest.param("nvme", marks=pytest.mark.aio)])
@pytest.mark.parametrize("room", [0, 2**22, offload.UNDER_WAY_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_weights_are_those_of_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype, room: int, kind: str
) -> None:
    monkeypatch.setattr(offload, "UNDER_WAY_BYTES", room)
    masters = drawn(6, torch.float32)
    device, host = begun("none", tmp_path, masters), begun(kind, tmp_path, masters)
    weights = tuple(torch.empty(8, *shape[1:], device="cuda", dtype=dtype) for shape in SHAPES)
    for _ in range(3):
        for _ in range(3):
            for first, last in LAYERS:
                calls = [(first, drawn(last - first, dtype)), (first, drawn(1, dtype))]  # own ones, then those of a copy
                for row, parts in calls:
                    device.add_gradients(row, parts)
                    host.add_gradients(row, parts)
                del calls, parts
                for part in drawn(last - first, dtype) + drawn(1, dtype):  # backward goes on, in memory that is free now
                    part.fill_(torch.nan)
        found, wanted = host.gradients(), device.gradients()
        assert found is not None and wanted is not None
        for here, there in zip(found, wanted, strict=True):
            assert here.is_pinned() and torch.equal(here, there.cpu())
        assert torch.equal(host.squared_norms(), device.squared_norms())
        device.step(1e-3, 0.5, tuple(torch.empty_like(part) for part in weights))
        host.step(1e-3, 0.5, weights)
        pairs = zip(host.states.read(range(6)), device.states.read(range(6)), strict=True)
        for row, (found_state, wanted_state) in enumerate(pairs):
            for rows, here, there in zip(weights, found_state.masters, wanted_state.masters, strict=True):
                torch.testing.assert_close(here, there.cpu(), rtol=1e-6, atol=1e-7)
                assert torch.equal(rows[row].cpu(), here.to(dtype))


def test_gradients_cross_while_the_device_computes() -> None:
    host = HostGradients(6, PARTS, torch.device("cuda", 0))
    parts = drawn(6, torch.bfloat16)
    for _ in range(2):  # kernels are loaded at their first call, which waits for the device
        host.add(0, parts)
        host.arrived()
    computed = torch.cuda.Event()
    host.add(0, parts)
    torch.cuda._sleep(2 * 10**9)  # cycles: about a second
    computed.record()
    host.arrived()
    assert not computed.query(), "the copies waited for what backward computes after them"


def test_the_host_does_not_wait_for_the_device() -> None:
    host = HostGradients(6, PARTS, torch.device("cuda", 0))
    parts = drawn(6, torch.bfloat16)
    for _ in range(2):
        host.add(0, parts)
        host.arrived()
    torch.cuda._sleep(2 * 10**9)
    computed = torch.cuda.Event()
    computed.record()
    host.add(0, parts)
    assert not computed.query(), "the host waited for what backward had computed before"
    host.arrived()
