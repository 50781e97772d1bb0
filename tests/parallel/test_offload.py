"""The optimizer on the host equals torch's on the device; its gradients are the same bit for bit. On disk it has the bits of
memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.adamw import AdamWSettings
from parallel.expert_optimizer import ExpertOptimizer
from parallel.expert_states import ExpertState
from parallel.offload import expert_optimizer

pytestmark = pytest.mark.cpu_adam

CPU = torch.device("cpu")
ROWS = 3
PARTS = ((37, 53), (29, 37))  # not multiples of what a vector unit takes at once
SHAPES = tuple((ROWS, *part) for part in PARTS)
STEPS = 20
SCALE = 0.7
Parts = tuple[Tensor, ...]


def settings(beta2: float = 0.95) -> AdamWSettings:
    return AdamWSettings(betas=(0.9, beta2), eps=1e-8, weight_decay=0.1, clip_norm=1.0)


def drawn(seed: int) -> Parts:
    """Of the size of weights."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) * 0.02 for shape in SHAPES)


def gradients(seed: int) -> Parts:
    """Over many orders of magnitude, down to where eps counts."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(
        torch.randn(shape, generator=generator) * 10 ** (2 * torch.randn(shape, generator=generator) - 4) for shape in SHAPES
    )


def lr(step: int) -> float:
    return 1e-3 * (step + 1) / STEPS


def on_device(told: AdamWSettings) -> ExpertOptimizer:
    return begun(expert_optimizer("none", None, ROWS, PARTS, told, CPU))


def on_host(told: AdamWSettings) -> ExpertOptimizer:
    return begun(expert_optimizer("cpu", None, ROWS, PARTS, told, CPU))


def on_disk(told: AdamWSettings) -> ExpertOptimizer:
    return begun(expert_optimizer("nvme", Path(tempfile.gettempdir()), ROWS, PARTS, told, CPU))


def begun(optimizer: ExpertOptimizer) -> ExpertOptimizer:
    masters = drawn(0)

    def begin(row: int, state: ExpertState) -> None:
        for found, master in zip(state.masters, masters, strict=True):
            found.copy_(master[row])

    optimizer.states.change(range(ROWS), begin)
    return optimizer


def copied(optimizer: ExpertOptimizer) -> list[list[Tensor]]:
    """Masters, then moments, of each row."""
    return [[tensor.clone() for tensor in state.tensors()] for state in optimizer.states.read(range(ROWS))]


def masters(optimizer: ExpertOptimizer) -> Parts:
    return tuple(torch.stack([row[part] for row in copied(optimizer)]) for part in range(len(PARTS)))


def stepped(optimizer: ExpertOptimizer, first: int, last: int, dtype: torch.dtype = torch.float32) -> Parts:
    weights = tuple(torch.zeros(shape[0] + 2, *shape[1:], dtype=dtype) for shape in SHAPES)  # room for copies behind
    for step in range(first, last):
        optimizer.add_gradients(0, gradients(step))
        optimizer.step(lr(step), SCALE, weights)
    return weights


def exact(told: AdamWSettings) -> list[Tensor]:
    """AdamW (Loshchilov and Hutter, algorithm 2) in float64."""
    masters = [part.double() for part in drawn(0)]
    first, second = [torch.zeros_like(part) for part in masters], [torch.zeros_like(part) for part in masters]
    beta1, beta2 = told.betas
    for step in range(STEPS):
        for part, m, v, gradient in zip(masters, first, second, gradients(step), strict=True):
            m.lerp_(gradient.double() * SCALE, 1 - beta1)
            v.lerp_((gradient.double() * SCALE).square(), 1 - beta2)
            update = m / (1 - beta1 ** (step + 1)) / ((v / (1 - beta2 ** (step + 1))).sqrt() + told.eps)
            part.sub_(lr(step) * (update + told.weight_decay * part))
    return masters


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_twenty_updates_equal_those_of_torch_and_of_float64(beta2: float) -> None:
    told = settings(beta2)
    device, host = on_device(told), on_host(told)
    stepped(device, 0, STEPS)
    stepped(host, 0, STEPS)
    for found, wanted, true, start in zip(masters(host), masters(device), exact(told), drawn(0), strict=True):
        moved = (true - start).abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5 * moved)
        torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=1e-5 * moved)
    for found_row, wanted_row in zip(copied(host), copied(device), strict=True):
        for found, wanted in zip(found_row[len(PARTS) :], wanted_row[len(PARTS) :], strict=True):
            # 1 - beta2 is rounded before or after the subtraction: 1e-8 / 1e-3
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-6 * wanted.abs().max().item())


def equal(found: list[list[Tensor]], wanted: list[list[Tensor]]) -> bool:
    pairs = zip([t for row in found for t in row], [t for row in wanted for t in row], strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("kind", [on_device, on_host, pytest.param(on_disk, marks=pytest.mark.aio)])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_an_optimizer_that_takes_over_goes_on_bit_for_bit(
    kind: Callable[[AdamWSettings], ExpertOptimizer], beta2: float
) -> None:
    whole, early, late = kind(settings(beta2)), kind(settings(beta2)), kind(settings(beta2))
    stepped(whole, 0, STEPS)
    stepped(early, 0, 13)
    states = copied(early)

    def take(row: int, state: ExpertState) -> None:
        for found, wanted in zip(state.tensors(), states[row], strict=True):
            found.copy_(wanted)

    late.states.change(range(ROWS), take)
    late.set_step_count(13)
    stepped(late, 13, STEPS)
    assert equal(copied(late), copied(whole))


@pytest.mark.aio
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_disk_masters_moments_and_weights_have_the_bits_of_memory(dtype: torch.dtype) -> None:
    host, disk = on_host(settings()), on_disk(settings())
    for first, last in ((0, 4), (4, STEPS)):
        wanted, found = (stepped(optimizer, first, last, dtype) for optimizer in (host, disk))
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        assert equal(copied(disk), copied(host))
        for optimizer in (host, disk):
            optimizer.states.reorder([2, 0, 1])
        assert equal(copied(disk), copied(host))


@pytest.mark.parametrize("kind", [on_host, pytest.param(on_disk, marks=pytest.mark.aio)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_rounded_masters_and_copies_behind_them_stay(
    kind: Callable[[AdamWSettings], ExpertOptimizer], dtype: torch.dtype
) -> None:
    host = kind(settings())
    weights = stepped(host, 0, 2, dtype)
    for rows, master in zip(weights, masters(host), strict=True):
        assert torch.equal(rows[:3], master.to(dtype)) and not rows[3:].any()
    again = tuple(torch.zeros_like(rows) for rows in weights)
    host.round_masters(again)
    assert all(torch.equal(*pair) for pair in zip(again, weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contributions_add_up_as_on_the_device(dtype: torch.dtype) -> None:
    """Layers of two, none and one experts; then what copies return, expert by expert; then another micro-batch and step."""
    device, host = on_device(settings()), on_host(settings())
    for step in range(2):
        assert host.gradients() is None and device.gradients() is None
        for micro in range(2):
            parts = tuple(part.to(dtype) for part in gradients(10 * step + micro))
            calls = [(2, slice(2, 3)), (9, slice(0, 0)), (0, slice(0, 2)), (1, slice(0, 1)), (2, slice(0, 1))]
            for row, rows in calls:
                device.add_gradients(row, tuple(part[rows] for part in parts))
                host.add_gradients(row, tuple(part[rows] for part in parts))
        found, wanted = host.gradients(), device.gradients()
        assert found is not None and wanted is not None
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        assert host.squared_norms().tolist() == pytest.approx(device.squared_norms().tolist(), rel=1e-12)
        for optimizer in (device, host):
            optimizer.step(1e-3, SCALE, drawn(0))


def test_without_a_compiler_there_is_a_way_out(tmp_path: Path) -> None:
    program = (
        "import torch; from kernels.errors import UserError; from tests.parallel.test_offload import on_host, settings\n"
        "try: on_host(settings())\n"
        "except UserError as error: print('told:', error)"
    )
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert "told: parallel.offload=cpu and nvme need" in done.stdout, done.stdout + done.stderr
    assert "cannot be compiled here: Error building extension 'cpu_adam'. Install" in done.stdout
    assert "Install g++ and put it and ninja on the PATH, or set parallel.offload=none" in done.stdout
