"""kernels/accumulate.py in one Triton kernel.

Bounds: 10 bytes a number for a part in bfloat16, and one addition; the 302 million numbers of 64 experts of Qwen3-30B-A3B take
0.72 ms at 4.2 TB/s. torch adds different dtypes in accesses of two and four bytes, and takes 1.09 ms.
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


@triton.jit
def _add_kernel(total, part, numbers, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    added = tl.load(part + at, mask=inside, other=0.0)
    before = tl.load(total + at, mask=inside, other=0.0)
    tl.store(total + at, before + added.to(before.dtype), mask=inside)
