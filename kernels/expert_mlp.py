"""The SwiGLU MLPs of many experts over rows that are sorted by expert.

Shape letters: R rows, D model, F expert hidden, E experts, C = 2F (rows 0..F of a gate_up matrix are the gate, F..2F the up
projection). An expert without rows gets a zero gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def expert_mlp(x_RD: Tensor, counts_E: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
    """y = down_e @ (silu(gate_e @ x) * (up_e @ x)) for every row x of expert e; returns y_RD in the dtype of `x_RD`.

    The first counts_E[0] rows belong to expert 0, the next counts_E[1] to expert 1, and so on; counts_E (int64) sums to R.
    bfloat16 on CUDA takes one grouped matrix product a projection (D and F must be multiples of 8), everything else a loop
    over the experts.
    """
    if _fits_grouped(x_RD, down_EDF):
        return _grouped(x_RD, counts_E, gate_up_ECD, down_EDF)
    return _looped(x_RD, counts_E.tolist(), gate_up_ECD, down_EDF)


def swiglu(gate_up_RC: Tensor) -> Tensor:
    """silu(gate) * up, (..., 2F) -> (..., F)."""
    gate_RF, up_RF = gate_up_RC.chunk(2, dim=-1)
    return functional.silu(gate_RF) * up_RF


def _fits_grouped(x_RD: Tensor, down_EDF: Tensor) -> bool:
    aligned = down_EDF.shape[1] % 8 == 0 and down_EDF.shape[2] % 8 == 0  # rows of 16-byte multiples
    return x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and x_RD.shape[0] > 0 and aligned


def _grouped(x_RD: Tensor, counts_E: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
    ends_E = counts_E.cumsum(0).int()
    hidden_RF = swiglu(functional.grouped_mm(x_RD.contiguous(), gate_up_ECD.transpose(1, 2), offs=ends_E))
    y_RD = functional.grouped_mm(hidden_RF, down_EDF.transpose(1, 2), offs=ends_E)
    if y_RD.requires_grad:
        y_RD.register_hook(torch.Tensor.contiguous)  # its backward refuses expanded gradients, such as that of a sum
    return y_RD


def _looped(x_RD: Tensor, counts: list[int], gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
    # unbind, not indexing: its backward builds the gradient of all experts once instead of adding E full-size tensors.
    experts = zip(x_RD.split(counts), gate_up_ECD.unbind(0), down_EDF.unbind(0), strict=True)
    return torch.cat([functional.linear(swiglu(functional.linear(x, up_CD)), down_DF) for x, up_CD, down_DF in experts])
