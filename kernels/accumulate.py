"""Sums of gradients in float32, from parts in the dtype of the model.

Shape letters: W ranks, N numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sum:
    """Gradients of matrices that add up over micro-batches; who computes a gradient may add it by itself."""

    total_EAB: Tensor  # float32, contiguous
    fresh: bool  # whether nothing has been added, and whatever lies there is to be overwritten


def accumulate(total: Tensor, part: Tensor) -> None:
    """total += part, of the same shape, both contiguous; `total` is float32 or wider."""
    assert total.shape == part.shape and total.is_contiguous() and part.is_contiguous(), (total.shape, part.shape)
    if total.is_cuda:
        from kernels.triton_accumulate import launch_accumulate  # here, because CPU machines may lack Triton

        launch_accumulate(total, part)
    else:
        total.add_(part)


def add_rows(rows_WN: Tensor, divisor: int, out_N: Tensor) -> None:
    """out = (rows[0] + rows[1] + ...) / divisor, added in this order in float32 and rounded once.

    Both are contiguous, and in float32 or narrower.
    """
    assert rows_WN.shape[1:] == out_N.shape and rows_WN.is_contiguous() and out_N.is_contiguous(), (rows_WN.shape, out_N.shape)
    if out_N.is_cuda:
        from kernels.triton_accumulate import launch_add_rows

        launch_add_rows(rows_WN, divisor, out_N)
        return
    total_N = rows_WN[0].to(torch.float32, copy=True)
    for row_N in rows_WN[1:]:
        total_N += row_N
    out_N.copy_(total_N / divisor)
