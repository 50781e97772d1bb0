"""The copies and sums of kernels/peer_rows.py in Triton kernels that read other GPUs' memory over NVLink.

Shape letters: W ranks, V = W * C tokens, C of each rank, T of them on this rank, K top-k, R rows, D width.

Bounds, with b bytes a number: what crosses the link, R' * D * b for the R' rows that lie elsewhere, and what passes the own
memory of the device, up to 3 R * D * b. On two H200 with 16384 tokens of 2048 bfloat16 each, nearly all wanted by both, 67 MB
cross and 336 MB pass: 0.19 ms at the 360 GB/s of a copy engine, 0.08 ms at 4.2 TB/s. Loads over the link reach 290 to 335 GB/s.
Ranks are read in turns: at any time rows of the own memory beside those of others, and no rank is read by all others at once.
Addresses come as numbers, so the compiler has to be told what divides them; without that it loads two bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import block_width, cdiv, next_power_of_2
from kernels.peers import LANE_BYTES, PeerRows

POINTED = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}


def launch_pull(rows: PeerRows, row_V: Tensor, out_RD: Tensor) -> None:
    """kernels.peer_rows.pull_rows."""
    assert out_RD.is_contiguous() and out_RD.dtype == rows.dtype, (out_RD.stride(), out_RD.dtype, rows.dtype)
    block_d, ranks = block_width(rows.width), len(rows.blocks)
    if row_V.shape[0] and rows.width:
        _pull_kernel[(row_V.shape[0], cdiv(rows.width, block_d))](
            rows.pointers_W,
            row_V,
            out_RD,
            out_RD.shape[0],
            row_V.shape[0] // ranks,
            rows.start // LANE_BYTES,
            W=ranks,
            D=rows.width,
            BLOCK_D=block_d,
            UNIT=_unit(rows),
            DTYPE=POINTED[rows.dtype],
            LANE=LANE_BYTES,
        )


def launch_sum(rows: PeerRows, rank_TK: Tensor, row_WT: Tensor) -> Tensor:
    """kernels.peer_rows.sum_rows."""
    tokens, top_k = rank_TK.shape
    out_TD = torch.empty(tokens, rows.width, dtype=rows.dtype, device=rank_TK.device)
    block_d = block_width(rows.width)
    if tokens and rows.width:
        _sum_kernel[(tokens, cdiv(rows.width, block_d))](
            rows.pointers_W,
            rank_TK,
            row_WT,
            out_TD,
            row_WT.stride(0),
            rows.start // LANE_BYTES,
            K=top_k,
            K_PADDED=next_power_of_2(top_k),
            D=rows.width,
            BLOCK_D=block_d,
            UNIT=_unit(rows),
            DTYPE=POINTED[rows.dtype],
            WIDE=tl.float64 if rows.dtype == torch.float64 else tl.float32,
            LANE=LANE_BYTES,
        )
    return out_TD


def launch_pick(rows: PeerRows, rank_TK: Tensor, row_WT: Tensor) -> Tensor:
    """kernels.peer_rows.pick_numbers."""
    out_TK = torch.empty(rank_TK.shape, dtype=rows.dtype, device=rank_TK.device)
    block = 256
    if out_TK.numel():
        _pick_kernel[(cdiv(out_TK.numel(), block),)](
            rows.pointers_W,
            rank_TK,
            row_WT,
            out_TK,
            out_TK.numel(),
            row_WT.stride(0),
            rows.start // LANE_BYTES,
            K=rank_TK.shape[1],
            BLOCK=block,
            DTYPE=POINTED[rows.dtype],
            LANE=LANE_BYTES,
        )
    return out_TK


def _unit(rows: PeerRows) -> int:
    """The largest power of two, up to a lane, that divides the bytes of a row."""
    row_bytes = rows.width * rows.dtype.itemsize
    return min(LANE_BYTES, row_bytes & -row_bytes)


@triton.jit
def _rows_of(pointers, rank, start, row, D: tl.constexpr, UNIT: tl.constexpr, DTYPE: tl.constexpr, LANE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where row `row` of rank `rank` begins."""
    address = tl.load(pointers + rank) + start.to(tl.int64) * LANE + row.to(tl.int64) * (D * DTYPE.primitive_bitwidth // 8)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), UNIT)


@triton.jit(do_not_specialize=["height", "per_rank", "start"])
def _pull_kernel(  # type: ignore[no-untyped-def]
    pointers,
    rows,
    out,
    height,
    per_rank,
    start,
    W: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    LANE: tl.constexpr,
):
    rank, token = tl.program_id(0) % W, tl.program_id(0) // W
    to = tl.load(rows + rank * per_rank + token).to(tl.int64)
    if (to >= 0) & (to < height):
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        source = _rows_of(pointers, rank, start, token, D, UNIT, DTYPE, LANE)
        tl.store(out + to * D + column, tl.load(source + column, mask=column < D), mask=column < D)


@triton.jit(do_not_specialize=["row_stride", "start"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    pointers,
    ranks,
    rows,
    out,
    row_stride,
    start,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    LANE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    choice = tl.arange(0, K_PADDED)
    ranks_K = tl.load(ranks + token * K + choice, mask=choice < K, other=-1)
    total = tl.zeros([BLOCK_D], WIDE)
    for k in tl.static_range(K):
        rank = tl.load(ranks + token * K + k)
        before = tl.sum(((ranks_K == rank) & (choice < k)).to(tl.int32))
        first = (before == 0) & (rank >= 0)
        rank = tl.maximum(rank, 0)
        row = tl.maximum(tl.load(rows + rank.to(tl.int64) * row_stride + token), 0)
        source = _rows_of(pointers, rank, start, row, D, UNIT, DTYPE, LANE)
        total += tl.load(source + column, mask=(column < D) & first, other=0.0).to(WIDE)
    tl.store(out + token * D + column, total.to(DTYPE), mask=column < D)


@triton.jit(do_not_specialize=["numbers", "row_stride", "start"])
def _pick_kernel(  # type: ignore[no-untyped-def]
    pointers,
    ranks,
    rows,
    out,
    numbers,
    row_stride,
    start,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    LANE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    rank = tl.load(ranks + at, mask=inside, other=-1)
    written = inside
    inside = rank >= 0
    rank = tl.maximum(rank, 0)
    row = tl.load(rows + rank.to(tl.int64) * row_stride + at // K, mask=inside, other=0).to(tl.int64)
    size: tl.constexpr = DTYPE.primitive_bitwidth // 8
    address = tl.load(pointers + rank, mask=inside, other=0) + start.to(tl.int64) * LANE + (row * K + at % K) * size
    number = tl.load(address.to(tl.pointer_type(DTYPE)), mask=inside, other=0.0)
    tl.store(out + at, number, mask=written)
