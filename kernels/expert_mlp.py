"""The SwiGLU MLPs of many experts over the tokens that chose them, and the weighted sum of a token's K results.

Shape letters: T tokens, K top-k, N <= T * K entries, D model, F expert hidden, C = 2F (rows 0..F of a gate_up matrix are the
gate, F..2F the up projection), E experts, S slots. The loop here is the reference; bfloat16 on a Hopper GPU takes the products
of kernels/hopper, which keep for backward what SonicMoE keeps (arXiv 2512.14080): x_TD and the pre-activations h_NC, so
2TD + 4NF bytes, however small the experts are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.accumulate import Sum
from kernels.errors import UserError
from kernels.expert_order import ExpertOrder
from kernels.limits import require_hopper, require_multiple, takes_kernels
from kernels.linear import linear
from kernels.rows import combine_rows, combine_rows_and_partials, of_entries
from kernels.sigmoid import sigmoid

WeightGradients = Callable[[Tensor, Tensor], None]  # of gate_up_ECD and down_EDF, of this call's experts in their order
Sums = Callable[[], tuple[Sum, Sum] | None]  # of gate_up and down: of as many experts as they have, the first ones

# Of D and F on a GPU: the depth of a step of its products; 2F is a depth, F is one only with zeros after.
HIDDEN_ALIGNMENT, EXPERT_HIDDEN_ALIGNMENT = 64, 32


def expert_mlp(
    x_TD: Tensor,
    order: ExpertOrder,
    weights_TK: Tensor | None,
    gate_up_SCD: Tensor,
    down_SDF: Tensor,
    *,
    slots_E: Tensor | None = None,
    gradients: WeightGradients | None = None,
    sums: Sums | None = None,
    again: bool = False,
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * down_e @ (silu(gate_e @ x[t]) * (up_e @ x[t])), e the expert of entry t * K + k.

    y_TD has the dtype of `x_TD`. No weights are weights of one; that of an absent entry is not read. `slots_E` (int32) says in
    which slot of the matrices each expert lies; None is expert e in slot e. On a GPU slots may lie apart in memory by whole
    rows, and bfloat16 needs D to be a multiple of 64 and F of 32; any T, and experts without entries, which get a gradient of
    zero, as do slots without expert.

    With `gradients` the matrices are constants to autograd, an arena that may hold more than these experts. Backward gives it
    those of the E experts once; until then the arena must hold them. Outside of no_grad y_TD then requires a gradient. Kernels
    ask for `sums` in each backward pass, add the gradients of their experts there, in float32 and without a pass over memory,
    and give `gradients` those of the experts after them; nobody asks where there are no entries.

    What is computed `again`, for a backward pass, has known results: kernels leave them out and return zeros.
    """
    # Backward comes only to what needs a gradient, and tokens and weights may be constants.
    anchor = None if gradients is None else x_TD.new_empty(0).requires_grad_()
    if takes_kernels(x_TD):
        check_hopper(x_TD, gate_up_SCD, down_SDF)
        matrices = gate_up_SCD, down_SDF
        y_TD: Tensor = _HopperMLP.apply(x_TD, weights_TK, *matrices, order, slots_E, gradients, sums, again, anchor)
        return y_TD
    if gradients is not None:
        gate_up_SCD, down_SDF = _TakeSlots.apply(x_TD, weights_TK, gate_up_SCD, down_SDF, slots_E, gradients, anchor)
        slots_E = None
    return _reference(x_TD, order, weights_TK, gate_up_SCD, down_SDF, slots_E)


def swiglu(gate_up_RC: Tensor) -> Tensor:
    """silu(gate) * up, (..., 2F) -> (..., F)."""
    gate_RF, up_RF = gate_up_RC.chunk(2, dim=-1)
    return (functional.silu(gate_RF) if gate_RF.is_cuda else gate_RF * sigmoid(gate_RF)) * up_RF


def sorted_rows(x_TD: Tensor, entry_N: Tensor, top_k: int) -> Tensor:
    """One row for each (token, k) entry, sorted by expert.

    The copy by `expand` comes before the permutation so that backward sums a token's K rows in a fixed order; indexing with
    `entry_N // K` would add them atomically on a GPU.
    """
    tokens, hidden = x_TD.shape
    return x_TD.unsqueeze(1).expand(tokens, top_k, hidden).reshape(tokens * top_k, hidden)[entry_N]


def combine(rows_ND: Tensor, place_N: Tensor, top_k: int, weights_TK: Tensor | None) -> Tensor:
    """The sum of each token's expert rows, (T, D), weighted in float32 where there are weights; absent entries add nothing."""
    tokens = place_N.shape[0] // max(top_k, 1)
    present_TK = (place_N >= 0).view(tokens, top_k)
    if rows_ND.shape[0] < place_N.shape[0]:
        rows_ND = torch.cat([rows_ND, rows_ND.new_zeros(1, rows_ND.shape[1])])  # what a place of -1 finds
    rows_TKD = rows_ND[place_N].view(tokens, top_k, rows_ND.shape[1])
    if weights_TK is not None:
        rows_TKD = rows_TKD * torch.where(present_TK, weights_TK, 0).unsqueeze(-1)
    return rows_TKD.sum(dim=1).to(rows_ND.dtype)


def _reference(
    x_TD: Tensor, order: ExpertOrder, weights_TK: Tensor | None, gate_up_SCD: Tensor, down_SDF: Tensor, slots_E: Tensor | None
) -> Tensor:
    top_k = order.place_N.shape[0] // max(x_TD.shape[0], 1) if weights_TK is None else weights_TK.shape[1]
    rows_ND = sorted_rows(x_TD, order.entry_N, top_k)
    if slots_E is not None:
        gate_up_SCD, down_SDF = gate_up_SCD[slots_E], down_SDF[slots_E]
    # unbind, not indexing: its backward builds the gradient of all experts once instead of adding E full-size tensors.
    experts = zip(rows_ND.split(order.counts_E.tolist()), gate_up_SCD.unbind(0), down_SDF.unbind(0), strict=True)
    rows_ND = torch.cat([linear(swiglu(linear(x, up_CD)), down_DF) for x, up_CD, down_DF in experts])
    return combine(rows_ND, order.place_N, top_k, weights_TK)


class _TakeSlots(torch.autograd.Function):
    """The matrices of E experts out of an arena, whose gradients leave autograd here. Tokens, weights and the anchor are passed
    so that backward comes for whichever of them a gradient is asked."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        gate_up_SCD: Tensor,
        down_SDF: Tensor,
        slots_E: Tensor | None,
        gradients: WeightGradients,
        anchor: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.gradients = gradients
        return (gate_up_SCD.clone(), down_SDF.clone()) if slots_E is None else (gate_up_SCD[slots_E], down_SDF[slots_E])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gate_up_ECD: Tensor, d_down_EDF: Tensor) -> tuple[None, ...]:
        ctx.gradients(d_gate_up_ECD, d_down_EDF)
        return None, None, None, None, None, None, None


def check_hopper(x_TD: Tensor, gate_up_SCD: Tensor, down_SDF: Tensor) -> None:
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
    """kernels/hopper: forward in 3 launches, backward in 5."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        gate_up_SCD: Tensor,
        down_SDF: Tensor,
        order: ExpertOrder,
        slots_E: Tensor | None,
        gradients: WeightGradients | None,
        sums: Sums | None,
        again: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        from kernels.hopper import rows  # here, because CPU machines may lack Triton

        ctx.order, ctx.slots_E, ctx.gradients, ctx.sums = order, slots_E, gradients, sums
        ctx.top_k = order.place_N.shape[0] // max(x_TD.shape[0], 1)
        if weights_TK is not None:
            weights_TK = weights_TK.float().contiguous()
        h, y_TD = x_TD, None
        if order.entry_N.shape[0]:
            x = of_entries(x_TD, order, ctx.top_k, down_SDF.shape[2])
            h, a_NF = rows.up(x.operand, gate_up_SCD, slots_E, order)
            if not again:
                y_ND = rows.down(a_NF, down_SDF, slots_E, order)
                y_TD = combine_rows(y_ND, order.place_N, ctx.top_k, weights_TK=weights_TK)
        # An arena is not saved: its owner may write to other slots before backward.
        ctx.arena = (gate_up_SCD, down_SDF) if gradients is not None else None
        ctx.save_for_backward(x_TD, weights_TK, h, *(() if gradients is not None else (gate_up_SCD, down_SDF)))
        return torch.zeros_like(x_TD) if y_TD is None else y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, h, *matrices = ctx.saved_tensors
        gate_up_SCD, down_SDF = ctx.arena or matrices
        need_x, need_weights, need_gate_up, need_down = ctx.needs_input_grad[:4]
        compact = ctx.gradients is not None
        need_gate_up, need_down = need_gate_up or compact, need_down or compact
        if ctx.order.entry_N.shape[0]:
            need = need_x or need_weights, need_gate_up, need_down
            found = _hopper_backward(ctx, dy_TD, x_TD, weights_TK, h, gate_up_SCD, down_SDF, need)
        else:
            slots = ctx.order.counts_E.shape[0] if compact else gate_up_SCD.shape[0]
            none = None if weights_TK is None else torch.zeros_like(weights_TK)
            found = (
                torch.zeros_like(x_TD),
                none,
                gate_up_SCD.new_zeros(slots, *gate_up_SCD.shape[1:]),
                down_SDF.new_zeros(slots, *down_SDF.shape[1:]),
            )
        d_x, d_weights_TK, d_gate_up, d_down = found
        if compact:
            ctx.gradients(d_gate_up, d_down)
            d_gate_up = d_down = None
        return d_x, d_weights_TK if need_weights else None, d_gate_up, d_down, *[None] * 6


def _hopper_backward(
    ctx: Any,
    dy_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor | None,
    h: Tensor,
    gate_up_SCD: Tensor,
    down_SDF: Tensor,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x_TD, weights_TK, gate_up, down. `need` says which: of x and the weights, of gate_up, of down."""
    from kernels.hopper import columns, ring, rows

    order, slots_E = ctx.order, ctx.slots_E
    # where gradients of the matrices go: to the experts' slots, or one after the other
    slots, out_E = (order.counts_E.shape[0], None) if ctx.gradients is not None else (gate_up_SCD.shape[0], slots_E)
    sum_gate_up, sum_down = (ctx.sums and ctx.sums()) or (None, None)
    dy = of_entries(dy_TD, order, ctx.top_k, down_SDF.shape[2])
    d_h, weighted_NF, dots_PN = rows.d_hidden(dy.operand, h, weights_TK, down_SDF, slots_E, order)
    d_down = columns.d_weights(dy.clippable, weighted_NF, slots, out_E, order, sum_down) if need[2] else None
    del dy, weighted_NF
    d_gate_up = None
    if need[1]:
        x = of_entries(x_TD, order, ctx.top_k, down_SDF.shape[2]).operand
        d_gate_up = columns.d_weights(d_h, x, slots, out_E, order, sum_gate_up)
        del x
    d_x = d_weights_TK = None
    if need[0]:
        d_rows_ND = rows.d_rows(d_h[ring.HALF.value :], gate_up_SCD, slots_E, order)
        d_x, d_weights_TK = combine_rows_and_partials(d_rows_ND, order.place_N, ctx.top_k, dots_PN)
    return d_x, d_weights_TK, d_gate_up, d_down
