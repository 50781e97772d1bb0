"""The attention of kernels/attention.py in one Triton kernel, over keys in one piece or in pages of 64.

Bounds of decoding, in bfloat16: each key and value is read once, 4 G d bytes a token of context, at 4.2 TB/s; the products are
mostly padding, 64 rows for the H / G heads of one query, and hide behind the loads. Rows of a tile are (query, head of the
group), so a prefix fills them. The instruction is the one of 64 rows in every case, and blocks count from the sequence's start.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import begin, early, next_power_of_2
from kernels.ragged import Ragged

BLOCK = 64  # keys of a step, and of a page


def launch_attention(q_THd: Tensor, keys: Tensor, values: Tensor, spans: Ragged) -> tuple[Tensor, Tensor]:
    """(out_THd, log_sum_HT); keys and values are (P, 64, G, d), or (T, G, d) if `spans` has no table."""
    tokens, heads, size = q_THd.shape
    groups = keys.shape[-2]
    paged = spans.table_NP is not None
    assert not paged or keys.shape[1] == BLOCK, keys.shape
    assert keys.stride() == values.stride() and keys.stride(-1) == q_THd.stride(2) == 1
    out_THd = torch.empty(tokens, heads, size, dtype=q_THd.dtype, device=q_THd.device)
    log_sum_HT = torch.empty(heads, tokens, dtype=torch.float32, device=q_THd.device)
    shared = heads // groups
    rows = max(64, next_power_of_2(spans.tile_queries * shared))
    _attention_kernel[(spans.tile_sequence.shape[0], groups)](
        q_THd,
        keys,
        values,
        out_THd,
        log_sum_HT,
        spans.first_N,
        spans.length_N,
        spans.tile_sequence,
        spans.tile_first,
        spans.table_NP,
        size**-0.5 * math.log2(math.e),
        tokens,
        q_THd.stride(0),
        q_THd.stride(1),
        keys.stride(0) if paged else BLOCK * keys.stride(0),
        keys.stride(-3),
        keys.stride(-2),
        spans.table_NP.stride(0) if spans.table_NP is not None else 0,
        PAGED=paged,
        SHARED=shared,
        QUERIES=spans.tile_queries,
        D=size,
        ROWS=rows,
        BLOCK_D=max(16, next_power_of_2(size)),
        BLOCK_K=BLOCK,
        num_warps=4,
        num_stages=2,  # the third would cost programs that run at once
        **early(q_THd.device, tokens),
    )
    return out_THd, log_sum_HT


def launch_put(k_TGd: Tensor, v_TGd: Tensor, places_T: Tensor, keys_PpGd: Tensor, values_PpGd: Tensor) -> None:
    """kernels.attention.put_pages."""
    tokens, groups, size = k_TGd.shape
    if tokens:
        _put_kernel[(tokens, 2)](
            k_TGd,
            v_TGd,
            places_T,
            keys_PpGd,
            values_PpGd,
            *k_TGd.stride(),
            *v_TGd.stride(),
            NUMBERS=groups * size,
            D=size,
            BLOCK=next_power_of_2(groups * size),
            **early(k_TGd.device, tokens),
        )


@triton.jit
def _put_kernel(  # type: ignore[no-untyped-def]
    k,
    v,
    places,
    keys,
    values,
    k_token,
    k_group,
    k_unit,
    v_token,
    v_group,
    v_unit,
    NUMBERS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    token, number = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place = tl.load(places + token) * NUMBERS + number
    there = number < NUMBERS
    if tl.program_id(1) == 0:
        at = k + token * k_token + number // D * k_group + number % D * k_unit
        tl.store(keys + place, tl.load(at, mask=there), mask=there)
    else:
        at = v + token * v_token + number // D * v_group + number % D * v_unit
        tl.store(values + place, tl.load(at, mask=there), mask=there)


@triton.jit(do_not_specialize=["tokens", "table_stride"])
def _attention_kernel(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    out,
    log_sums,
    first_of,
    length_of,
    tile_sequence,
    tile_first,
    table,
    scale,
    tokens,
    q_token,
    q_head,
    page_stride,
    key_stride,
    group_stride,
    table_stride,
    PAGED: tl.constexpr,
    SHARED: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    sequence = tl.load(tile_sequence + tl.program_id(0))
    first_query = tl.load(tile_first + tl.program_id(0))
    group = tl.program_id(1)
    start = tl.load(first_of + sequence)
    count = tl.load(first_of + sequence + 1) - start
    length = tl.load(length_of + sequence)
    row = tl.arange(0, ROWS)
    query = first_query + row // SHARED
    head = group * SHARED + row % SHARED
    real = (row < QUERIES * SHARED) & (query < count)
    position = length - count + query
    d, place = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    token = (start + query).to(tl.int64)
    in_row = real[:, None] & (d < D)[None, :]
    q_at = q + token[:, None] * q_token + head[:, None] * q_head + d[None, :]
    q_RD = tl.load(q_at, mask=in_row, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    last = tl.minimum(first_query + QUERIES, count) + length - count  # keys that some query of the tile sees
    for block in range(0, tl.cdiv(last, BLOCK_K)):
        if PAGED:
            base = tl.load(table + sequence * table_stride + block).to(tl.int64) * page_stride
        else:
            base = start.to(tl.int64) * key_stride + tl.cast(block, tl.int64) * page_stride
        at = base + group * group_stride
        key_place = block * BLOCK_K + place
        there = (key_place < length)[:, None] & (d < D)[None, :]
        k_KD = tl.load(keys + at + place[:, None] * key_stride + d[None, :], mask=there, other=0.0)
        scores = tl.dot(q_RD, tl.trans(k_KD), input_precision="ieee") * scale
        scores = tl.where(key_place[None, :] <= position[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(weights, 1)
        v_KD = tl.load(values + at + place[:, None] * key_stride + d[None, :], mask=there, other=0.0)
        sums = tl.dot(weights.to(v_KD.dtype), v_KD, sums * old[:, None], input_precision="ieee")
        top = new_top
    out_at = out + (token[:, None] * (SHARED * tl.num_programs(1)) + head[:, None]) * D + d[None, :]
    tl.store(out_at, (sums / total[:, None]).to(out.dtype.element_ty), mask=in_row)
    log_sum = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(log_sums + head.to(tl.int64) * tokens + token, log_sum, mask=real)
