"""The batch-invariant product of kernels/linear.py in one Triton kernel.

Bounds, in bfloat16: 2 M N K operations at 765 TF/s, and (M K + N K + M N) * 2 bytes at 4.2 TB/s. With few rows only the bytes
of the weight count, and many small tiles keep them in flight; with many rows the operations count. A row adds up in the same
order in both, the tensor cores' 16 products at a time from the first on: K is never split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import begin, cdiv, early

FEW_ROWS = 256
MANY_OUTPUTS = 16384  # as of a vocabulary: wide tiles are enough of them to keep every multiprocessor busy
MOST_WEIGHTS = 3


def launch_linears(x_MK: Tensor, weights_NK: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """kernels.linear.linears for operands on a GPU, in one launch."""
    rows, depth = x_MK.shape
    assert 1 <= len(weights_NK) <= MOST_WEIGHTS and all(weight.dtype == x_MK.dtype for weight in weights_NK)
    results = tuple(torch.empty(rows, weight.shape[0], dtype=dtype, device=x_MK.device) for weight in weights_NK)
    if not rows:
        return results
    sizes = [weight.shape[0] for weight in weights_NK]
    block_m, block_n, block_k, warps, stages = _tile_for(rows, sum(sizes), x_MK.dtype)
    absent = MOST_WEIGHTS - len(weights_NK)
    weights = [*weights_NK, *[weights_NK[0]] * absent]
    tiles = sum(cdiv(size, block_n) for size in sizes)
    _linears_kernel[(cdiv(rows, block_m) * tiles,)](
        x_MK,
        *weights,
        *results,
        *[results[0]] * absent,
        rows,
        *sizes,
        *[0] * absent,
        depth,
        *x_MK.stride(),
        *(stride for weight in weights for stride in weight.stride()),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=8,
        num_warps=warps,
        num_stages=stages,
        **early(x_MK.device, rows),
    )
    return results


def _tile_for(rows: int, outputs: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(rows, columns, depth, warps, stages). 64 rows at least, so that any number of rows takes the same kind of instruction of
    the tensor cores."""
    if dtype == torch.float32:
        return 64, 32, 64, 4, 2
    if rows <= FEW_ROWS and outputs < MANY_OUTPUTS:
        return 64, 32, 128, 8, 4
    return (64, 128, 64, 8, 4) if rows <= 64 else (128, 128, 64, 8, 3)


@triton.jit(do_not_specialize=["rows"])
def _linears_kernel(  # type: ignore[no-untyped-def]
    x,
    weight_0,
    weight_1,
    weight_2,
    out_0,
    out_1,
    out_2,
    rows,
    outputs_0,
    outputs_1,
    outputs_2,
    depth,
    x_row,
    x_unit,
    row_0,
    unit_0,
    row_1,
    unit_1,
    row_2,
    unit_2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    # GROUP tiles of rows before the next columns: what programs that run together read stays in the cache.
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_0, tiles_1 = tl.cdiv(outputs_0, BLOCK_N), tl.cdiv(outputs_1, BLOCK_N)
    tiles_n = tiles_0 + tiles_1 + tl.cdiv(outputs_2, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    if tile_n < tiles_0:
        _tile(
            x,
            weight_0,
            out_0,
            tile_m,
            tile_n,
            rows,
            outputs_0,
            depth,
            x_row,
            x_unit,
            row_0,
            unit_0,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EARLY,
        )
    elif tile_n < tiles_0 + tiles_1:
        tile_n -= tiles_0
        _tile(
            x,
            weight_1,
            out_1,
            tile_m,
            tile_n,
            rows,
            outputs_1,
            depth,
            x_row,
            x_unit,
            row_1,
            unit_1,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EARLY,
        )
    else:
        tile_n -= tiles_0 + tiles_1
        _tile(
            x,
            weight_2,
            out_2,
            tile_m,
            tile_n,
            rows,
            outputs_2,
            depth,
            x_row,
            x_unit,
            row_2,
            unit_2,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EARLY,
        )


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    tile_m,
    tile_n,
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
    EARLY: tl.constexpr,
):
    begin(EARLY)
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
