"""The copies of kernels/rows.py in two Triton kernels.

Shape letters: T tokens, K top-k, N entries present of T * K, D model, P partial sums.

Bounds, with b bytes a number. Bytes: spreading reads T * D * b and writes N * D * b, combining reads N * D * b and writes
T * D * b: at T=32768, K=8, D=2048 in bfloat16 both 1.2 GB, 0.29 ms at 4.2 TB/s. Operations: none, and 2 N * D. So only bytes
in flight count. Walking over tokens, not places, reads each token once; what is written passes by the cache, which is left to
what is read again.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import begin, block_width, cdiv, early, next_power_of_2

SPREAD_NUMBERS = 4096  # of a program; 32 a thread, written K times


def launch_spread(x_TD: Tensor, place_N: Tensor, top_k: int, out_ND: Tensor) -> None:
    """kernels.rows.spread_rows."""
    tokens, hidden = x_TD.shape
    block_d = block_width(hidden)
    block_t = max(1, SPREAD_NUMBERS // block_d)
    if not tokens or not hidden:
        return
    (x_stride, x_unit), (out_stride, out_unit) = _stride(x_TD), _stride(out_ND)
    _spread_kernel[(cdiv(tokens, block_t), cdiv(hidden, block_d))](
        x_TD,
        place_N,
        out_ND,
        tokens,
        x_stride,
        out_stride,
        X_UNIT=x_unit,
        OUT_UNIT=out_unit,
        K=top_k,
        D=hidden,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        **early(x_TD.device, tokens),
    )


def launch_combine(
    y_ND: Tensor,
    place_N: Tensor,
    top_k: int,
    weights_TK: Tensor | None,
    partials_PN: Tensor | None,
    out_TD: Tensor,
    sums_TK: Tensor | None,
) -> None:
    """kernels.rows.combine_rows and combine_rows_and_partials."""
    tokens, hidden = place_N.shape[0] // top_k, y_ND.shape[1]
    assert out_TD.shape == (tokens, hidden) and out_TD.is_contiguous(), (out_TD.shape, out_TD.stride())
    if partials_PN is not None:
        partials_PN = partials_PN.contiguous()
        assert sums_TK is not None and sums_TK.shape == (tokens, top_k) and sums_TK.is_contiguous(), "sums of partials"
    if not tokens or not hidden:
        return
    block_d = block_width(hidden)
    y_stride, y_unit = _stride(y_ND)
    _combine_kernel[(tokens, cdiv(hidden, block_d))](
        y_ND,
        place_N,
        None if weights_TK is None else weights_TK.contiguous(),
        out_TD,
        partials_PN,
        sums_TK,
        y_ND.shape[0],
        0 if partials_PN is None else partials_PN.shape[0],
        y_stride,
        Y_UNIT=y_unit,
        K=top_k,
        K_PADDED=next_power_of_2(top_k),
        D=hidden,
        BLOCK_D=block_d,
        num_warps=min(4, max(1, block_d // 512)),
        **early(y_ND.device, tokens),
    )


def _stride(rows: Tensor) -> tuple[int, int]:
    """The stride of rows as (units, numbers a unit): what a constant unit divides is what the compiler knows to be aligned."""
    unit = math.gcd(rows.stride(0), 8)
    return rows.stride(0) // unit, unit


@triton.jit(do_not_specialize=["tokens", "x_stride", "out_stride"])
def _spread_kernel(  # type: ignore[no-untyped-def]
    x,
    place,
    out,
    tokens,
    x_stride,
    out_stride,
    X_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = token < tokens
    mask = inside[:, None] & (column < D)
    row = tl.load(x + (token * x_stride * X_UNIT)[:, None] + column, mask=mask, other=0.0)
    for k in tl.static_range(K):
        at = tl.load(place + token * K + k, mask=inside, other=-1).to(tl.int64)
        present = (at >= 0)[:, None] & (column < D)
        tl.store(out + (at * out_stride * OUT_UNIT)[:, None] + column, row, mask=present, cache_modifier=".cs")


@triton.jit(do_not_specialize=["num_entries", "num_partials", "y_stride"])
def _combine_kernel(  # type: ignore[no-untyped-def]
    y,
    place,
    weights,
    out,
    partials,
    sums,
    num_entries,
    num_partials,
    y_stride,
    Y_UNIT: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        at = tl.load(place + token * K + k).to(tl.int64)
        row = tl.load(y + at * y_stride * Y_UNIT + column, mask=(at >= 0) & (column < D), other=0.0).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + token * K + k, mask=at >= 0, other=0.0)
        total += row
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D, cache_modifier=".cs")
    if partials is not None and tl.program_id(1) == 0:
        choice = tl.arange(0, K_PADDED)
        ats = tl.load(place + token * K + choice, mask=choice < K, other=-1).to(tl.int64)
        sum_K = tl.zeros([K_PADDED], tl.float32)
        for p in range(num_partials):
            sum_K += tl.load(partials + tl.cast(p, tl.int64) * num_entries + ats, mask=ats >= 0, other=0.0)
        tl.store(sums + token * K + choice, sum_K, mask=choice < K)
