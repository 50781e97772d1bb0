"""The batch-invariant product of kernels/linear.py in one Triton kernel.

Bounds, in bfloat16: 2 M N K operations at 765 TF/s, and (M K + N K + M N) * 2 bytes at 4.2 TB/s. With few rows only the bytes
of the weight count, and many small tiles keep them in flight; with many rows the operations count. A row adds up in the same
order in both, the tensor cores' 16 products at a time from the first on: K is never split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_ROWS = 256


def launch_linear(x_MK: Tensor, weight_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """kernels.linear.linear for operands on a GPU."""
    (rows, depth), outputs = x_MK.shape, weight_NK.shape[0]
    assert x_MK.dtype == weight_NK.dtype, (x_MK.dtype, weight_NK.dtype)
    out_MN = torch.empty(rows, outputs, dtype=dtype, device=x_MK.device)
    if not rows or not outputs:
        return out_MN
    # 64 rows at least, so that the same instruction of the tensor cores is taken for any number of rows.
    block_m, block_n, block_k, warps, stages = (64, 32, 128, 4, 4) if rows <= FEW_ROWS else (128, 128, 64, 8, 3)
    if x_MK.dtype == torch.float32:
        block_m, block_n, block_k, warps, stages = 64, 32, 64, 4, 2
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n),)
    _linear_kernel[grid](
        x_MK,
        weight_NK,
        out_MN,
        rows,
        outputs,
        depth,
        *x_MK.stride(),
        *weight_NK.stride(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=8,
        num_warps=warps,
        num_stages=stages,
    )
    return out_MN


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    rows,
    outputs,
    depth,
    x_row,
    x_unit,
    weight_row,
    weight_unit,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # GROUP tiles of rows before the next columns: what programs that run together read stays in the cache.
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + m[:, None] * x_row + k[None, :] * x_unit
    weight_at = weight + n[None, :] * weight_row + k[:, None] * weight_unit
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = depth - start
        x_MK = tl.load(x_at, mask=(m[:, None] < rows) & (k[None, :] < left), other=0.0)
        weight_KN = tl.load(weight_at, mask=(n[None, :] < outputs) & (k[:, None] < left), other=0.0)
        total = tl.dot(x_MK, weight_KN, total, input_precision="ieee")
        x_at += BLOCK_K * x_unit
        weight_at += BLOCK_K * weight_unit
    out_at = out + m[:, None] * outputs + n[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < outputs))
