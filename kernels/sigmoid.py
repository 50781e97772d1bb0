"""A sigmoid whose bits depend on its argument alone.

The library's on a CPU takes another formula for the last numbers of a tensor, those that do not fill a vector register, so a
token's result would depend on how many come after it. Its exponential does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), elementwise, in the dtype of `x`, computed in float32 at least; differentiable."""
    y: Tensor = _Sigmoid.apply(x)
    return y


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = (1 + (-wide).exp()).reciprocal_().to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        d_x: Tensor = d_y * (1 - y) * y
        return d_x
