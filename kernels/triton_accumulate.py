"""kernels/accumulate.py in Triton kernels.

Bounds of `accumulate`: 10 bytes a number for a part in bfloat16, and one addition; the 302 million numbers of 64 experts of
Qwen3-30B-A3B take 0.72 ms at 4.2 TB/s. torch adds different dtypes in accesses of two and four bytes, and takes 1.09 ms.

Bounds of `add_rows`: 2 W + 2 bytes a number in bfloat16, each row read and the result written once, and W additions. With two
rows that is 6, where torch's operations, which widen, add, divide and round one after the other, move 30.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import cdiv

BLOCK = 4096


def launch_accumulate(total: Tensor, part: Tensor) -> None:
    """kernels.accumulate.accumulate."""
    if total.numel():
        _add_kernel[(cdiv(total.numel(), BLOCK),)](total, part, total.numel(), BLOCK=BLOCK, num_warps=8)


def launch_add_rows(rows_WN: Tensor, divisor: int, out_N: Tensor) -> None:
    """kernels.accumulate.add_rows."""
    ranks, numbers = rows_WN.shape
    if numbers:
        grid = (cdiv(numbers, BLOCK),)
        _add_rows_kernel[grid](rows_WN, out_N, numbers, float(divisor), RANKS=ranks, BLOCK=BLOCK, num_warps=8)


@triton.jit
def _add_kernel(total, part, numbers, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    added = tl.load(part + at, mask=inside, other=0.0)
    before = tl.load(total + at, mask=inside, other=0.0)
    tl.store(total + at, before + added.to(before.dtype), mask=inside)


@triton.jit
def _add_rows_kernel(rows, out, numbers, divisor, RANKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    row = rows + at
    total = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    for _ in range(1, RANKS):
        row += numbers
        total += tl.load(row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, tl.div_rn(total, tl.full([BLOCK], divisor, tl.float32)).to(out.dtype.element_ty), mask=inside)
