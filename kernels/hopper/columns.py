"""The gradients of the experts' matrices: products over the rows of each expert.

    out_SAB[slot of e] = left_RA[rows of e]^T @ right_RB[rows of e]

The products of the first experts may be added to float32 sums instead, without another pass over memory. Either operand may be
the rows of tokens: then they are gathered on the way into shared memory.

Shape letters: R rows sorted by expert, A and B columns, E experts, S slots. An expert without rows gets zeros.

Bounds at R = 262144, E = 128 (Qwen3-30B-A3B, 32768 tokens): A = 1536, B = 2048 takes 4RDF = 1.65 TFLOP, 2.10 ms at 785 TF/s;
bytes, each once, 2.7 GB: 0.64 ms at 4.2 TB/s. A = 2048, B = 768 the half. So the tensor cores bound both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, tma

from kernels.accumulate import Sum
from kernels.expert_order import ExpertOrder
from kernels.hopper.ring import (
    BUFFERS,
    DEPTH,
    GATHERED,
    GROUP,
    HALF,
    PIECE,
    REGISTERS_WITH_GATHERERS,
    ROWS,
    WARPS_WITH_GATHERERS,
    acquire,
    allocate_ring,
    blocks,
    clipped,
    free_stage,
    multiply,
    multiprocessors,
    pieces_of,
    place,
    stacked_rows,
    swizzled,
)
from kernels.launches import cdiv
from kernels.rows import Tokens

WIDTH = 256


@gluon.jit
def tile_at(turn):
    """Tiles are sorted by size and blocks take them to and fro: the largest of one turn, the smallest of the next."""
    count = gl.num_programs(0)
    block = gl.program_id(0)
    return turn * count + (block if turn % 2 == 0 else count - 1 - block)


@gluon.jit
def locate(experts, tile, m_tiles, n_tiles):
    """(expert, row tile, column tile); `experts` is (by load, counts, ends)."""
    m, n = place(tile % (m_tiles * n_tiles), m_tiles, n_tiles, GROUP)
    return gl.load(experts[0] + tile // (m_tiles * n_tiles)), m, n


@gluon.jit
def producer(ring, left_desc, right_desc, experts, num_tiles, m_tiles, n_tiles, N: gl.constexpr):
    """Loads the operands that have views; the others are gathered."""
    size: gl.constexpr = ((0 if left_desc is None else ROWS) + (0 if right_desc is None else N)) * DEPTH * 2
    step = 0
    for turn in range(gl.cdiv(num_tiles, gl.num_programs(0))):
        tile = tile_at(turn)
        if tile < num_tiles:
            expert, m, n = locate(experts, tile, m_tiles, n_tiles)
            end = gl.load(experts[2] + expert)
            for row in range(end - gl.load(experts[1] + expert).to(gl.int32), end, DEPTH):
                stage, ready = acquire(ring, step, size)
                if left_desc is not None:
                    valid = gl.minimum(end - row, DEPTH)  # rows of the next expert come as zeros
                    for half in gl.static_range(2):
                        left = ring[0].index(2 * stage + half).reshape((1, DEPTH, HALF))
                        at = [row + valid, DEPTH - valid, m * ROWS + half * HALF]
                        tma.async_copy_global_to_shared(left_desc, at, ready, left)
                if right_desc is not None:
                    tma.async_copy_global_to_shared(right_desc, [row, n * N], ready, ring[1].index(stage))
                step += 1


@gluon.jit
def gatherer(ring, tokens, stride, width, entries, experts, num_tiles, m_tiles, n_tiles, N: gl.constexpr, K: gl.constexpr,
             LEFT: gl.constexpr):  # fmt: skip
    """Loads left or right tiles from the tokens' rows, `stride` numbers apart; rows of the next expert come as zeros."""
    if tokens is not None:
        r = gl.arange(0, DEPTH, gl.SliceLayout(1, GATHERED))
        c = gl.arange(0, PIECE, gl.SliceLayout(0, GATHERED))
        step = 0
        for turn in range(gl.cdiv(num_tiles, gl.num_programs(0))):
            tile = tile_at(turn)
            if tile < num_tiles:
                expert, m, n = locate(experts, tile, m_tiles, n_tiles)
                column = m * ROWS if LEFT else n * N
                end = gl.load(experts[2] + expert)
                start = end - gl.load(experts[1] + expert).to(gl.int32)
                last = gl.maximum(end - 1, 0)
                token = gl.load(entries + gl.minimum(start + r, last)).to(gl.uint32) // K
                for row in range(start, end, DEPTH):
                    place = token.to(gl.int32) * stride
                    # Those of the next step, while this one waits for its stage.
                    token = gl.load(entries + gl.minimum(row + DEPTH + r, last)).to(gl.uint32) // K
                    stage, ready = free_stage(ring, step)
                    source = (tokens + column + place)[:, None] + c[None, :]
                    for piece in gl.static_range((ROWS if LEFT else N) // PIECE):
                        if column + piece * PIECE < width:
                            if LEFT:
                                to = ring[0].index(2 * stage + piece)
                            else:
                                to = ring[1].index(stage).slice(piece * PIECE, PIECE, dim=1)
                            if row + DEPTH <= end:
                                async_copy.async_copy_global_to_shared(to, source + piece * PIECE)
                            else:
                                there = (row + r < end)[:, None]
                                async_copy.async_copy_global_to_shared(to, source + piece * PIECE, mask=there)
                    async_copy.mbarrier_arrive(ready, increment_count=False)
                    step += 1


@gluon.jit
def add(piece, sums, column, columns, FRESH: gl.constexpr):
    """Adds (HALF, PIECE) numbers to those of rows `columns` long from `column` on. Every thread adds its own: pairs of a row,
    four threads beside each other, so whole sectors of memory."""
    layout: gl.constexpr = piece.type.layout
    row = gl.arange(0, HALF, gl.SliceLayout(1, layout))
    n = gl.arange(0, PIECE, gl.SliceLayout(0, layout))
    at = sums + column + (row[:, None] * columns + n[None, :])
    there = (n < columns - column)[None, :]
    if not FRESH:
        piece += gl.load(at, mask=there, other=0.0)
    gl.store(at, piece, mask=there)


@gluon.jit
def send_out(product, results, out_desc, row, column):
    pieces = pieces_of(product)
    for piece in gl.static_range(len(pieces)):
        tma.store_wait(BUFFERS - 1)
        buffer = results.index(piece % BUFFERS)
        buffer.store(pieces[piece].to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [row, column + piece * PIECE], buffer)


@gluon.jit
def consumer(SECOND: gl.constexpr, ring, results, out_desc, experts, slots, slot_rows, sums, num_tiles, m_tiles, n_tiles,
             height, columns, N: gl.constexpr, FRESH: gl.constexpr, GATHERS: gl.constexpr):  # fmt: skip
    step = 0
    for turn in range(gl.cdiv(num_tiles, gl.num_programs(0))):
        tile = tile_at(turn)
        if tile < num_tiles:
            expert, m, n = locate(experts, tile, m_tiles, n_tiles)
            steps = gl.cdiv(gl.load(experts[1] + expert).to(gl.int32), DEPTH)
            slot = expert if slots is None else gl.load(slots + expert)
            product, step = multiply(ring, step, steps, SECOND, True, True, N, GATHERS)
            row = m * ROWS + SECOND * HALF
            if row < height:
                if sums[0] is None:
                    send_out(product, results, out_desc, slot * slot_rows + row, n * N)
                elif expert < sums[1]:
                    rows = sums[0] + (expert.to(gl.int64) * height + row) * columns
                    pieces = pieces_of(product)
                    for piece in gl.static_range(len(pieces)):
                        add(pieces[piece], rows, n * N + piece * PIECE, columns, FRESH)
                else:
                    send_out(product, results, out_desc, (expert - sums[1]) * slot_rows + row, n * N)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["summed", "num_tiles"], do_not_specialize_on_alignment=["by_load", "counts", "ends", "slots"])
def kernel(left_desc, right_desc, tokens, stride, entries, out_desc, by_load, counts, ends, slots, slot_rows, totals, summed,
           num_tiles, m_tiles, n_tiles, height, columns, N: gl.constexpr, K: gl.constexpr, FRESH: gl.constexpr,
           LAYOUT: gl.constexpr):  # fmt: skip
    experts, sums = (by_load, counts, ends), (totals, summed)  # in a tuple Triton would look at numbers and alignment again
    gathers: gl.constexpr = tokens is not None
    ring, results, others = allocate_ring((DEPTH, HALF), (DEPTH, N), LAYOUT, gathers)
    left: gl.constexpr = left_desc is None
    gl.warp_specialize(
        [
            (consumer, (0, ring, results, out_desc, experts, slots, slot_rows, sums, num_tiles, m_tiles, n_tiles, height,
                        columns, N, FRESH, gathers)),
            (consumer, (1, ring, others, out_desc, experts, slots, slot_rows, sums, num_tiles, m_tiles, n_tiles, height,
                        columns, N, FRESH, gathers)),
            (producer, (ring, left_desc, right_desc, experts, num_tiles, m_tiles, n_tiles, N)),
            (gatherer, (ring, tokens, stride, height if left else columns, entries, experts, num_tiles, m_tiles, n_tiles, N, K,
                        left)),
        ],
        WARPS_WITH_GATHERERS,
        REGISTERS_WITH_GATHERERS,
    )  # fmt: skip


def d_weights(
    left: Tensor | Tokens,
    right: Tensor | Tokens,
    num_slots: int,
    slots_E: Tensor | None,
    order: ExpertOrder,
    sums: Sum | None = None,
) -> Tensor:
    """out_SAB in bfloat16; `left` is left_RA as a `clippable` allocation, `right` right_RB, or one of them the tokens that its
    rows are. Slots that no expert has get zeros.

    With `sums` the gradients of as many experts as those have, the first ones, are added there in float32, and what is returned
    begins with the expert after them; `slots_E` is None then.
    """
    tokens = next((side for side in (left, right) if isinstance(side, Tokens)), None)
    a, b = (side.rows_TD if isinstance(side, Tokens) else side for side in (left, right))
    height, columns, num_experts = a.shape[1], b.shape[1], order.counts_E.shape[0]
    summed = 0 if sums is None else len(sums.total_EAB)
    if sums is not None:
        assert slots_E is None and sums.total_EAB.shape == (summed, height, columns), sums.total_EAB.shape
        assert sums.total_EAB.dtype == torch.float32 and sums.total_EAB.is_contiguous(), sums.total_EAB.dtype
    fresh = torch.empty if slots_E is None else torch.zeros
    out_SAB = fresh(max(num_slots - summed, 1), height, columns, dtype=a.dtype, device=a.device)
    width = WIDTH if columns > 128 else 128
    m_tiles, n_tiles = cdiv(height, ROWS.value), cdiv(columns, width)
    matrix, slot_rows = stacked_rows(out_SAB, "the gradient")
    kernel[(multiprocessors(a.device),)](
        None if tokens is left else clipped(a, (DEPTH.value, HALF.value)),
        None if tokens is right else blocks(b, (DEPTH.value, width)),
        *((None, 0) if tokens is None else (tokens.rows_TD, tokens.rows_TD.stride(0))),
        order.entry_N,
        blocks(matrix, (HALF.value, PIECE.value)),
        order.by_load_E,
        order.counts_E,
        order.ends_E,
        slots_E,
        slot_rows,
        None if sums is None else sums.total_EAB,
        summed,
        num_experts * m_tiles * n_tiles,
        m_tiles,
        n_tiles,
        height,
        columns,
        N=width,
        K=0 if tokens is None else tokens.top_k,
        FRESH=sums is not None and sums.fresh,
        LAYOUT=swizzled(2),
        num_warps=4,
    )
    return out_SAB[: num_slots - summed]
