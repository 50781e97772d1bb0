"""kernels/peer_routing.py in three Triton kernels: one lays a rank's choices out beside its tokens; of the plan one counts the
rows of each block of tokens, and one numbers them.

Shape letters: W ranks, C tokens of each, V = W * C, K top-k. Bounds: 12 bytes a choice of every rank, most of them over the
link; at W = 2, C = 16384, K = 8 that is 1.6 MB, 5 us. Launches are what it saves: a layer's tokens wait for them. So each block
adds up the counts of the blocks before it by itself, 256 numbers for each rank there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import block_width, cdiv, next_power_of_2
from kernels.peers import HEADER, PeerChoices, PeerRows, RowPlan

BLOCK = 128  # tokens of a program that plans
CHUNK = 512  # counts that a program adds at once


def launch_lay_out(
    choices: PeerChoices, rows: PeerRows, rank: int, rank_TK: Tensor, experts_TK: Tensor, weights_TK: Tensor, x_TD: Tensor
) -> None:
    """kernels.peer_routing.lay_out of no more tokens than there is room for."""
    tokens, hidden = x_TD.shape
    out_RD = rows.of_rank[rank]
    assert out_RD.dtype == x_TD.dtype and out_RD.shape[1] == hidden and x_TD.stride(1) == 1, (out_RD.dtype, x_TD.stride())
    block_d = block_width(hidden)
    _lay_out_kernel[(max(tokens, 1), cdiv(hidden, block_d))](
        choices.of_rank[rank],
        out_RD,
        rank_TK.contiguous(),
        experts_TK.contiguous(),
        weights_TK.contiguous(),
        x_TD,
        tokens,
        choices.capacity,
        x_TD.stride(0),
        K=choices.top_k,
        K_PADDED=next_power_of_2(choices.top_k),
        D=hidden,
        BLOCK_D=block_d,
        HEAD=HEADER,
    )


def launch_plan(choices: PeerChoices, index_E: Tensor, rank: int) -> RowPlan:
    """kernels.peer_routing.plan_rows."""
    size, capacity, top_k = len(choices.blocks), choices.capacity, choices.top_k
    device, count = index_E.device, len(choices.blocks) * choices.capacity
    plan = RowPlan(
        row_WV=torch.empty(size, count, dtype=torch.int32, device=device),
        slots_VK=torch.empty(count, top_k, dtype=torch.int32, device=device),
        weights_VK=torch.empty(count, top_k, dtype=torch.float32, device=device),
        numbers=torch.empty(2 + size, dtype=torch.int32, device=device),
    )
    grid = (cdiv(capacity, BLOCK), size)
    counts = torch.empty(1 + size, grid[0] * size, dtype=torch.int32, device=device)  # rows at each rank; choices served here
    sizes = {"W": size, "K": top_k, "K_PADDED": next_power_of_2(top_k), "BLOCK": BLOCK, "HEAD": HEADER}
    _count_kernel[grid](choices.pointers_W, counts, capacity, rank, **sizes)
    _rows_kernel[grid](
        choices.pointers_W,
        counts,
        index_E,
        plan.row_WV,
        plan.slots_VK,
        plan.weights_VK,
        plan.numbers,
        capacity,
        rank,
        CHUNK=CHUNK,
        **sizes,
    )
    return plan


@triton.jit(do_not_specialize=["tokens", "capacity"])
def _lay_out_kernel(  # type: ignore[no-untyped-def]
    numbers,
    out,
    ranks,
    experts,
    weights,
    x,
    tokens,
    capacity,
    x_row,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = (column < D) & (token < tokens)
    tl.store(out + token * D + column, tl.load(x + token * x_row + column, mask=there), mask=there)
    if tl.program_id(1) == 0:
        choice = tl.arange(0, K_PADDED)
        at, inside = token * K + choice, (choice < K) & (token < tokens)
        field = numbers + HEAD + at
        tl.store(field, tl.load(ranks + at, mask=inside), mask=inside)
        tl.store(field + capacity * K, tl.load(experts + at, mask=inside).to(tl.int32), mask=inside)
        weight = tl.load(weights + at, mask=inside)
        tl.store(field + 2 * capacity * K, weight.to(tl.int32, bitcast=True), mask=inside)
        if token == 0:
            tl.store(numbers, tokens)


@triton.jit
def _ranks_of(base, tokens, first, capacity, K: tl.constexpr, K_PADDED: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """(places of a block's choices in a field, whether they are there, who serves them)."""
    token = first + tl.arange(0, BLOCK)[:, None]
    choice = tl.arange(0, K_PADDED)[None, :]
    laid = tl.where(tokens > capacity, 0, tokens)  # who has more than there is room for has laid none out
    inside = (token < laid) & (choice < K)
    at = token * K + choice
    return at, inside, tl.load(base + HEAD + at, mask=inside, other=-1)


@triton.jit(do_not_specialize=["capacity", "here"])
def _count_kernel(  # type: ignore[no-untyped-def]
    pointers,
    counts,
    capacity,
    here,
    W: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
):
    source, first = tl.program_id(1), tl.program_id(0) * BLOCK
    blocks = tl.num_programs(0) * W
    at = counts + source * tl.num_programs(0) + tl.program_id(0)
    base = tl.load(pointers + source).to(tl.pointer_type(tl.int32))
    _, _, ranks = _ranks_of(base, tl.load(base), first, capacity, K, K_PADDED, BLOCK, HEAD)
    for rank in range(W):
        tl.store(at + rank * blocks, tl.sum(tl.max((ranks == rank).to(tl.int32), axis=1), axis=0))
    tl.store(at + W * blocks, tl.sum(tl.sum((ranks == here).to(tl.int32), axis=1), axis=0))


@triton.jit
def _sums(counts, before, blocks, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(of the first `before` counts, of all)."""
    upto = tl.zeros([], tl.int32)
    total = tl.zeros([], tl.int32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        count = tl.load(counts + block, mask=block < blocks, other=0)
        upto += tl.sum(tl.where(block < before, count, 0), axis=0)
        total += tl.sum(count, axis=0)
    return upto, total


@triton.jit(do_not_specialize=["capacity", "here"])
def _rows_kernel(  # type: ignore[no-untyped-def]
    pointers,
    counts,
    index,
    rows,
    slots,
    weights,
    numbers,
    capacity,
    here,
    W: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    source, first = tl.program_id(1), tl.program_id(0) * BLOCK
    blocks = tl.num_programs(0) * W
    before = source * tl.num_programs(0) + tl.program_id(0)
    base = tl.load(pointers + source).to(tl.pointer_type(tl.int32))
    at, inside, ranks = _ranks_of(base, tl.load(base), first, capacity, K, K_PADDED, BLOCK, HEAD)
    token = first + tl.arange(0, BLOCK)
    exists = token < capacity
    most = tl.zeros([], tl.int32)
    for rank in range(W):
        most = tl.maximum(most, tl.load(tl.load(pointers + rank).to(tl.pointer_type(tl.int32))))
        start, total = _sums(counts + rank * blocks, before, blocks, CHUNK)
        wanted = tl.max((ranks == rank).to(tl.int32), axis=1)
        row = tl.where(wanted > 0, start + tl.cumsum(wanted, axis=0) - 1, -1)
        tl.store(rows + (rank * W + source) * capacity + token, row, mask=exists)
        if before == 0:
            tl.store(numbers + 2 + rank, total)
        if rank == here:
            expert = tl.load(base + HEAD + capacity * K + at, mask=inside, other=0)
            weight = tl.load(base + HEAD + 2 * capacity * K + at, mask=inside, other=0)
            served = inside & (ranks == here)
            slot = tl.where(served, tl.load(index + expert, mask=served, other=-1), -1)
            choice = tl.arange(0, K_PADDED)[None, :]
            to = row[:, None].to(tl.int64) * K + choice
            taken = (wanted > 0)[:, None] & (choice < K)
            tl.store(slots + to, slot, mask=taken)
            tl.store(weights + to, weight.to(tl.float32, bitcast=True), mask=taken)
            spare = source * capacity + token  # rows after the last, each cleared by one program
            behind = (exists & (spare >= total))[:, None] & (choice < K)
            tl.store(slots + spare[:, None].to(tl.int64) * K + choice, tl.full([BLOCK, K_PADDED], -1, tl.int32), mask=behind)
    if before == 0:
        tl.store(numbers, most)
        tl.store(numbers + 1, _sums(counts + W * blocks, 0, blocks, CHUNK)[1])
