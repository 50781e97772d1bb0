"""Overlapping launches: a kernel begins while the last programs of the previous one still run.

Starting a kernel costs a microsecond or two, as much as many kernels of decoding run. With programmatic dependent launch
(Hopper and later) the next kernel's programs take their places as soon as all of this one's have, and wait there for its
results. Every kernel launched with `early` begins with `begin`: whatever ran before it is then done, and what it wrote can be
read. Before that it may read weights, which no kernel changes that is launched in this way, or right before one.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK_D = 2048  # numbers of a row that a program moves at most
FEW_ROWS = 4096  # with many, what waits takes room from what runs: 3 % of the experts' forward pass of 32768 tokens


@triton.jit
def begin(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def cdiv(numerator: int, denominator: int) -> int:
    """Rounded up. Triton's own serves its compiler too, and every call costs the host a microsecond or two."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """At least `number`, which is 1 or more; as `cdiv`."""
    return 1 << (number - 1).bit_length()


def block_width(width: int) -> int:
    """Of a program's part of a row of this many numbers."""
    return min(BLOCK_D, next_power_of_2(max(1, width)))


def early(device: torch.device, rows: int) -> dict[str, bool]:
    """The options of a launch for this many rows."""
    if rows <= FEW_ROWS and _overlaps(device):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@cache
def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
