"""The same updates on GPUs: NCCL ranks equal the plain loop on a CPU in float32, and bfloat16 stays near it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.test_trainer import load_and_go_on, plain_loop, require_equal, save_and_go_on, train, whole
from tests.models import spec, tiny_model

GPUS = torch.cuda.device_count()
SMALLEST = tiny_model(hidden_size=64, expert_hidden_size=32)  # that the kernels take in bfloat16
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]
sizes = pytest.mark.parametrize(
    "size", [1, pytest.param(2, marks=pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices"))]
)


@sizes
def test_float32_updates_on_gpus_equal_the_plain_loop_on_a_cpu(size: int) -> None:
    told = spec(tiny_model(), micro_rows=2)
    expected_history, expected = plain_loop(told)
    results = run_ranks(train, size, told, kind="cuda")
    for step, wanted in enumerate(expected_history):
        assert results[0][0][step]["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)
        assert results[0][0][step]["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-4)
    found = whole([state for _, state in results])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].cpu(), tensor, rtol=1e-3, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}")


@sizes
def test_bfloat16_updates_on_gpus_stay_near_float32(size: int) -> None:
    expected_history, _ = plain_loop(spec(SMALLEST, micro_rows=4))
    results = run_ranks(train, size, spec(SMALLEST, micro_rows=4, dtype="bfloat16"), kind="cuda")
    for step, wanted in enumerate(expected_history):
        assert results[0][0][step]["train/loss"] == pytest.approx(wanted["train/loss"], rel=3e-2)
        assert results[0][0][step]["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=0.15)


@sizes
def test_a_checkpoint_of_gpus_loads_bit_for_bit_on_gpus_and_on_cpus(size: int, tmp_path: Path) -> None:
    told = spec(SMALLEST, micro_rows=2, dtype="bfloat16")
    written = whole([state for state, _ in run_ranks(save_and_go_on, size, told, str(tmp_path), kind="cuda")])
    for kind, ranks in (("cuda", size), ("cpu", 2)):
        loaded = whole([state for state, _ in run_ranks(load_and_go_on, ranks, told, str(tmp_path), kind=kind)])
        require_equal(loaded, written, same_ranks=ranks == size)
