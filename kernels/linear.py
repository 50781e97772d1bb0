"""A linear map whose result for one row does not depend, bit for bit, on which or how many other rows there are.

Libraries choose the order of a product's sums by its number of rows. So a token decoded alone and the same token in a training
batch get results that differ in their last bits, and then a router may choose other experts. Here every row is always computed
in the same order (batch invariance; He et al., "Defeating Nondeterminism in LLM Inference", 2025). Backward has no counterpart
in generation and uses the library's products.

Shape letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 16  # rows that a CPU multiplies at once; always this many, the last ones filled up


def linear(x: Tensor, weight_NK: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """x @ weight^T, (.., K) -> (.., N), the same bits for a row whatever the others are; differentiable.

    Operands of 16 bits are multiplied exactly and added in float32, float32 and float64 ones in their own precision. `dtype` is
    the result's, that of `x` if None. A GPU takes kernels/triton_linear.py, except for float64.
    """
    return linears(x, [weight_NK], dtype=dtype)[0]


def linears(x: Tensor, weights_NK: Sequence[Tensor], *, dtype: torch.dtype | None = None, plain: bool = False) -> list[Tensor]:
    """`linear` by each of up to three weights, in one launch on a GPU. `plain` ones are the library's, not batch-invariant.

    All give their part of the gradient of `x` to one sum, so that autograd has none to add. Weights that lie one after the
    other in memory, as ZeRO lays them, are one matrix to the library: one product instead of three, and its results are views.
    """
    results = _Linears.apply(x.flatten(0, -2), dtype or x.dtype, plain, *weights_NK)
    return [result.view(*x.shape[:-1], result.shape[1]) for result in results]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, dtype: torch.dtype, plain: bool, *weights_NK: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_MK, *weights_NK)
        if not plain:
            return products(x_MK, weights_NK, dtype)
        if (together_NK := one_matrix(weights_NK)) is not None:
            return torch.mm(x_MK, together_NK.t()).to(dtype).split([len(weight_NK) for weight_NK in weights_NK], dim=1)
        return tuple(torch.mm(x_MK, weight_NK.t()).to(dtype) for weight_NK in weights_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_MN: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, *weights_NK = ctx.saved_tensors
        dtype = d_MN[0].dtype  # of the results that were asked for
        if dtype == x_MK.dtype and all(ctx.needs_input_grad[3:]) and (together_NK := one_matrix(weights_NK)) is not None:
            d_together_MN = torch.cat(d_MN, dim=1)
            d_x_MK = torch.mm(d_together_MN, together_NK) if ctx.needs_input_grad[0] else None
            d_together_NK = torch.mm(d_together_MN.t(), x_MK)
            return d_x_MK, None, None, *d_together_NK.split([len(weight_NK) for weight_NK in weights_NK])
        split = x_MK.is_cuda and (x_MK.dtype, dtype) == (torch.bfloat16, torch.float32)
        factors = [_in_halves(d) if split else d for d in d_MN]
        wide = x_MK.dtype if split else dtype
        d_x_MK = None
        if ctx.needs_input_grad[0]:
            for factor, weight_NK in zip(factors, weights_NK, strict=True):
                weight_NK = torch.cat([weight_NK, weight_NK]) if split else weight_NK.to(wide)
                d_x_MK = torch.mm(factor, weight_NK) if d_x_MK is None else d_x_MK.addmm_(factor, weight_NK)
        d_weights: list[Tensor | None] = []
        for factor, weight_NK, needed in zip(factors, weights_NK, ctx.needs_input_grad[3:], strict=True):
            d_NK = torch.mm(factor.t(), x_MK.to(wide)) if needed else None
            d_NK = d_NK[: len(weight_NK)] + d_NK[len(weight_NK) :] if split and d_NK is not None else d_NK
            d_weights.append(None if d_NK is None else d_NK.to(weight_NK.dtype))
        return None if d_x_MK is None else d_x_MK.to(x_MK.dtype), None, None, *d_weights


def one_matrix(weights_NK: Sequence[Tensor]) -> Tensor | None:
    """All rows of several weights that lie one after the other in one storage; None where they do not."""
    if len(weights_NK) == 1:
        return None
    first_NK, rows = weights_NK[0], 0
    end = first_NK.data_ptr()
    for weight_NK in weights_NK:
        if weight_NK.data_ptr() != end or weight_NK.dtype != first_NK.dtype or not weight_NK.is_contiguous():
            return None
        end, rows = end + weight_NK.nbytes, rows + len(weight_NK)
    storage = first_NK.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():  # neighbours by chance
        return None
    return first_NK.as_strided((rows, first_NK.shape[1]), first_NK.stride())


def _in_halves(d_MN: Tensor) -> Tensor:
    """(M, 2N) bfloat16: what bfloat16 keeps of float32 numbers, and what it keeps of the rest, together 16 bits of each.

    So the tensor cores multiply them, ten times as fast as float32, and no result in bfloat16 tells the difference.
    """
    halves = d_MN.new_empty(d_MN.shape[0], 2 * d_MN.shape[1], dtype=torch.bfloat16)
    first_MN, rest_MN = halves.chunk(2, dim=1)
    torch.sub(d_MN, first_MN.copy_(d_MN), out=rest_MN)
    return halves


def product(x_MK: Tensor, weight_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """`linear` without gradients, for two matrices."""
    return products(x_MK, [weight_NK], dtype)[0]


def products(x_MK: Tensor, weights_NK: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`linears` without gradients, for matrices."""
    if x_MK.is_cuda and x_MK.dtype != torch.float64:
        from kernels.triton_linear import launch_linears  # here, because CPU machines may lack Triton

        return launch_linears(x_MK, weights_NK, dtype)
    return tuple(tiled_product(x_MK, weight_NK).to(dtype) for weight_NK in weights_NK)


def tiled_product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """The reference: products of TILE rows each, all of one shape, so that the library adds up every row alike.

    Float32, or float64 as it is.
    """
    rows, inputs = x_MK.shape
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    x_MK, weight_NK = x_MK.to(wide), weight_NK.to(wide)
    outputs = weight_NK.shape[0]
    if outputs < TILE:  # else the library would take products with vectors, in which the place of a row counts
        weight_NK = torch.cat([weight_NK, weight_NK.new_zeros(TILE - outputs, inputs)])
    tiles = -(-rows // TILE)
    if tiles * TILE != rows:
        x_MK = torch.cat([x_MK, x_MK.new_zeros(tiles * TILE - rows, inputs)])
    product = torch.bmm(x_MK.reshape(tiles, TILE, inputs), weight_NK.t().expand(tiles, -1, -1))
    return product.view(tiles * TILE, weight_NK.shape[0])[:rows, :outputs]
