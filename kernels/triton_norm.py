"""The normalisation and rotation of kernels/norm.py, each in one Triton kernel.

Bounds: bytes only, each number is read and written once. While decoding the launch is what counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import begin, early

NUMBERS = 4096  # of a program


def launch_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """kernels.norm.rms_norm."""
    size = x.shape[-1]
    rows_RD = x.reshape(-1, size)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    rows = max(1, min(8, NUMBERS // block))  # of a program: rows may be as short as a head
    if y.numel():
        _rms_norm_kernel[(triton.cdiv(rows_RD.shape[0], rows),)](
            rows_RD,
            weight_D,
            y,
            rows_RD.shape[0],
            rows_RD.stride(0),
            rows_RD.stride(1),
            eps,
            D=size,
            ROWS=rows,
            BLOCK_D=block,
            **early(x.device),
        )
    return y


def launch_rotate(x_THd: Tensor, cosines_Td: Tensor, sines_Td: Tensor) -> Tensor:
    """kernels.norm.rotate."""
    tokens, heads, size = x_THd.shape
    y_THd = torch.empty(x_THd.shape, dtype=x_THd.dtype, device=x_THd.device)
    if y_THd.numel():
        _rotate_kernel[(tokens,)](
            x_THd,
            cosines_Td.contiguous(),
            sines_Td.contiguous(),
            y_THd,
            *x_THd.stride(),
            H=heads,
            D=size,
            BLOCK_H=triton.next_power_of_2(heads),
            BLOCK_D=triton.next_power_of_2(size // 2),
            **early(x_THd.device),
        )
    return y_THd


@triton.jit(do_not_specialize=["count"])
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    y,
    count,
    row_stride,
    unit_stride,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    there = (row < count)[:, None] & (d < D)[None, :]
    x_RD = tl.load(x + row[:, None] * row_stride + d[None, :] * unit_stride, mask=there, other=0.0).to(tl.float32)
    scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / D + eps)
    weight_D = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    y_RD = x_RD * scale_R[:, None] * weight_D[None, :]
    tl.store(y + row[:, None] * D + d[None, :], y_RD.to(y.dtype.element_ty), mask=there)


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x,
    cosines,
    sines,
    y,
    token_stride,
    head_stride,
    unit_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    half: tl.constexpr = D // 2
    there = (head < H)[:, None] & (d < half)[None, :]
    x_at = x + token * token_stride + head[:, None] * head_stride + d[None, :] * unit_stride
    first = tl.load(x_at, mask=there, other=0.0).to(tl.float32)
    second = tl.load(x_at + half * unit_stride, mask=there, other=0.0).to(tl.float32)
    angle = token * D + d
    cos_first, cos_second = (
        tl.load(cosines + angle, mask=d < half, other=0.0),
        tl.load(cosines + angle + half, mask=d < half, other=0.0),
    )
    sin_first, sin_second = (
        tl.load(sines + angle, mask=d < half, other=0.0),
        tl.load(sines + angle + half, mask=d < half, other=0.0),
    )
    y_at = y + (token * H + head[:, None]) * D + d[None, :]
    turned_first = first * cos_first[None, :] - second * sin_first[None, :]
    turned_second = second * cos_second[None, :] + first * sin_second[None, :]
    tl.store(y_at, turned_first.to(y.dtype.element_ty), mask=there)
    tl.store(y_at + half, turned_second.to(y.dtype.element_ty), mask=there)
