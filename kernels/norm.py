"""RMS normalisation, and rotation of queries and keys, of one token at a time: no result depends on another token.

Shape letters: T tokens, H heads, d head_dim, D the last dimension. The references are plain torch; CUDA takes
kernels/triton_norm.py, one launch each where the reference is a dozen, except for float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.pullback import pullback


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32 (Zhang & Sennrich, arXiv 1910.07467); the dtype of `x`."""
    y: Tensor = _RMSNorm.apply(x, weight_D, eps)
    return y


def add_rms_norm(x: Tensor, update: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + update, its rms_norm): a residual stream and what the next map sees of it, read and written once."""
    total, y = _AddRMSNorm.apply(x, update, weight_D, eps)
    return total, y


def rotate(x_THd: Tensor, cosines_Td: Tensor, sines_Td: Tensor) -> Tensor:
    """Turns every head by its token's angles (Su et al., arXiv 2104.09864), in float32; the dtype of `x_THd`.

    Feature i and feature i + d/2 form one rotated pair, the layout of the Hugging Face checkpoints. The angles are float32 and
    get no gradient.
    """
    y_THd: Tensor = _Rotate.apply(x_THd, cosines_Td, sines_Td)
    return y_THd


def norm_rotate(x_THd: Tensor, weight_d: Tensor, eps: float, cosines_Td: Tensor, sines_Td: Tensor) -> Tensor:
    """`rotate` of the `rms_norm` of every head, read and written once on a GPU."""
    if not _takes_kernel(x_THd):
        return rotate(rms_norm(x_THd, weight_d, eps), cosines_Td, sines_Td)
    y_THd: Tensor = _NormRotate.apply(x_THd, weight_d, eps, cosines_Td, sines_Td)
    return y_THd


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return functional.rms_norm(x.to(wide), weight_D.shape, weight_D.to(wide), eps).to(x.dtype)


def rotate_reference(x_THd: Tensor, cosines_Td: Tensor, sines_Td: Tensor) -> Tensor:
    x = x_THd.to(torch.promote_types(x_THd.dtype, torch.float32))
    first, second = x.chunk(2, dim=-1)
    return (x * cosines_Td[:, None] + torch.cat((-second, first), dim=-1) * sines_Td[:, None]).to(x_THd.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        if _takes_kernel(x):
            from kernels.triton_norm import launch_rms_norm  # here, because CPU machines may lack Triton

            return launch_rms_norm(x, None, weight_D, eps)[1]
        return rms_norm_reference(x, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        return (*_norm_backward(x, weight_D, ctx.eps, d_y, None), None)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if _takes_kernel(x):
            from kernels.triton_norm import launch_rms_norm

            total, y = launch_rms_norm(x, update, weight_D, eps)
        else:
            total = x + update
            y = rms_norm_reference(total, weight_D, eps)
        ctx.save_for_backward(total, weight_D)
        ctx.eps = eps
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_y: Tensor) -> tuple[Tensor | None, ...]:
        total, weight_D = ctx.saved_tensors
        d_x, d_weight_D = _norm_backward(total, weight_D, ctx.eps, d_y, d_total)
        return d_x, d_x, d_weight_D, None


def _norm_backward(x: Tensor, weight_D: Tensor, eps: float, d_y: Tensor, d_x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x, with `d_x` that it has from elsewhere, and of the weight."""
    if _takes_kernel(x):
        from kernels.triton_norm import launch_rms_norm_backward

        return launch_rms_norm_backward(x, weight_D, eps, d_y, d_x)
    x, weight_D = x.detach().requires_grad_(), weight_D.detach().requires_grad_()
    with torch.enable_grad():
        y = rms_norm_reference(x, weight_D, eps)
    found, d_weight_D = pullback(y, (x, weight_D), d_y)
    return found if d_x is None else found + d_x, d_weight_D


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cosines_Td: Tensor, sines_Td: Tensor) -> Tensor:
        ctx.save_for_backward(cosines_Td, sines_Td)
        return _rotated(x_THd, cosines_Td, sines_Td, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_THd: Tensor) -> tuple[Tensor | None, ...]:
        cosines_Td, sines_Td = ctx.saved_tensors
        return _rotated(d_THd, cosines_Td, sines_Td, back=True), None, None


class _NormRotate(torch.autograd.Function):
    """On a GPU; elsewhere it is the one after the other."""

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, weight_d: Tensor, eps: float, cosines_Td: Tensor, sines_Td: Tensor) -> Tensor:
        from kernels.triton_norm import launch_rotate

        ctx.save_for_backward(x_THd, weight_d, cosines_Td, sines_Td)
        ctx.eps = eps
        return launch_rotate(x_THd, weight_d, eps, cosines_Td, sines_Td)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_THd: Tensor) -> tuple[Tensor | None, ...]:
        from kernels.triton_norm import launch_norm_rotate_backward

        x_THd, weight_d, cosines_Td, sines_Td = ctx.saved_tensors
        d_x_THd, d_weight_d = launch_norm_rotate_backward(x_THd, weight_d, ctx.eps, cosines_Td, sines_Td, d_THd)
        return d_x_THd, d_weight_d, None, None, None


def _rotated(x_THd: Tensor, cosines_Td: Tensor, sines_Td: Tensor, back: bool) -> Tensor:
    if _takes_kernel(x_THd):
        from kernels.triton_norm import launch_rotate

        return launch_rotate(x_THd, None, 0.0, cosines_Td, sines_Td, back=back)
    return rotate_reference(x_THd, cosines_Td, -sines_Td if back else sines_Td)


def _takes_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64
