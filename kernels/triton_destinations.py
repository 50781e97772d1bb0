"""kernels/destinations.py in one Triton kernel.

Shape letters: N = T * K entries, E experts, D devices. Bounds: 16 to 24 bytes an entry, a few microseconds at N = 131072; D
comparisons an entry in float64. Launches are what it saves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.expert_order import ExpertOrder
from kernels.launches import cdiv

BLOCK = 512


def launch_destinations(
    experts_TK: Tensor, order: ExpertOrder | None, ends_ED: Tensor, phase_E: Tensor, below: float
) -> Tensor:
    """kernels.destinations.destinations; `below` is the largest position among the entries of an expert."""
    experts_TK = experts_TK.contiguous()
    rank_TK = torch.empty(experts_TK.shape, dtype=torch.int32, device=experts_TK.device)
    entries = experts_TK.numel()
    if entries:
        _destinations_kernel[(cdiv(entries, BLOCK),)](
            experts_TK,
            None if order is None else order.place_N,
            None if order is None else order.ends_E,
            None if order is None else order.counts_E,
            ends_ED,
            phase_E,
            rank_TK,
            entries,
            ends_ED.shape[0] // phase_E.shape[0],
            BELOW=below,
            BLOCK=BLOCK,
        )
    return rank_TK


@triton.jit(do_not_specialize=["entries", "devices"])
def _destinations_kernel(  # type: ignore[no-untyped-def]
    experts, places, order_ends, counts, ends, phases, ranks, entries, devices, BELOW: tl.constexpr, BLOCK: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    expert = tl.load(experts + entry, mask=inside, other=-1).to(tl.int64)
    written = inside
    inside = expert >= 0  # of an absent entry nothing else is read
    expert = tl.maximum(expert, 0)
    at = tl.load(phases + expert, mask=inside, other=0.0)
    if places is not None:
        count = tl.load(counts + expert, mask=inside, other=1)
        first = tl.load(order_ends + expert, mask=inside, other=0) - count
        index = tl.load(places + entry, mask=inside, other=0) - first
        at = tl.minimum((index.to(tl.float64) + at) / count.to(tl.float64), BELOW)
    at += expert.to(tl.float64)
    rank = tl.zeros([BLOCK], tl.int32)
    for device in range(devices):
        end = tl.load(ends + expert * devices + device, mask=inside, other=0.0)
        rank += (at >= end).to(tl.int32)
    tl.store(ranks + entry, tl.where(inside, rank, -1), mask=written)
