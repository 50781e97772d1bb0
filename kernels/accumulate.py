"""Sums of gradients in float32, of parts that come in the dtype of the model."""

from __future__ import annotations

from torch import Tensor


def accumulate(total: Tensor, part: Tensor) -> None:
    """total += part, of the same shape, both contiguous; `total` is float32 or wider."""
    assert total.shape == part.shape and total.is_contiguous() and part.is_contiguous(), (total.shape, part.shape)
    if total.is_cuda:
        from kernels.triton_accumulate import launch_accumulate  # here, because CPU machines may lack Triton

        launch_accumulate(total, part)
    else:
        total.add_(part)
