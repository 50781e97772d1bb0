"""log(1 + x) without the rounding of 1 + x, for Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p(x):  # type: ignore[no-untyped-def]
    """For -1 < x <= 1, and -inf for what rounds to -1: the rounding cancels in log(u) / (u - 1) (Kahan; Higham, 1.14.1)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
