"""The SwiGLU MLPs of many experts over the tokens that chose them, and the weighted sum of a token's K results.

Shape letters: T tokens, K top-k, N = T * K entries, D model, F expert hidden, C = 2F (rows 0..F of a gate_up matrix are the
gate, F..2F the up projection), E experts, S slots. The loop here is the reference; bfloat16 on a Hopper GPU takes the products
of kernels/hopper, which keep for backward what SonicMoE keeps (arXiv 2512.14080): x_TD and the pre-activations h_NC, so
2TD + 4NF bytes, however small the experts are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.errors import UserError
from kernels.expert_order import ExpertOrder
from kernels.limits import require_hopper, require_multiple
from kernels.rows import combine_rows, combine_rows_and_partials, spread_rows

# Of D and F on a GPU: the depth of a step of its products; 2F is a depth, F is one only with zeros behind.
HIDDEN_ALIGNMENT, EXPERT_HIDDEN_ALIGNMENT = 64, 32


def expert_mlp(
    x_TD: Tensor,
    order: ExpertOrder,
    weights_TK: Tensor | None,
    gate_up_SCD: Tensor,
    down_SDF: Tensor,
    *,
    slots_E: Tensor | None = None,
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * down_e @ (silu(gate_e @ x[t]) * (up_e @ x[t])), e the expert of entry t * K + k.

    y_TD has the dtype of `x_TD`. No weights are weights of one. `slots_E` (int32) says in which slot of the matrices each
    expert lies; None is expert e in slot e. On a GPU slots may lie apart in memory by whole rows, and bfloat16 needs D to be a
    multiple of 64 and F of 32; any T, and experts without entries, which get a gradient of zero, as do slots without expert.
    """
    if x_TD.is_cuda and x_TD.dtype not in (torch.float32, torch.float64):
        _check_hopper(x_TD, gate_up_SCD, down_SDF)
        y_TD: Tensor = _HopperMLP.apply(x_TD, weights_TK, gate_up_SCD, down_SDF, order, slots_E)
        return y_TD
    return _reference(x_TD, order, weights_TK, gate_up_SCD, down_SDF, slots_E)


def swiglu(gate_up_RC: Tensor) -> Tensor:
    """silu(gate) * up, (..., 2F) -> (..., F)."""
    gate_RF, up_RF = gate_up_RC.chunk(2, dim=-1)
    return functional.silu(gate_RF) * up_RF


def sorted_rows(x_TD: Tensor, entry_N: Tensor, top_k: int) -> Tensor:
    """One row for each (token, k) entry, sorted by expert.

    The copy by `expand` comes before the permutation so that backward sums a token's K rows in a fixed order; indexing with
    `entry_N // K` would add them atomically on a GPU.
    """
    tokens, hidden = x_TD.shape
    return x_TD.unsqueeze(1).expand(tokens, top_k, hidden).reshape(tokens * top_k, hidden)[entry_N]


def combine(rows_ND: Tensor, place_N: Tensor, top_k: int, weights_TK: Tensor | None) -> Tensor:
    """The sum of each token's expert rows, (T, D), weighted in float32 where there are weights."""
    tokens = place_N.shape[0] // max(top_k, 1)
    rows_TKD = rows_ND[place_N].view(tokens, top_k, rows_ND.shape[1])
    if weights_TK is not None:
        rows_TKD = rows_TKD * weights_TK.unsqueeze(-1)
    return rows_TKD.sum(dim=1).to(rows_ND.dtype)


def _reference(
    x_TD: Tensor, order: ExpertOrder, weights_TK: Tensor | None, gate_up_SCD: Tensor, down_SDF: Tensor, slots_E: Tensor | None
) -> Tensor:
    top_k = order.entry_N.shape[0] // max(x_TD.shape[0], 1) if weights_TK is None else weights_TK.shape[1]
    rows_ND = sorted_rows(x_TD, order.entry_N, top_k)
    if slots_E is not None:
        gate_up_SCD, down_SDF = gate_up_SCD[slots_E], down_SDF[slots_E]
    # unbind, not indexing: its backward builds the gradient of all experts once instead of adding E full-size tensors.
    experts = zip(rows_ND.split(order.counts_E.tolist()), gate_up_SCD.unbind(0), down_SDF.unbind(0), strict=True)
    rows_ND = torch.cat([functional.linear(swiglu(functional.linear(x, up_CD)), down_DF) for x, up_CD, down_DF in experts])
    return combine(rows_ND, order.place_N, top_k, weights_TK)


def _check_hopper(x_TD: Tensor, gate_up_SCD: Tensor, down_SDF: Tensor) -> None:
    if {x_TD.dtype, gate_up_SCD.dtype, down_SDF.dtype} != {torch.bfloat16}:
        raise UserError(
            f"the experts' kernels take bfloat16; x is {x_TD.dtype}, gate_up {gate_up_SCD.dtype}, down {down_SDF.dtype}; "
            f"use bfloat16 for all three, or float32 for the reference"
        )
    require_hopper(x_TD.device, "the experts'")
    (_, double, hidden), expert_hidden = gate_up_SCD.shape, down_SDF.shape[2]
    if double != 2 * expert_hidden or down_SDF.shape[1] != hidden or x_TD.shape[1] != hidden:
        raise UserError(
            f"x is {tuple(x_TD.shape)}, gate_up {tuple(gate_up_SCD.shape)}, down {tuple(down_SDF.shape)}; expected (T, D), "
            f"(S, 2F, D) and (S, D, F)"
        )
    require_multiple("hidden_size", hidden, HIDDEN_ALIGNMENT, "the experts'")
    require_multiple("expert_hidden_size", expert_hidden, EXPERT_HIDDEN_ALIGNMENT, "the experts'")


class _HopperMLP(torch.autograd.Function):
    """kernels/hopper: forward in 4 launches, backward in 7."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        gate_up_SCD: Tensor,
        down_SDF: Tensor,
        order: ExpertOrder,
        slots_E: Tensor | None,
    ) -> Tensor:
        from kernels.hopper import rows  # here, because CPU machines may lack Triton

        ctx.order, ctx.slots_E = order, slots_E
        if weights_TK is not None:
            weights_TK = weights_TK.float().contiguous()
        ctx.top_k = order.entry_N.shape[0] // max(x_TD.shape[0], 1)
        if x_TD.shape[0] == 0:
            ctx.save_for_backward(x_TD, weights_TK, gate_up_SCD, down_SDF, x_TD)
            return torch.empty_like(x_TD)
        h, a_NF = rows.up(_spread(x_TD, order, ctx.top_k), gate_up_SCD, slots_E, order)
        ctx.save_for_backward(x_TD, weights_TK, gate_up_SCD, down_SDF, h)
        return combine_rows(rows.down(a_NF, down_SDF, slots_E, order), order.place_N, ctx.top_k, weights_TK=weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        from kernels.hopper import columns, ring, rows

        x_TD, weights_TK, gate_up_SCD, down_SDF, h = ctx.saved_tensors
        order, slots_E, slots = ctx.order, ctx.slots_E, gate_up_SCD.shape[0]
        if x_TD.shape[0] == 0:
            none = None if weights_TK is None else torch.zeros_like(weights_TK)
            return torch.zeros_like(x_TD), none, torch.zeros_like(gate_up_SCD), torch.zeros_like(down_SDF), None, None
        need_x, need_weights, need_gate_up, need_down = ctx.needs_input_grad[:4]
        dy, dy_ND = ring.clippable(order.entry_N.shape[0], x_TD.shape[1], x_TD)
        spread_rows(dy_TD.contiguous(), order.place_N, ctx.top_k, dy_ND)
        d_h, weighted_NF, dots_PN = rows.d_hidden(dy_ND, h, weights_TK, down_SDF, slots_E, order)
        d_down = columns.d_weights(dy, weighted_NF, slots, slots_E, order) if need_down else None
        del dy, dy_ND, weighted_NF
        d_gate_up = None
        if need_gate_up:
            d_gate_up = columns.d_weights(d_h, _spread(x_TD, order, ctx.top_k), slots, slots_E, order)
        d_x = d_weights_TK = None
        if need_x or need_weights:
            d_rows_ND = rows.d_rows(d_h[ring.HALF.value :], gate_up_SCD, slots_E, order)
            d_x, d_weights_TK = combine_rows_and_partials(d_rows_ND, order.place_N, ctx.top_k, dots_PN)
        return d_x, d_weights_TK if need_weights else None, d_gate_up, d_down, None, None


def _spread(x_TD: Tensor, order: ExpertOrder, top_k: int) -> Tensor:
    rows_ND = x_TD.new_empty(order.entry_N.shape[0], x_TD.shape[1])
    spread_rows(x_TD if x_TD.stride(1) == 1 else x_TD.contiguous(), order.place_N, top_k, rows_ND)
    return rows_ND
