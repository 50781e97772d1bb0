"""Sums of gradients in float32, from parts in the dtype of the model."""

from __future__ import annotations

from dataclasses import dataclass

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
