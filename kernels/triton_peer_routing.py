"""kernels/peer_routing.py in two Triton kernels with a scan between them.

Shape letters: W ranks, C tokens of each, V = W * C, K top-k. Bounds: 12 bytes a choice of every rank, most of them over the
link; at W = 2, C = 16384, K = 8 that is 1.6 MB, 5 us. Launches are what it saves: a layer's tokens wait for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.peers import HEADER, PeerChoices, RowPlan

BLOCK = 128  # tokens of a program


def launch_plan(choices: PeerChoices, index_E: Tensor, rank: int) -> RowPlan:
    """kernels.peer_routing.plan_rows."""
    size, capacity, top_k = len(choices.blocks), choices.capacity, choices.top_k
    device, count = index_E.device, len(choices.blocks) * choices.capacity
    wants_WV = torch.empty(size, count, dtype=torch.int32, device=device)
    plan = RowPlan(
        row_WV=torch.empty_like(wants_WV),
        slots_VK=torch.empty(count, top_k, dtype=torch.int32, device=device),
        weights_VK=torch.empty(count, top_k, dtype=torch.float32, device=device),
        numbers=torch.zeros(2 + size, dtype=torch.int32, device=device),
    )
    grid = (triton.cdiv(capacity, BLOCK), size)
    sizes = {"W": size, "K": top_k, "K_PADDED": triton.next_power_of_2(top_k), "BLOCK": BLOCK, "HEAD": HEADER}
    _wants_kernel[grid](choices.pointers_W, wants_WV, plan.numbers, capacity, rank, **sizes)
    upto_WV = wants_WV.flatten().cumsum(0, dtype=torch.int32)
    _rows_kernel[grid](
        choices.pointers_W,
        wants_WV,
        upto_WV,
        index_E,
        plan.row_WV,
        plan.slots_VK,
        plan.weights_VK,
        plan.numbers,
        capacity,
        rank,
        **sizes,
    )
    return plan


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
def _wants_kernel(  # type: ignore[no-untyped-def]
    pointers,
    wants,
    numbers,
    capacity,
    here,
    W: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
):
    source, first = tl.program_id(1), tl.program_id(0) * BLOCK
    base = tl.load(pointers + source).to(tl.pointer_type(tl.int32))
    tokens = tl.load(base)
    _, _, ranks = _ranks_of(base, tokens, first, capacity, K, K_PADDED, BLOCK, HEAD)
    token = first + tl.arange(0, BLOCK)
    for rank in range(W):
        wanted = tl.max((ranks == rank).to(tl.int32), axis=1)
        tl.store(wants + (rank * W + source) * capacity + token, wanted, mask=token < capacity)
    tl.atomic_add(numbers + 1, tl.sum(tl.sum((ranks == here).to(tl.int32), axis=1), axis=0))
    if first == 0:
        tl.atomic_max(numbers, tokens)


@triton.jit(do_not_specialize=["capacity", "here"])
def _rows_kernel(  # type: ignore[no-untyped-def]
    pointers,
    wants,
    upto,
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
):
    source, first = tl.program_id(1), tl.program_id(0) * BLOCK
    count = W * capacity
    base = tl.load(pointers + source).to(tl.pointer_type(tl.int32))
    at, inside, ranks = _ranks_of(base, tl.load(base), first, capacity, K, K_PADDED, BLOCK, HEAD)
    token = first + tl.arange(0, BLOCK)
    exists = token < capacity
    for rank in range(W):
        place = (rank * W + source) * capacity + token
        start = tl.load(upto + rank * count - 1, mask=rank > 0, other=0)
        end = tl.load(upto + (rank + 1) * count - 1)
        wanted = tl.load(wants + place, mask=exists, other=0) > 0
        row = tl.where(wanted, tl.load(upto + place, mask=exists, other=0) - 1 - start, -1)
        tl.store(rows + place, row, mask=exists)
        if (first == 0) & (source == 0):
            tl.store(numbers + 2 + rank, end - start)
        if rank == here:
            expert = tl.load(base + HEAD + capacity * K + at, mask=inside, other=0)
            weight = tl.load(base + HEAD + 2 * capacity * K + at, mask=inside, other=0)
            served = inside & (ranks == here)
            slot = tl.where(served, tl.load(index + expert, mask=served, other=-1), -1)
            choice = tl.arange(0, K_PADDED)[None, :]
            to = row[:, None].to(tl.int64) * K + choice
            taken = wanted[:, None] & (choice < K)
            tl.store(slots + to, slot, mask=taken)
            tl.store(weights + to, weight.to(tl.float32, bitcast=True), mask=taken)
            spare = source * capacity + token  # rows behind the last, each cleared by one program
            behind = (exists & (spare >= end - start))[:, None] & (choice < K)
            tl.store(slots + spare[:, None].to(tl.int64) * K + choice, tl.full([BLOCK, K_PADDED], -1, tl.int32), mask=behind)
