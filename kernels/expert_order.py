"""The order in which (token, choice) entries lie beside their expert, and the tiles of rows that a grouped product walks.

Shape letters: T tokens, K top-k, N entries that are present of T * K, E experts, M tiles at most. This file is the reference in
plain torch; CUDA takes kernels/triton_expert_order.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.errors import UserError

TILE_ROWS = 128
MAX_EXPERTS = 1024  # of the kernels, which hold a number per expert in registers


@dataclass(frozen=True)
class ExpertOrder:
    """Entries sorted by expert; entry t * K + k is choice k of token t, its place is its position in the sorted list."""

    entry_N: Tensor  # int32; the entry at each place; those of one expert in the order of entries
    place_N: Tensor  # int32, (T * K,); the place of each entry, the inverse of entry_N; -1 of an absent one
    counts_E: Tensor  # int64; entries of each expert, those of invalid tokens included; sums to N
    ends_E: Tensor  # int32; the place after the last entry of each expert
    tile_expert_M: Tensor  # int32; the expert of each tile of at most TILE_ROWS rows, in ascending order; then -1
    tile_row_M: Tensor  # int32; the first place of each tile; then -1
    num_tiles: Tensor  # int32, (1,); how many of the M tiles there are
    by_load_E: Tensor  # int32; the experts by descending count, the lower index first where counts are equal


def expert_order(
    experts_TK: Tensor, num_experts: int, *, num_entries: int | None = None, most_entries: int | None = None
) -> ExpertOrder:
    """Sort the entries of `experts_TK` (int64 or int32, below num_experts) by expert, without a wait for the GPU.

    An expert of -1 makes an entry absent: it has no place and is not counted. `num_entries` is N, how many are present; None
    means that all T * K are. Who does not know N yet says `most_entries` instead, and calls `cut` once N is known.
    M = N // TILE_ROWS + min(E, N) is the most tiles that any routing needs. Raises UserError where int32 cannot count the
    entries.
    """
    exact = most_entries is None
    if most_entries is not None:
        num_entries = most_entries
    if num_entries is None:
        num_entries = experts_TK.numel()
    if experts_TK.numel() >= 2**31:
        raise UserError(
            f"{experts_TK.shape[0]} tokens x top_k={experts_TK.shape[1]} are {experts_TK.numel()} entries, but places are "
            f"32-bit numbers; give at most {(2**31 - 1) // experts_TK.shape[1]} tokens at once"
        )
    if experts_TK.is_cuda:
        if num_experts > MAX_EXPERTS:
            raise UserError(f"{num_experts} experts; the kernel that orders entries holds at most {MAX_EXPERTS}; use fewer")
        from kernels.triton_expert_order import order_with_kernels  # here, because CPU machines may lack Triton

        tiles = most_tiles(num_entries, num_experts)
        return ExpertOrder(*order_with_kernels(experts_TK, num_experts, num_entries, tiles, TILE_ROWS))
    experts_N = experts_TK.reshape(-1).long()
    assert (experts_N < num_experts).all(), f"expert {int(experts_N.max())}, but there are {num_experts}"
    present = int((experts_N >= 0).sum())
    assert present == num_entries or (not exact and present < num_entries), (
        f"{present} entries are present, the caller says {num_entries}"
    )
    counts_E = experts_N[experts_N >= 0].bincount(minlength=num_experts)
    entry_N = experts_N.argsort(stable=True)[experts_N.shape[0] - present :]  # absent ones come first
    place_N = torch.full_like(experts_N, -1)
    place_N[entry_N] = torch.arange(present, device=entry_N.device)
    entry_N = torch.cat([entry_N, entry_N.new_full((num_entries - present,), -1)])
    by_load_E = counts_E.argsort(descending=True, stable=True)
    return ExpertOrder(
        entry_N.int(),
        place_N.int(),
        counts_E,
        counts_E.cumsum(0).int(),
        *_tiles(counts_E, counts_E.cumsum(0) - counts_E, num_entries),
        by_load_E.int(),
    )


def cut(order: ExpertOrder, num_choices: int, num_entries: int) -> ExpertOrder:
    """An order that was made with room for more: of the first T * K choices, of which N are present, and none after them."""
    tiles = most_tiles(num_entries, order.counts_E.shape[0])
    return replace(
        order,
        entry_N=order.entry_N[:num_entries],
        place_N=order.place_N[:num_choices],
        tile_expert_M=order.tile_expert_M[:tiles],
        tile_row_M=order.tile_row_M[:tiles],
    )


def most_tiles(num_entries: int, num_experts: int) -> int:
    """M: every expert with entries has at most one tile that is not full."""
    return num_entries // TILE_ROWS + min(num_experts, num_entries)


def parts_of(order: ExpertOrder, slots_RK: Tensor, part_R: Tensor, parts: int) -> list[ExpertOrder]:
    """An order whose rows come in parts, one for each part: entries, places and `by_load_E` are those of all, counts, ends and
    tiles those of the part. Without a wait for the GPU.

    Args:
        slots_RK: what `order` was made of.
        part_R: the part of each row, ascending, so that an expert's entries of a part are adjacent.
    """
    if parts == 1:
        return [order]
    experts = order.counts_E.shape[0]
    cell_N = torch.where(slots_RK >= 0, part_R.unsqueeze(1) * experts + slots_RK, parts * experts).flatten().long()
    counts = torch.zeros(parts * experts + 1, dtype=torch.int64, device=cell_N.device)
    counts.scatter_add_(0, cell_N, torch.ones_like(cell_N))
    counts_PE = counts[:-1].view(parts, experts)
    ends_PE = (order.ends_E - order.counts_E + counts_PE.cumsum(0)).int()
    tiles = _tiles(counts_PE, ends_PE - counts_PE, order.entry_N.shape[0])
    parted = zip(counts_PE, ends_PE, *tiles, strict=True)
    return [
        replace(order, counts_E=counts_E, ends_E=ends_E, tile_expert_M=expert_M, tile_row_M=row_M, num_tiles=num)
        for counts_E, ends_E, expert_M, row_M, num in parted
    ]


def _tiles(counts_E: Tensor, starts_E: Tensor, num_entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tile_expert_M, tile_row_M, num_tiles); any dimensions before E are kept."""
    tiles_E = (counts_E + TILE_ROWS - 1) // TILE_ROWS
    ends_E = tiles_E.cumsum(-1)
    experts = counts_E.shape[-1]
    tile_M = torch.arange(most_tiles(num_entries, experts), device=counts_E.device).expand(*counts_E.shape[:-1], -1)
    expert_M = torch.searchsorted(ends_E, tile_M.contiguous(), right=True)
    used_M = expert_M < experts
    safe_M = expert_M.clamp(max=experts - 1)
    row_M = starts_E.gather(-1, safe_M) + (tile_M - (ends_E - tiles_E).gather(-1, safe_M)) * TILE_ROWS
    return torch.where(used_M, expert_M, -1).int(), torch.where(used_M, row_M, -1).int(), ends_E[..., -1:].int()
