"""What the bfloat16 kernels require of a GPU and of sizes, with the same messages for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import UserError


def require_hopper(device: torch.device, whose: str) -> None:
    """Raises UserError unless `device` has compute capability 9.0. `whose` kernels these are: "the experts'"."""
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise UserError(
            f"{whose} kernels need a Hopper GPU (compute capability 9.0); {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}; use float32, which takes the reference, or a Hopper GPU"
        )


def require_multiple(name: str, size: int, step: int, whose: str) -> None:
    """Raises UserError, with the next size that would do, unless `step` divides `size`."""
    if size % step:
        raise UserError(
            f"{name}={size} is not a multiple of {step}, which {whose} bfloat16 kernels need; "
            f"use {-(-size // step) * step}, or float32, which takes the reference"
        )


def takes_kernels(x: Tensor) -> bool:
    """Whether a GPU's products of this dtype are those of kernels/hopper; float32 and float64 take the references."""
    return x.is_cuda and x.dtype not in (torch.float32, torch.float64)
