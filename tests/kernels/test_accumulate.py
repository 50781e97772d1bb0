"""Sums in float32 of parts in another dtype."""

from __future__ import annotations

import pytest
import torch

from kernels.accumulate import accumulate


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4096), (2, 4097), (0, 8)])
def test_the_kernel_equals_the_reference(kernel_device: str, shape: tuple[int, ...]) -> None:
    from kernels.triton_accumulate import launch_accumulate

    generator = torch.Generator().manual_seed(0)
    total, part = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    found = total.to(kernel_device)
    launch_accumulate(found, part.to(kernel_device))
    accumulate(total, part)
    assert torch.equal(found.cpu(), total)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_are_widened_before_they_are_added(dtype: torch.dtype) -> None:
    total, part = torch.randn(9, 1000, device="cuda"), torch.randn(9, 1000, device="cuda").to(dtype)
    wanted = total.cpu() + part.cpu().float()
    accumulate(total, part)
    assert torch.equal(total.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_2_to_the_31_numbers() -> None:
    free, _ = torch.cuda.mem_get_info()
    count = 2**31 + 5000
    if free < 7 * count:
        pytest.skip(f"needs {7 * count / 2**30:.0f} GiB")
    total = torch.zeros(count, device="cuda")
    accumulate(total, torch.ones(count, dtype=torch.bfloat16, device="cuda"))
    assert total.min() == total.max() == 1
