"""Products of rows that are sorted by expert with the matrices of their experts, with fused epilogues.

Shape letters: R rows, D model, F expert hidden, C = 2F, E experts, S slots, M tiles of rows. With a K-fold choice R = T * K.

    up       h_RC = x_RD @ gate_up_SCD^T,  a_RF = silu(gate) * up
    down     y_RD = a_RF @ down_SDF^T
    d_hidden d_a = dy_RD @ down_SDF;  d_h_RC = dSwiGLU(weight * d_a, h),  weight * a_RF,  dots_R = <d_a, a>
    d_rows   d_x_RD = d_h_RC @ gate_up_SCD

The gradient of a combine weight is <dy, y> = <dy @ down, a>, so y is not kept (SonicMoE, arXiv 2512.14080, section 3.2).

Bounds at R = 262144, D = 2048, F = 768, E = 128 (Qwen3-30B-A3B, 32768 tokens), on an H200 at 785 TF/s and 4.2 TB/s:
operations 4RDF, 2RDF, 2RDF, 4RDF: 2.10, 1.05, 1.05, 2.10 ms; bytes, each operand once, 3.1, 1.9, 3.9, 2.7 GB: 0.7, 0.4, 0.9,
0.6 ms. So the tensor cores bound all four.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.expert_order import ExpertOrder
from kernels.hopper.ring import (
    DEPTH,
    HALF,
    PIECE,
    ROWS,
    blocks,
    clippable,
    clipped,
    multiprocessors,
    stacked_rows,
    swizzled,
)
from kernels.hopper.row_tiles import kernel
from kernels.launches import cdiv, early
from kernels.rows import Tokens

NARROW_GAIN = 0.9  # narrow tiles read the rows twice as often, so they must share by a tenth better

# Orders of which only a part is done at once (kernels/expert_order.parts_of) write their part of `into`: what the function
# returns, as `clippable` allocations.


def up(
    x: Tensor | Tokens,
    gate_up_SCD: Tensor,
    slots_E: Tensor | None,
    order: ExpertOrder,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(h_RC as a `clippable` allocation, a_RF); `x` is x_RD or the tokens that its rows are."""
    rows, hidden = order.entry_N.shape[0], gate_up_SCD.shape[1] // 2
    h, out = into or (clippable(rows, 2 * hidden, gate_up_SCD)[0], clippable(rows, hidden, gate_up_SCD)[0])
    width = _even_width(2 * hidden, order, gate_up_SCD.device)
    weights, slot_rows = stacked_rows(gate_up_SCD, "gate_up")
    right = blocks(weights, (width // 2, DEPTH.value))
    n_tiles = cdiv(2 * hidden, width)
    _launch("up", width, order, slots_E, slot_rows, x, right, out, hidden=hidden, n_tiles=n_tiles, h=h)
    return h, out[HALF.value :]


def down(a_RF: Tensor, down_SDF: Tensor, slots_E: Tensor | None, order: ExpertOrder, into: Tensor | None = None) -> Tensor:
    """y_RD."""
    columns = down_SDF.shape[1]
    out = clippable(a_RF.shape[0], columns, a_RF)[0] if into is None else into
    width = _even_width(columns, order, a_RF.device)
    weights, slot_rows = stacked_rows(down_SDF, "down")
    right = blocks(weights, (width, DEPTH.value))
    _launch("down", width, order, slots_E, slot_rows, a_RF, right, out, hidden=0, n_tiles=cdiv(columns, width))
    return out[HALF.value :]


def d_hidden(
    dy: Tensor | Tokens,
    h: Tensor,
    weights_N: Tensor | None,
    down_SDF: Tensor,
    slots_E: Tensor | None,
    order: ExpertOrder,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_h_RC as a `clippable` allocation, weight * a_RF, partial sums dots_PR float32); `h` is what `up` returned, `dy` is
    dy_RD or the tokens whose gradients its rows are.

    `weights_N` is float32, by entry; None is a weight of one.
    """
    rows, hidden = order.entry_N.shape[0], down_SDF.shape[2]
    d_h, out = into or (clippable(rows, 2 * hidden, down_SDF)[0], clippable(rows, hidden, down_SDF)[0])
    width = _width(hidden)
    n_tiles = cdiv(hidden, width)
    dots_PR = down_SDF.new_empty(n_tiles, rows, dtype=torch.float32)
    weights, slot_rows = stacked_rows(down_SDF, "down")
    right = blocks(weights, (DEPTH.value, width))
    _launch("d_hidden", width, order, slots_E, slot_rows, dy, right, out, hidden=hidden, n_tiles=n_tiles, h=d_h,
            h_in=h[HALF.value :], weights_N=weights_N, dots=dots_PR)  # fmt: skip
    return d_h, out[HALF.value :], dots_PR


def d_rows(
    d_h_RC: Tensor, gate_up_SCD: Tensor, slots_E: Tensor | None, order: ExpertOrder, into: Tensor | None = None
) -> Tensor:
    """d_x_RD."""
    columns = gate_up_SCD.shape[2]
    out = clippable(d_h_RC.shape[0], columns, d_h_RC)[0] if into is None else into
    width = _width(columns)
    weights, slot_rows = stacked_rows(gate_up_SCD, "gate_up")
    right = blocks(weights, (DEPTH.value, width))
    _launch("d_rows", width, order, slots_E, slot_rows, d_h_RC, right, out, hidden=0, n_tiles=cdiv(columns, width))
    return out[HALF.value :]


def _width(columns: int) -> int:
    return 256 if columns > 128 else 128


def _even_width(columns: int, order: ExpertOrder, device: torch.device) -> int:
    """With few tiles the narrower ones, where the multiprocessors then share the columns more evenly.

    The sums over the depth are the same with either, bit for bit.
    """
    experts, entries = order.counts_E.shape[0], order.entry_N.shape[0]
    # About how many tiles of rows there are; how many exactly only the GPU knows.
    tiles = max(min(experts, entries), entries // ROWS.value + experts // 2)
    turns = {n: cdiv(tiles * cdiv(columns, n), multiprocessors(device)) for n in (256, 128)}
    return 128 if 128 * turns[128] < 256 * turns[256] * NARROW_GAIN else 256


def gate_and_up(h: Tensor) -> tuple[Tensor, Tensor]:
    """Views of both halves of the columns, each with an end of its own, so that no block of one reaches into the other."""
    return h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]


def _launch(
    kind: str,
    width: int,
    order: ExpertOrder,
    slots_E: Tensor | None,
    slot_rows: int,
    left: Tensor | Tokens,
    right: TensorDescriptor,
    out: Tensor,
    *,
    hidden: int,
    n_tiles: int,
    h: Tensor | None = None,
    h_in: Tensor | None = None,
    weights_N: Tensor | None = None,
    dots: Tensor | None = None,
) -> None:
    half = (HALF.value, PIECE.value)
    matrix, top_k = (left.rows_TD, left.top_k) if isinstance(left, Tokens) else (left, 0)
    rows = order.entry_N.shape[0]
    kernel[(multiprocessors(out.device),)](
        None if top_k else blocks(matrix, half),
        right,
        *((None, None) if h_in is None else (blocks(part, half) for part in gate_and_up(h_in))),
        clipped(out, half),
        *((None, None) if h is None else (clipped(part, half) for part in gate_and_up(h))),
        *((matrix, matrix.stride(0)) if top_k else (None, 0)),
        weights_N,
        order.entry_N,
        dots,
        rows,
        order.num_tiles,
        order.tile_expert_M,
        order.tile_row_M,
        order.ends_E,
        slots_E,
        slot_rows,
        matrix.shape[1],
        hidden,
        n_tiles,
        KIND=kind,
        N=width,
        K=top_k,
        LAYOUT=swizzled(2),
        num_warps=4,
        **early(out.device, rows),
    )
