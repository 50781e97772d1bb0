"""Sums of squares of experts' gradients, exact to float64 whatever their size, for the gradient norm.

Letters: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def squares(gradient: Tensor) -> Tensor:
    """(E,) float64: of each expert's part (E, ...) in float32, contiguous. No float64 copy is made on a GPU.

    The bits of a sum depend on the expert's numbers alone, not on how many others there are or where it stands.
    """
    assert gradient.dtype == torch.float32 and gradient.is_contiguous(), (gradient.dtype, gradient.stride())
    if gradient.is_cuda:
        from kernels.triton_squares import launch_squares  # here, because CPU machines may lack Triton

        return launch_squares(gradient)
    found = [torch.linalg.vector_norm(one, dtype=torch.float64).square() for one in gradient]
    return torch.stack(found) if found else gradient.new_zeros(0, dtype=torch.float64)
