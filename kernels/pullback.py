"""Gradients through an expression that autograd differentiates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pullback(y: Tensor, inputs: Sequence[Tensor], d_y: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `inputs` where that of `y` is `d_y`, of the same shape and dtype.

    As those of the sum of y * d_y, which are the same bit for bit: where `torch.autograd.grad` gets `d_y` itself, it imports
    SymPy to compare shapes, which is an eighth of what a process computes before its first update.
    """
    with torch.enable_grad():
        total = (y * d_y).sum()
    return torch.autograd.grad(total, inputs)
