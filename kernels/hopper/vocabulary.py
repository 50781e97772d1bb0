"""Log-probabilities over a vocabulary from hidden states and the head, and their gradient, without the logits in memory.

Shape letters: T tokens, D model, V vocabulary, N columns of a tile, W columns of a chunk. Logits live in the registers of the
product that makes them, scaled to base 2: z = hidden . head * log2(e) / temperature. Forward keeps of each row of each tile the
largest z, m, and the sums of 2^(z - m) and of (z - m) 2^(z - m), and a second kernel adds those up in a fixed order (online
softmax, Milakov and Gimelshein, arXiv 1805.02867, over tiles instead of steps). Backward makes the logits of a chunk of the
vocabulary again and turns them into their gradient. A row's result does not depend on the other rows.

Bounds at T = 8192, D = 2048, V = 151936 on an H200 at 785 TF/s and 4.2 TB/s: forward 2TDV = 5.1 TFLOP, 6.5 ms, against 0.75 GB,
0.18 ms; backward three times the operations (logits, both products), 19.5 ms. So the tensor cores bound both.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from kernels.hopper.ring import (
    BUFFERS,
    DEPTH,
    HALF,
    PIECE,
    REGISTERS,
    ROWS,
    WARPS,
    acquire,
    allocate_ring,
    blocks,
    multiply,
    multiprocessors,
    pieces_of,
    place,
    swizzled,
)
from kernels.launches import cdiv

WIDTH = 256
GROUP = gl.constexpr(64)  # row tiles that go through all columns together; at D = 2048 their 34 MB stay in the L2 cache
NOTHING = gl.constexpr(-1e30)  # the logit of columns past the vocabulary; finite, so that nothing times it is nothing
REDUCE_TOKENS, REDUCE_TILES = 32, 64


@gluon.jit
def producer(ring, hidden_desc, head_desc, m_tiles, n_tiles, first_column, depth, N: gl.constexpr):
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = place(tile, m_tiles, n_tiles, GROUP)
        row = m * ROWS
        column = first_column + n * N
        for k in range(0, depth, DEPTH):
            stage, ready = acquire(ring, step, (ROWS + N) * DEPTH * 2)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(hidden_desc, [row + half * HALF, k], ready, ring[0].index(2 * stage + half))
            tma.async_copy_global_to_shared(head_desc, [column, k], ready, ring[1].index(stage))
            step += 1


@gluon.jit
def logits_of(piece, column, vocabulary, scale):
    """(z of a piece, its columns)."""
    c = column + gl.arange(0, PIECE, gl.SliceLayout(0, piece.type.layout))
    return gl.where(gl.expand_dims(c < vocabulary, 0), piece * scale, NOTHING), c


@gluon.jit
def statistics(product, partials, target_logit, targets, n, row, rows, vocabulary, scale, N: gl.constexpr):
    """m and both sums of each row's columns, to (3, tiles, T) `partials`; the target's z if it is here."""
    pieces = pieces_of(product)
    layout: gl.constexpr = gl.SliceLayout(1, pieces[0].type.layout)
    r = row + gl.arange(0, HALF, layout)
    target = gl.load(targets + r, mask=r < rows, other=-1).to(gl.int32)
    here = (target >= n * N) & (target < gl.minimum(n * N + N, vocabulary))  # the last tile reaches past the vocabulary
    largest = gl.full((HALF,), NOTHING, gl.float32, layout)
    for piece in gl.static_range(len(pieces)):
        z, _ = logits_of(pieces[piece], n * N + piece * PIECE, vocabulary, scale)
        largest = gl.maximum(largest, gl.max(z, axis=1))
    if gl.max(here.to(gl.int32), axis=0) > 0:  # few tiles hold any row's target
        chosen = gl.zeros((HALF,), gl.float32, layout)
        for piece in gl.static_range(len(pieces)):
            z, c = logits_of(pieces[piece], n * N + piece * PIECE, vocabulary, scale)
            chosen += gl.sum(gl.where(gl.expand_dims(target, 1) == gl.expand_dims(c, 0), z, 0.0), axis=1)
        gl.store(target_logit + r, chosen, mask=here)
    total = gl.zeros((HALF,), gl.float32, layout)
    weighted = gl.zeros((HALF,), gl.float32, layout)
    for piece in gl.static_range(len(pieces)):
        z, _ = logits_of(pieces[piece], n * N + piece * PIECE, vocabulary, scale)
        below = z - gl.expand_dims(largest, 1)
        e = gl.exp2(below)
        total += gl.sum(e, axis=1)
        weighted += gl.sum(below * e, axis=1)
    at = gl.cast(n, gl.int64) * rows + r
    between = gl.cast(gl.cdiv(vocabulary, N), gl.int64) * rows
    gl.store(partials + at, largest, mask=r < rows)
    gl.store(partials + between + at, total, mask=r < rows)
    gl.store(partials + 2 * between + at, weighted, mask=r < rows)


@gluon.jit
def gradient(product, constants, results, out_desc, targets, column, out_column, row, rows, scale, N: gl.constexpr):
    """dz in bfloat16. `constants` (4, T): log2 of the sum, and a, b, c of dz = p (a (z - log2 sum) + b) + c at the target."""
    layout: gl.constexpr = pieces_of(product)[0].type.layout
    r = row + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    inside = r < rows
    log_sum = gl.expand_dims(gl.load(constants + r, mask=inside, other=0.0), 1)
    slope = gl.expand_dims(gl.load(constants + rows + r, mask=inside, other=0.0), 1)
    offset = gl.expand_dims(gl.load(constants + 2 * rows + r, mask=inside, other=0.0), 1)
    at_target = gl.expand_dims(gl.load(constants + 3 * rows + r, mask=inside, other=0.0), 1)
    target = gl.expand_dims(gl.load(targets + r, mask=inside, other=-1).to(gl.int32), 1)
    pieces = pieces_of(product)
    for piece in gl.static_range(len(pieces)):
        c = column + piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(0, layout))
        d = pieces[piece] * scale - log_sum
        dz = gl.exp2(d) * (d * slope + offset)
        dz = gl.where(target == gl.expand_dims(c, 0), dz + at_target, dz)
        tma.store_wait(BUFFERS - 1)
        buffer = results.index(piece % BUFFERS)
        buffer.store(dz.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [row, out_column + piece * PIECE], buffer)


@gluon.jit
def consumer(SECOND: gl.constexpr, ring, results, out_desc, partials, target_logit, constants, targets, m_tiles, n_tiles,
             first_column, depth, rows, vocabulary, scale, N: gl.constexpr):  # fmt: skip
    steps = gl.cdiv(depth, DEPTH)
    gl.assume(steps > 0)
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = place(tile, m_tiles, n_tiles, GROUP)
        row = m * ROWS + SECOND * HALF
        product, step = multiply(ring, step, steps, SECOND, False, False, N, False)
        if constants is None:
            statistics(product, partials, target_logit, targets, n, row, rows, vocabulary, scale, N)
        else:
            gradient(product, constants, results, out_desc, targets, first_column + n * N, n * N, row, rows, scale, N)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["m_tiles", "n_tiles", "first_column", "depth", "rows", "vocabulary"])
def kernel(hidden_desc, head_desc, out_desc, partials, target_logit, constants, targets, m_tiles, n_tiles, first_column, depth,
           rows, vocabulary, scale, N: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Statistics of the logits where `constants` is None, else their gradient."""
    ring, results, others = allocate_ring((HALF, DEPTH), (N, DEPTH), LAYOUT, False)
    gl.warp_specialize(
        [
            (consumer, (0, ring, results, out_desc, partials, target_logit, constants, targets, m_tiles, n_tiles, first_column,
                        depth, rows, vocabulary, scale, N)),
            (consumer, (1, ring, others, out_desc, partials, target_logit, constants, targets, m_tiles, n_tiles, first_column,
                        depth, rows, vocabulary, scale, N)),
            (producer, (ring, hidden_desc, head_desc, m_tiles, n_tiles, first_column, depth, N)),
        ],
        WARPS,
        REGISTERS,
    )  # fmt: skip


# Without specialization, because Triton chooses the layout, and with it the order of sums, by what it knows of the arguments.
@triton.jit(do_not_specialize=["rows", "tiles"])
def reduce_kernel(partials, target_logit, logprobs, entropy, log_sum, rows, tiles, TOKENS: tl.constexpr, TILES: tl.constexpr):
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = row < rows
    between = tl.cast(tiles, tl.int64) * rows
    most = tl.full([TOKENS], -1e30, tl.float32)  # finite, so that nothing times it is nothing
    total = tl.zeros([TOKENS], tl.float32)
    weighted = tl.zeros([TOKENS], tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)[:, None]
        at = tile.to(tl.int64) * rows + row[None, :]
        mask = (tile < tiles) & inside[None, :]
        largest = tl.load(partials + at, mask=mask, other=-1e30)
        a = tl.load(partials + between + at, mask=mask, other=0.0)
        b = tl.load(partials + 2 * between + at, mask=mask, other=0.0)
        new = tl.maximum(most, tl.max(largest, axis=0))
        fall, falls = most - new, largest - new[None, :]
        weighted = (weighted + fall * total) * tl.exp2(fall) + tl.sum((b + falls * a) * tl.exp2(falls), axis=0)
        total = total * tl.exp2(fall) + tl.sum(a * tl.exp2(falls), axis=0)
        most = new
    total = tl.where(inside, total, 1.0)
    bits = most + tl.log2(total)
    z = tl.load(target_logit + row, mask=inside, other=0.0)
    tl.store(log_sum + row, bits, mask=inside)
    tl.store(logprobs + row, (z - bits) * 0.6931471805599453, mask=inside)
    tl.store(entropy + row, (tl.log2(total) - weighted / total) * 0.6931471805599453, mask=inside)


def statistics_of(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), entropy, both in nats; log2 of the sum of 2^z), (T,) float32."""
    tokens, vocabulary = hidden_TD.shape[0], head_VD.shape[0]
    tiles = cdiv(vocabulary, WIDTH)
    partials = hidden_TD.new_empty(3, tiles, tokens, dtype=torch.float32)
    logprobs_T, entropy_T, log_sum_T = hidden_TD.new_empty(3, tokens, dtype=torch.float32)
    target_logit_T = torch.full_like(logprobs_T, math.nan)  # what a target outside of the vocabulary keeps
    _launch(hidden_TD, head_VD, targets_T, temperature, 0, tiles, None, partials=partials, target_logit_T=target_logit_T)
    reduce_kernel[(cdiv(tokens, REDUCE_TOKENS),)](
        partials, target_logit_T, logprobs_T, entropy_T, log_sum_T, tokens, tiles, TOKENS=REDUCE_TOKENS, TILES=REDUCE_TILES
    )
    return logprobs_T, entropy_T, log_sum_T


def logit_gradients(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float, constants_4T: Tensor, first: int, out_TW: Tensor
) -> None:
    """The gradient of the unscaled logits of columns first .. first + W into `out_TW`; past the vocabulary there is anything.

    `constants_4T` as in `gradient`.
    """
    tiles = cdiv(out_TW.shape[1], WIDTH)
    _launch(hidden_TD, head_VD, targets_T, temperature, first, tiles, out_TW, constants_4T=constants_4T)


def chunk_width(tokens: int, vocabulary: int, most_bytes: int) -> int:
    """W: columns of like chunks of the vocabulary whose gradient takes at most about `most_bytes` in bfloat16."""
    most = max(1, most_bytes // (2 * tokens * WIDTH))
    tiles = cdiv(vocabulary, WIDTH)
    return WIDTH * cdiv(tiles, cdiv(tiles, most))


def _launch(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    temperature: float,
    first: int,
    tiles: int,
    out_TW: Tensor | None,
    *,
    partials: Tensor | None = None,
    target_logit_T: Tensor | None = None,
    constants_4T: Tensor | None = None,
) -> None:
    tokens, hidden = hidden_TD.shape
    kernel[(multiprocessors(hidden_TD.device),)](
        blocks(hidden_TD, (HALF.value, DEPTH.value)),
        blocks(head_VD, (WIDTH, DEPTH.value)),
        blocks(hidden_TD if out_TW is None else out_TW, (HALF.value, PIECE.value)),
        partials,
        target_logit_T,
        constants_4T,
        targets_T,
        cdiv(tokens, ROWS.value),
        tiles,
        first,
        hidden,
        tokens,
        head_VD.shape[0],
        math.log2(math.e) / temperature,
        N=WIDTH,
        LAYOUT=swizzled(2),
        num_warps=4,
    )
