"""The order of entries by expert, without a sort, in Triton kernels; kernels/expert_order.py says what they compute.

Shape letters: N entries, E experts, M tiles, P spans of consecutive entries. A program places the entries of one span: it knows
how many entries each expert has in the spans before, and in all, so where those of its own span begin. More programs of the
same launch write the tiles and the experts by load. Up to FEW entries every program counts all of them itself, in one launch;
beyond, one kernel counts every span, and one adds the counts up over the spans. Only integers are added, so the order of adding
does not matter.

Bounds. Bytes: N * (8 read twice + 8 written) + 12 P E: 6 MB and 2 MB at N=262144, E=128, some 2 us. Operations: a rank costs
CHUNK comparisons an entry, whatever E is. What counts is latency: three launches, and a program that walks through its chunks
one after the other, 2 us each, so there are as many spans as the kernel that adds over them can bear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.host_device import ALIGNED
from kernels.launches import begin, cdiv, early, next_power_of_2

CHUNK = 64  # entries whose ranks are found at once
WARPS_FEW, WARPS = 4, 2  # for latency; for many programs at once
FEW = 4096  # entries
MAX_SPANS = 4096
SPANS = 1024  # that a program adds at once
SLOTS = 32  # tiles and experts of a program that does not place entries
BLOCK = 1024  # entries that are counted at once

Ordered = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def order_with_kernels(experts_TK: Tensor, num_experts: int, num_present: int, most_tiles: int, tile_rows: int) -> Ordered:
    """The fields of kernels.expert_order.ExpertOrder. A negative expert is an absent entry, too large a one the last expert."""
    experts_TK, device = experts_TK.contiguous(), experts_TK.device
    num_entries = experts_TK.numel()
    span = CHUNK * max(1, cdiv(num_entries, CHUNK * MAX_SPANS))
    spans = cdiv(num_entries, span)
    counted = 0 if num_entries <= FEW else spans
    padded = max(16, next_power_of_2(num_experts))
    # One allocation for all, since each would cost as much as a launch.
    sizes = [counted * num_experts, num_present, num_entries, most_tiles, most_tiles, num_experts, num_experts, 1]
    before_EP, entry_N, place_N, tile_expert_M, tile_row_M, ends_E, by_load_E, num_tiles = _together(sizes, device)
    launch = early(device, experts_TK.shape[0])
    counts_E = torch.empty(num_experts, dtype=torch.int64, device=device)
    if counted:
        _count_kernel[(spans,)](experts_TK, before_EP, num_entries, span, num_experts, E_PADDED=padded, CHUNK=CHUNK, **launch)
        _before_kernel[(num_experts,)](before_EP, counts_E, spans, BLOCK=SPANS, **launch)
    _order_kernel[(spans + cdiv(max(most_tiles, num_experts), SLOTS),)](
        experts_TK,
        before_EP if counted else None,
        entry_N,
        place_N,
        counts_E,
        ends_E,
        tile_expert_M,
        tile_row_M,
        num_tiles,
        by_load_E,
        num_entries,
        num_present,
        span,
        spans,
        most_tiles,
        num_experts,
        E_PADDED=padded,
        TILE_ROWS=tile_rows,
        CHUNK=CHUNK,
        SLOTS=SLOTS,
        BLOCK=BLOCK,
        num_warps=WARPS if counted else WARPS_FEW,
        **launch,
    )
    return entry_N, place_N, counts_E, ends_E, tile_expert_M, tile_row_M, num_tiles, by_load_E


def _together(sizes: list[int], device: torch.device) -> tuple[Tensor, ...]:
    """So many int32 of each, uninitialised; all begin where kernels were compiled for, whatever the sizes."""
    padded = [part for size in sizes for part in (size, -size % (ALIGNED // torch.int32.itemsize))]
    return torch.empty(sum(padded), dtype=torch.int32, device=device).split(padded)[::2]


@triton.jit
def _experts_at(experts, entries, inside, E):  # type: ignore[no-untyped-def]
    """(the experts of entries, which are present); within range, so that no address leaves its tensor, whatever was written."""
    expert = tl.load(experts + entries, mask=inside, other=-1)
    return tl.minimum(tl.maximum(expert, 0), E - 1).to(tl.int32), expert >= 0


@triton.jit(do_not_specialize=["num_entries", "span", "E"])
def _count_kernel(  # type: ignore[no-untyped-def]
    experts,
    counts,
    num_entries,
    span,
    E,
    E_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    first = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(first + span, num_entries)
    count = tl.zeros([E_PADDED], tl.int32)
    for start in range(0, span, CHUNK):
        entries = first + start + tl.arange(0, CHUNK)
        expert, present = _experts_at(experts, entries, entries < end, E)
        count += tl.histogram(expert, E_PADDED, mask=present)
    column = tl.arange(0, E_PADDED)
    tl.store(counts + column * tl.num_programs(0) + tl.program_id(0), count, mask=column < E)


@triton.jit(do_not_specialize=["spans"])
def _before_kernel(counts, totals, spans, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """In place: of an expert's counts in every span the sums over the spans before; `totals` (int64) gets that of all spans."""
    begin(EARLY)
    expert = tl.program_id(0)
    total = tl.zeros([], tl.int32)
    for start in range(0, spans, BLOCK):
        span = start + tl.arange(0, BLOCK)
        count = tl.load(counts + expert * spans + span, mask=span < spans, other=0)
        tl.store(counts + expert * spans + span, total + tl.cumsum(count, axis=0) - count, mask=span < spans)
        total += tl.sum(count, axis=0)
    tl.store(totals + expert, total.to(tl.int64))


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    experts,
    entry,
    place,
    next_place,
    first,
    end,
    num_present,
    span,
    E,
    E_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Place one span's entries; `next_place` is where each expert's next entry goes."""
    lane = tl.arange(0, CHUNK)
    for start in range(0, span, CHUNK):
        entries = first + start + lane
        inside = entries < end
        expert, present = _experts_at(experts, entries, inside, E)
        named = tl.where(present, expert, -1)
        earlier = (named[:, None] == named[None, :]) & (lane[:, None] > lane[None, :])
        at = tl.gather(next_place, expert, 0) + tl.sum(earlier.to(tl.int32), axis=1)
        placed = present & (at < num_present)  # so that no copy leaves its rows, whatever the caller said
        tl.store(place + entries, tl.where(placed, at, -1), mask=inside)
        tl.store(entry + at, entries.to(tl.int32), mask=placed)
        if start + CHUNK < span:
            next_place += tl.histogram(expert, E_PADDED, mask=present)


@triton.jit
def _schedule(  # type: ignore[no-untyped-def]
    total,
    starts,
    tile_expert,
    tile_row,
    num_tiles,
    by_load,
    first,
    most_tiles,
    E,
    E_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Tiles first .. first + SLOTS, and the ranks by load of as many experts."""
    slot = first + tl.arange(0, SLOTS)
    expert = tl.arange(0, E_PADDED)[None, :]
    tiles = (total + TILE_ROWS - 1) // TILE_ROWS
    tile_ends = tl.cumsum(tiles, axis=0)
    owner = tl.sum(((tile_ends[None, :] <= slot[:, None]) & (expert < E)).to(tl.int32), axis=1)
    used = owner < E
    safe = tl.minimum(owner, E - 1)
    row = tl.gather(starts, safe, 0) + (slot - tl.gather(tile_ends - tiles, safe, 0)) * TILE_ROWS
    tl.store(tile_expert + slot, tl.where(used, owner, -1), mask=slot < most_tiles)
    tl.store(tile_row + slot, tl.where(used, row, -1), mask=slot < most_tiles)
    if first == 0:
        tl.store(num_tiles, tl.sum(tiles, axis=0))

    own = tl.gather(total, tl.minimum(slot, E - 1), 0)[:, None]
    ahead = (total[None, :] > own) | ((total[None, :] == own) & (expert < slot[:, None]))
    rank = tl.sum((ahead & (expert < E)).to(tl.int32), axis=1)
    tl.store(by_load + rank, slot, mask=slot < E)


@triton.jit(do_not_specialize=["num_entries", "num_present", "span", "spans", "most_tiles", "E"])
def _order_kernel(  # type: ignore[no-untyped-def]
    experts,
    span_counts,
    entry,
    place,
    counts,
    ends,
    tile_expert,
    tile_row,
    num_tiles,
    by_load,
    num_entries,
    num_present,
    span,
    spans,
    most_tiles,
    E,
    E_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    program = tl.program_id(0)
    column = tl.arange(0, E_PADDED)
    first = tl.minimum(program, spans).to(tl.int64) * span
    if span_counts is None:
        before = tl.zeros([E_PADDED], tl.int32)
        total = tl.zeros([E_PADDED], tl.int32)
        for start in range(0, num_entries, BLOCK):
            entries = start + tl.arange(0, BLOCK)
            expert, present = _experts_at(experts, entries, entries < num_entries, E)
            before += tl.histogram(expert, E_PADDED, mask=present & (entries < first))
            total += tl.histogram(expert, E_PADDED, mask=present)
    else:
        before = tl.load(span_counts + column * spans + program, mask=(column < E) & (program < spans), other=0)
        total = tl.load(counts + column, mask=column < E, other=0).to(tl.int32)
    totals_end = tl.cumsum(total, axis=0)
    starts = totals_end - total
    if program < spans:
        end = tl.minimum(first + span, num_entries)
        _place(experts, entry, place, starts + before, first, end, num_present, span, E, E_PADDED, CHUNK)
    else:
        if program == spans:
            if span_counts is None:
                tl.store(counts + column, total.to(tl.int64), mask=column < E)
            tl.store(ends + column, totals_end, mask=column < E)
        first_slot = (program - spans) * SLOTS
        _schedule(
            total, starts, tile_expert, tile_row, num_tiles, by_load, first_slot, most_tiles, E, E_PADDED, TILE_ROWS, SLOTS
        )
