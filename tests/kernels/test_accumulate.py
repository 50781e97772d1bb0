"""Sums in float32 of parts in another dtype."""

from __future__ import annotations

import pytest
import torch

from kernels.accumulate import accumulate, add_rows


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4096), (2, 4097), (0, 8)])
def test_the_kernel_equals_the_reference(kernel_device: str, shape: tuple[int, ...]) -> None:
    from kernels.triton_accumulate import launch_accumulate

    generator = torch.Generator().manual_seed(0)
    total, part = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    found = total.to(kernel_device)
    launch_accumulate(found, part.to(kernel_device))
    accumulate(total, part)
    assert torch.equal(found.cpu(), total)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("numbers", [0, 1, 4095, 9000])
def test_rows_are_added_in_their_order(kernel_device: str, ranks: int, numbers: int) -> None:
    from kernels.triton_accumulate import launch_add_rows

    rows_WN = 10 ** torch.linspace(8, -8, ranks).view(-1, 1) * torch.randn(ranks, numbers)
    wanted = rows_WN[0].clone()
    for row_N in rows_WN[1:]:
        wanted = wanted + row_N
    found, out_N = torch.empty(numbers, device=kernel_device), torch.empty(numbers)
    launch_add_rows(rows_WN.to(kernel_device), 3, found)
    add_rows(rows_WN, 3, out_N)
    assert torch.equal(out_N, wanted / 3) and torch.equal(found.cpu(), out_N)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_on_a_gpu_are_those_on_a_cpu(dtype: torch.dtype) -> None:
    rows_WN = torch.randn(5, 100_003).to(dtype)
    found, wanted = torch.empty(100_003, dtype=dtype, device="cuda"), torch.empty(100_003, dtype=dtype)
    add_rows(rows_WN.cuda(), 5, found)
    add_rows(rows_WN, 5, wanted)
    assert torch.equal(found.cpu(), wanted)


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
