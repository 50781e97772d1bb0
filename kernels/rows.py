"""Rows of tokens to the places of their entries, and back: the two copies around a grouped product over sorted rows.

Shape letters: T tokens, K top-k, N entries that are present of T * K, D model, P partial sums. Entries and places are those of
kernels/expert_order.py: T * K places, of which N are not -1. Building blocks without autograd: each is the backward pass of the
other. This file is the reference in plain torch; CUDA takes kernels/triton_rows.py, except for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import UserError

LANE = 8  # numbers of 16 bits that one access moves


def spread_rows(x_TD: Tensor, place_N: Tensor, top_k: int, out_ND: Tensor) -> None:
    """out[place[t * K + k]] = x[t], into `out_ND` of the same dtype; for a place of -1, an absent entry, nothing is written.

    D must be a multiple of 8; rows in any stride.
    """
    _check(x_TD, out_ND)
    if _takes_kernel(x_TD):
        from kernels.triton_rows import launch_spread  # here, because CPU machines may lack Triton

        launch_spread(x_TD, place_N, top_k, out_ND)
    else:
        present = place_N >= 0
        out_ND[place_N[present]] = x_TD.repeat_interleave(top_k, dim=0)[present]


def combine_rows(y_ND: Tensor, place_N: Tensor, top_k: int, *, weights_TK: Tensor | None = None) -> Tensor:
    """out[t] = sum over k of weights[t, k] * y[place[t * K + k]], (T, D) in y's dtype.

    The sum runs over k = 0, 1, .. in float32 (float64 for float64). No weights are weights of 1; a place of -1 adds nothing,
    whatever its weight. D must be a multiple of 8.
    """
    _check(y_ND)
    if _takes_kernel(y_ND):
        from kernels.triton_rows import launch_combine

        return launch_combine(y_ND, place_N, top_k, weights_TK, None)[0]
    place_TK = place_N.view(-1, top_k)
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    out_TD = torch.zeros(place_TK.shape[0], y_ND.shape[1], dtype=wide, device=y_ND.device)
    for k in range(top_k):
        present = place_TK[:, k] >= 0
        row_TD = y_ND[place_TK[present, k]].to(wide)
        out_TD[present] += row_TD if weights_TK is None else row_TD * weights_TK[present, k, None]
    return out_TD.to(y_ND.dtype)


def combine_rows_and_partials(y_ND: Tensor, place_N: Tensor, top_k: int, partials_PN: Tensor) -> tuple[Tensor, Tensor]:
    """(combine_rows without weights, sums_TK), sums[t, k] = sum over p of partials[p, place[t * K + k]], in float32, or 0.

    What a backward pass needs at once: the gradient of the tokens, and that of the weights from partial sums by place.
    """
    _check(y_ND)
    if _takes_kernel(y_ND):
        from kernels.triton_rows import launch_combine

        out_TD, sums_TK = launch_combine(y_ND, place_N, top_k, None, partials_PN)
        assert sums_TK is not None, "the kernel was given partial sums"
        return out_TD, sums_TK
    sums_N = torch.zeros_like(partials_PN[0])
    for partial_N in partials_PN:
        sums_N += partial_N
    sums = sums_N.new_zeros(place_N.shape[0])
    sums[place_N >= 0] = sums_N[place_N[place_N >= 0]]
    return combine_rows(y_ND, place_N, top_k), sums.view(-1, top_k)


def _takes_kernel(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype != torch.float64


def _check(*matrices: Tensor) -> None:
    for rows in matrices:
        if rows.shape[1] % LANE:
            raise UserError(
                f"rows of {rows.shape[1]} numbers cannot move in 16 bytes; make the hidden size a multiple of {LANE}"
            )
        assert rows.shape[0] <= 1 or rows.stride(1) == 1, f"numbers of a row must be adjacent, strides are {rows.stride()}"
