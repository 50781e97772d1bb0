"""Launches that overlap: a kernel begins while the last programs of the one before still run.

Starting a kernel costs a microsecond or two, as much as many of decoding take. With programmatic dependent launch (Hopper and
later) the next kernel's programs take their places as soon as all of this one's have, and wait there for its results. Every
kernel launched with `early` begins with `begin`: whatever ran before it is then done, and what it wrote can be read. Before
that it may read weights, which nothing changes that is itself launched so.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE = tl.constexpr(64)  # numbers of 16 bits that the cache keeps together
FETCH_LINES = tl.constexpr(16)


@triton.jit
def begin(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetch(weight, first, rows, columns, row_stride, ROWS: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows first .. first + ROWS of a weight of 16-bit numbers or wider set out for the cache; before `begin`."""
    if EARLY:
        row = tl.minimum(first + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        for start in range(0, columns, FETCH_LINES * LINE):
            column = tl.minimum(start + tl.arange(0, FETCH_LINES) * LINE, columns - 1)
            address = (weight + row[:, None] * row_stride + column[None, :]).to(tl.int64)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
            )


@cache
def early(device: torch.device) -> dict[str, bool]:
    """The options of such a launch."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}
