"""Sums of squares in float64, without a copy in it."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.squares import squares

SHAPES = [(3, 5, 7), (2, 300, 311), (1, 32768), (2, 32769), (4, 1), (0, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_exact(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    wanted = [math.fsum(value * value for value in one.flatten().tolist()) for one in gradient]
    found = squares(gradient)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])  # whose squares float32 has no room for
def test_the_kernel_equals_the_reference(kernel_device: str, shape: tuple[int, ...], scale: float) -> None:
    from kernels.triton_squares import launch_squares

    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    found = launch_squares(gradient.to(kernel_device)).cpu()
    torch.testing.assert_close(found, squares(gradient), rtol=1e-13, atol=0)


def test_bits_depend_on_the_expert_alone(kernel_device: str) -> None:
    from kernels.triton_squares import launch_squares

    gradient = torch.randn(5, 70, 1000, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    for call in (launch_squares, squares):
        whole = call(gradient)
        for expert in range(5):
            assert torch.equal(call(gradient[expert : expert + 1]), whole[expert : expert + 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(kernel_device: str, bad: float) -> None:
    from kernels.triton_squares import launch_squares

    gradient = torch.ones(3, 400, 100)
    gradient[1, 399, 99] = bad
    for found in (launch_squares(gradient.to(kernel_device)).cpu(), squares(gradient)):
        assert torch.isfinite(found).tolist() == [True, False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_copy_is_made_and_more_than_2_to_the_31_numbers_are_added() -> None:
    experts, numbers = 3, 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < 4.1 * experts * numbers:
        pytest.skip(f"needs {4.1 * experts:.0f} GiB")
    gradient = torch.ones(experts, numbers, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert squares(gradient).tolist() == [numbers] * experts
    assert torch.cuda.max_memory_allocated() - before < 2**20
