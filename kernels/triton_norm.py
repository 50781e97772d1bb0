"""The normalisation and rotation of kernels/norm.py, each in one Triton kernel.

Bounds: bytes only, each number is read and written once. While decoding the launch is what counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import begin, cdiv, early, next_power_of_2

NUMBERS = 1024  # of a program, so that a few rows keep many programs busy
BACKWARD_NUMBERS = 4096  # of a step there, so that a program, which takes one after the other, has enough under way
BACKWARD_PROGRAMS = 512  # at most; each has a sum of its own for the weight's gradient


def launch_rms_norm(x: Tensor, update: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x, or x + update, and its norm): kernels.norm.rms_norm and add_rms_norm."""
    rows_RD, size = _rows(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if update is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    updates_RD = rows_RD if update is None else _rows(update)
    block, rows = _tile(size)
    if y.numel():
        _rms_norm_kernel[(cdiv(rows_RD.shape[0], rows),)](
            rows_RD,
            None if update is None else updates_RD,
            weight_D,
            total,
            y,
            rows_RD.shape[0],
            *rows_RD.stride(),
            *updates_RD.stride(),
            eps,
            D=size,
            ROWS=rows,
            BLOCK_D=block,
            **early(x.device, rows_RD.shape[0]),
        )
    return total, y


def launch_rms_norm_backward(x: Tensor, weight_D: Tensor, eps: float, d_y: Tensor, d_x: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gradient of x, with `d_x` that it has from elsewhere, gradient of the weight)."""
    rows_RD, d_y_RD, size = _rows(x), _rows(d_y), x.shape[-1]
    d_x_RD = d_y_RD if d_x is None else _rows(d_x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = next_power_of_2(size)
    rows = max(1, BACKWARD_NUMBERS // block)
    tiles = cdiv(rows_RD.shape[0], rows) if out.numel() else 0
    partial_PD = torch.empty(min(tiles, BACKWARD_PROGRAMS), size, dtype=torch.float32, device=x.device)
    if tiles:
        _rms_norm_backward_kernel[(partial_PD.shape[0],)](
            rows_RD,
            weight_D,
            d_y_RD,
            None if d_x is None else d_x_RD,
            out,
            partial_PD,
            rows_RD.shape[0],
            *rows_RD.stride(),
            *d_y_RD.stride(),
            *d_x_RD.stride(),
            eps,
            D=size,
            ROWS=rows,
            BLOCK_D=block,
            **early(x.device, rows_RD.shape[0]),
        )
    return out, partial_PD.sum(0).to(weight_D.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _tile(size: int) -> tuple[int, int]:
    """(columns, rows) of a program: rows may be as short as a head."""
    block = next_power_of_2(size)
    return block, max(1, min(8, NUMBERS // block))


def launch_rotate(
    x_THd: Tensor, weight_d: Tensor | None, eps: float, cosines_Td: Tensor, sines_Td: Tensor, *, back: bool = False
) -> Tensor:
    """kernels.norm.norm_rotate, or without a weight kernels.norm.rotate; `back`: by the opposite angles."""
    tokens, heads, size = x_THd.shape
    y_THd = torch.empty(x_THd.shape, dtype=x_THd.dtype, device=x_THd.device)
    if y_THd.numel():
        _rotate_kernel[(tokens,)](
            x_THd,
            weight_d,
            cosines_Td.contiguous(),
            sines_Td.contiguous(),
            y_THd,
            *x_THd.stride(),
            eps,
            H=heads,
            D=size,
            BLOCK_H=next_power_of_2(heads),
            BLOCK_D=next_power_of_2(size // 2),
            BACK=back,
            **early(x_THd.device, tokens),
        )
    return y_THd


def launch_norm_rotate_backward(
    x_THd: Tensor, weight_d: Tensor, eps: float, cosines_Td: Tensor, sines_Td: Tensor, d_THd: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of the weight)."""
    tokens, heads, size = x_THd.shape
    out_THd = torch.empty(x_THd.shape, dtype=x_THd.dtype, device=x_THd.device)
    partial_Pd = torch.empty(min(tokens, BACKWARD_PROGRAMS), size, dtype=torch.float32, device=x_THd.device)
    if out_THd.numel():
        _norm_rotate_backward_kernel[(partial_Pd.shape[0],)](
            x_THd,
            weight_d,
            cosines_Td.contiguous(),
            sines_Td.contiguous(),
            d_THd,
            out_THd,
            partial_Pd,
            tokens,
            *x_THd.stride(),
            *d_THd.stride(),
            eps,
            H=heads,
            D=size,
            BLOCK_H=next_power_of_2(heads),
            BLOCK_D=next_power_of_2(size // 2),
            **early(x_THd.device, tokens),
        )
    return out_THd, partial_Pd.sum(0).to(weight_d.dtype)


@triton.jit(do_not_specialize=["count"])
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    update,
    weight,
    total,
    y,
    count,
    x_row,
    x_unit,
    update_row,
    update_unit,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    weight_D = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (row < count)[:, None] & (d < D)[None, :]
    x_RD = tl.load(x + row[:, None] * x_row + d[None, :] * x_unit, mask=there, other=0.0)
    if update is not None:
        update_RD = tl.load(update + row[:, None] * update_row + d[None, :] * update_unit, mask=there, other=0.0)
        x_RD = (x_RD.to(tl.float32) + update_RD.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row[:, None] * D + d[None, :], x_RD, mask=there)
    x_RD = x_RD.to(tl.float32)
    scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / D + eps)
    y_RD = x_RD * scale_R[:, None] * weight_D[None, :]
    tl.store(y + row[:, None] * D + d[None, :], y_RD.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count"])
def _rms_norm_backward_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    d_y,
    d_x,
    out,
    partial,
    count,
    x_row,
    x_unit,
    d_y_row,
    d_y_unit,
    d_x_row,
    d_x_unit,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """With s = 1 / rms(x) and g = d_y * weight: s * (g - x * s^2 * mean(g * x)); the weight's is the sum of d_y * x * s."""
    begin(EARLY)
    d = tl.arange(0, BLOCK_D)
    weight_D = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    d_weight_D = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (row < count)[:, None] & (d < D)[None, :]
        x_RD = tl.load(x + row[:, None] * x_row + d[None, :] * x_unit, mask=there, other=0.0).to(tl.float32)
        d_y_RD = tl.load(d_y + row[:, None] * d_y_row + d[None, :] * d_y_unit, mask=there, other=0.0).to(tl.float32)
        scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / D + eps)
        normed_RD = x_RD * scale_R[:, None]
        through_RD = d_y_RD * weight_D[None, :]
        along_R = tl.sum(through_RD * normed_RD, 1) / D
        d_RD = (through_RD - normed_RD * along_R[:, None]) * scale_R[:, None]
        if d_x is not None:
            d_x_RD = tl.load(d_x + row[:, None] * d_x_row + d[None, :] * d_x_unit, mask=there, other=0.0)
            d_RD += d_x_RD.to(tl.float32)
        tl.store(out + row[:, None] * D + d[None, :], d_RD.to(out.dtype.element_ty), mask=there)
        d_weight_D += tl.sum(d_y_RD * normed_RD, 0)
    tl.store(partial + tl.program_id(0).to(tl.int64) * D + d, d_weight_D, mask=d < D)


@triton.jit
def _halves(x, at, half: tl.constexpr, unit, there):  # type: ignore[no-untyped-def]
    """Features 0 .. d/2 - 1 and those that they turn with, float32."""
    first = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    return first, tl.load(x + at + half * unit, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    cosines,
    sines,
    y,
    token_stride,
    head_stride,
    unit_stride,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BACK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What is normed, if there is a weight, is rounded to the dtype of `y` before it turns, as it is between two kernels."""
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    half: tl.constexpr = D // 2
    if weight is not None:
        w_first, w_second = _halves(weight, d, half, 1, d < half)
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    there = (head < H)[:, None] & (d < half)[None, :]
    at = token * token_stride + head[:, None] * head_stride + d[None, :] * unit_stride
    first, second = _halves(x, at, half, unit_stride, there)
    cos_first, cos_second = _halves(cosines, token * D + d, half, 1, d < half)
    sin_first, sin_second = _halves(sines, token * D + d, half, 1, d < half)
    if BACK:
        sin_first, sin_second = -sin_first, -sin_second
    if weight is not None:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        first = (first * scale * w_first[None, :]).to(y.dtype.element_ty).to(tl.float32)
        second = (second * scale * w_second[None, :]).to(y.dtype.element_ty).to(tl.float32)
    y_at = y + (token * H + head[:, None]) * D + d[None, :]
    tl.store(y_at, (first * cos_first[None, :] - second * sin_first[None, :]).to(y.dtype.element_ty), mask=there)
    tl.store(y_at + half, (second * cos_second[None, :] + first * sin_second[None, :]).to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _norm_rotate_backward_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    cosines,
    sines,
    d_y,
    out,
    partial,
    tokens,
    token_stride,
    head_stride,
    unit_stride,
    d_token_stride,
    d_head_stride,
    d_unit_stride,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Back by the angles, then as _rms_norm_backward_kernel, with the two halves of a head beside each other."""
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    half: tl.constexpr = D // 2
    begin(EARLY)
    w_first, w_second = _halves(weight, d, half, 1, d < half)
    there = (head < H)[:, None] & (d < half)[None, :]
    d_w_first, d_w_second = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for number in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(number, tl.int64)
        at = token * token_stride + head[:, None] * head_stride + d[None, :] * unit_stride
        first, second = _halves(x, at, half, unit_stride, there)
        d_at = token * d_token_stride + head[:, None] * d_head_stride + d[None, :] * d_unit_stride
        d_first, d_second = _halves(d_y, d_at, half, d_unit_stride, there)
        cos_first, cos_second = _halves(cosines, token * D + d, half, 1, d < half)
        sin_first, sin_second = _halves(sines, token * D + d, half, 1, d < half)
        back_first = d_first * cos_first[None, :] + d_second * sin_second[None, :]
        back_second = d_second * cos_second[None, :] - d_first * sin_first[None, :]
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        first, second = first * scale, second * scale
        through_first, through_second = back_first * w_first[None, :], back_second * w_second[None, :]
        along = ((tl.sum(through_first * first, 1) + tl.sum(through_second * second, 1)) / D)[:, None]
        out_at = out + (token * H + head[:, None]) * D + d[None, :]
        tl.store(out_at, ((through_first - first * along) * scale).to(out.dtype.element_ty), mask=there)
        tl.store(out_at + half, ((through_second - second * along) * scale).to(out.dtype.element_ty), mask=there)
        d_w_first += tl.sum(back_first * first, 0)
        d_w_second += tl.sum(back_second * second, 0)
    partial_at = partial + tl.program_id(0).to(tl.int64) * D + d
    tl.store(partial_at, d_w_first, mask=d < half)
    tl.store(partial_at + half, d_w_second, mask=d < half)
