"""The kernel behind rows.py: all four products, in tiles of rows of one expert by columns of its matrix.

The left rows of `up` and `d_hidden` may be those of tokens: then they are gathered on the way into shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

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
    await_stage,
    begin,
    beside,
    drain,
    free_stage,
    halves,
    multiply,
    pieces_of,
    place,
    release,
    send,
    write,
)

LOG2_E = gl.constexpr(1.4426950408889634)
HALF_PIECE = gl.constexpr(32)


@gluon.jit
def sigmoid(x):
    """1 / (1 + e^-x) with the hardware's reciprocal, at most 1 ulp off."""
    divisor = 1.0 + gl.exp2(x * -LOG2_E)
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [divisor], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def locate(tiles, tile, m_tiles, n_tiles):
    """(column tile, expert, first row, rows of the expert from there on) of a tile."""
    m, n = place(tile, m_tiles, n_tiles, GROUP)
    expert = gl.load(tiles[1] + m)
    row = gl.load(tiles[2] + m)
    return n, expert, row, gl.load(tiles[3] + expert) - row


@gluon.jit
def load_left(ring, desc, stage, ready, row, column):
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(desc, [row + half * HALF, column], ready, ring[0].index(2 * stage + half))


@gluon.jit
def load_hidden(ring, gate_desc, up_desc, step, row, column):
    """Pre-activations of a piece come through the ring too: gates in place of the left tile, ups of the right one."""
    stage, ready = acquire(ring, step, 2 * ROWS * PIECE * 2)
    load_left(ring, gate_desc, stage, ready, row, column)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(up_desc, [row + half * HALF, column], ready, hidden_up(ring, stage, half))


@gluon.jit
def hidden_up(ring, stage, HALF_INDEX: gl.constexpr):
    return ring[1].index(stage)._reinterpret(gl.bfloat16, (2, HALF, PIECE), ring[0].type.layout).index(HALF_INDEX)


@gluon.jit
def producer(ring, loads, tiles, slots, slot_rows, depth, hidden, n_tiles, KIND: gl.constexpr, N: gl.constexpr,
             GATHERS: gl.constexpr):  # fmt: skip
    """`loads` is the views (left, right, gates, ups)."""
    m_tiles = gl.load(tiles[0])
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        n, expert, row, rows_left = locate(tiles, tile, m_tiles, n_tiles)
        slot = expert if slots is None else gl.load(slots + expert)
        slot_row = slot * slot_rows
        for k in range(0, depth, DEPTH):
            stage, ready = free_stage(ring, step)
            if GATHERS:
                mbarrier.expect(ready, N * DEPTH * 2)
            else:
                if rows_left > HALF:
                    mbarrier.expect(ready, (ROWS + N) * DEPTH * 2)
                    tma.async_copy_global_to_shared(loads[0], [row + HALF, k], ready, ring[0].index(2 * stage + 1))
                else:  # nobody multiplies the other half, and while decoding its way from the cache would count
                    mbarrier.expect(ready, (HALF + N) * DEPTH * 2)
                tma.async_copy_global_to_shared(loads[0], [row, k], ready, ring[0].index(2 * stage))
            right = ring[1].index(stage)
            if KIND == "up":
                gate_row = slot_row + n * (N // 2)
                tma.async_copy_global_to_shared(loads[1], [gate_row, k], ready, right.slice(0, N // 2))
                tma.async_copy_global_to_shared(loads[1], [gate_row + hidden, k], ready, right.slice(N // 2, N // 2))
            elif KIND == "down":
                tma.async_copy_global_to_shared(loads[1], [slot_row + n * N, k], ready, right)
            else:
                tma.async_copy_global_to_shared(loads[1], [slot_row + k, n * N], ready, right)
            step += 1
        if KIND == "d_hidden":
            for piece in gl.static_range(N // PIECE):
                load_hidden(ring, loads[2], loads[3], step, row, n * N + piece * PIECE)
                step += 1


@gluon.jit
def gatherer(ring, tokens, stride, entries, tiles, depth, n_tiles, KIND: gl.constexpr, N: gl.constexpr, K: gl.constexpr):
    """Loads the left tiles from the tokens' rows, `stride` numbers apart."""
    if tokens is not None:
        r = gl.arange(0, HALF, gl.SliceLayout(1, GATHERED))
        column = gl.arange(0, DEPTH, gl.SliceLayout(0, GATHERED)).to(gl.uint32)[None, :]
        m_tiles = gl.load(tiles[0])
        step = 0
        for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
            _, _, row, rows_left = locate(tiles, tile, m_tiles, n_tiles)
            # The last row again after the last one: nobody reads the results of what follows it.
            low = gl.load(entries + row + gl.minimum(r, rows_left - 1)).to(gl.uint32) // K
            high = gl.load(entries + row + gl.minimum(r + HALF, rows_left - 1)).to(gl.uint32) // K
            low_place = (low * stride)[:, None] + column
            high_place = (high * stride)[:, None] + column
            for k in range(0, depth, DEPTH):
                stage, ready = free_stage(ring, step)
                at = gl.cast(k, gl.uint32)  # added to the places first, so that no thread keeps sixteen addresses
                async_copy.async_copy_global_to_shared(ring[0].index(2 * stage), tokens + (low_place + at))
                if rows_left > HALF:
                    async_copy.async_copy_global_to_shared(ring[0].index(2 * stage + 1), tokens + (high_place + at))
                async_copy.mbarrier_arrive(ready, increment_count=False)
                step += 1
            if KIND == "d_hidden":
                for piece in gl.static_range(N // PIECE):  # noqa: B007 -- Triton gives _ one type
                    stage, ready = free_stage(ring, step)
                    async_copy.mbarrier_arrive(ready, increment_count=False)
                    step += 1


@gluon.jit
def store_rows(product, results, out_desc, row, valid, column):
    pieces = pieces_of(product)
    for piece in gl.static_range(len(pieces)):
        tma.store_wait(BUFFERS - 1)
        write(pieces[piece], results.index(piece % BUFFERS), out_desc, row, valid, column + piece * PIECE)


@gluon.jit
def store_swiglu(product, results, stores, row, valid, column, hidden):
    """Columns [0, N/2) of the product are gates, the others ups; `stores` is the views (out, gates, ups)."""
    low, high = halves(product)
    if product.shape[1] == 2 * PIECE:
        gates, ups = (low,), (high,)
    else:
        gates, ups = halves(low), halves(high)
    for piece in gl.static_range(len(gates)):
        at = column + piece * PIECE
        if at < hidden:
            gate = gates[piece].to(gl.bfloat16)
            up = ups[piece].to(gl.bfloat16)
            # The tile before may have ended with an odd number of results, and so in the buffer that comes first here.
            tma.store_wait(0 if piece == 0 else 1)
            write(gate, results.index(piece % BUFFERS), stores[1], row, valid, at)
            tma.store_wait(1)
            write(up, results.index((piece + 1) % BUFFERS), stores[2], row, valid, at)
            g = gate.to(gl.float32)  # rounded, as backward will see it
            activation = g * sigmoid(g) * up.to(gl.float32)
            tma.store_wait(1)
            write(activation, results.index(piece % BUFFERS), stores[0], row, valid, at)


@gluon.jit
def d_swiglu(gate, up, d_unweighted, weight, dot):
    """(d_gate, d_up, weight * activation), bfloat16, and `dot` plus the products of activation and its unweighted gradient."""
    g = gate.to(gl.float32)
    u = up.to(gl.float32)
    s = sigmoid(g)
    silu = g * s
    activation = silu * u
    d_activation = d_unweighted * weight
    d_gate = d_activation * u * (s + silu * (1.0 - s))
    d_up = d_activation * silu
    dot = gl.fma(d_unweighted, activation, dot)
    return d_gate.to(gl.bfloat16), d_up.to(gl.bfloat16), (activation * weight).to(gl.bfloat16), dot


@gluon.jit
def store_d_swiglu(product, ring, step, results, stores, weights, entries, dots, row, valid, column, hidden,
                   SECOND: gl.constexpr):  # fmt: skip
    """d_h over h in the ring's own stage, weight * a through the result buffers. Half a piece at a time, for the registers."""
    pieces = pieces_of(product)
    layout: gl.constexpr = halves(pieces[0])[0].type.layout
    r = gl.arange(0, HALF, gl.SliceLayout(1, layout))
    if weights is None:
        weight = gl.full((HALF, 1), 1.0, gl.float32, layout)
    else:
        entry = gl.load(entries + row + r, mask=r < valid, other=0)
        weight = gl.expand_dims(gl.load(weights + entry, mask=r < valid, other=0.0), 1)
    dot = gl.zeros((HALF, HALF_PIECE), gl.float32, layout)
    for piece in gl.static_range(len(pieces)):
        at = column + piece * PIECE
        stage = await_stage(ring, step)
        gate = ring[0].index(2 * stage + SECOND)
        up = hidden_up(ring, stage, SECOND)
        weighted = results.index(piece % BUFFERS)
        gates = halves(gate.load(pieces[piece].type.layout))
        ups = halves(up.load(pieces[piece].type.layout))
        parts = halves(pieces[piece])
        d_gate0, d_up0, weighted0, dot = d_swiglu(gates[0], ups[0], parts[0], weight, dot)
        d_gate1, d_up1, weighted1, dot = d_swiglu(gates[1], ups[1], parts[1], weight, dot)
        gate.store(beside(d_gate0, d_gate1))
        up.store(beside(d_up0, d_up1))
        weighted.store(beside(weighted0, weighted1))
        tma.store_wait(0)
        if piece > 0:
            release(ring, step - 1, True)
        if at < hidden:
            fence_async_shared()
            send(gate, stores[1], row, valid, at)
            send(up, stores[2], row, valid, at)
            send(weighted, stores[0], row, valid, at)
        step += 1
    gl.store(dots + r, gl.sum(dot, axis=1), mask=r < valid)
    tma.store_wait(0)
    release(ring, step - 1, True)
    return step


@gluon.jit
def consumer(SECOND: gl.constexpr, ring, results, stores, weights, entries, dots, rows, tiles, depth, hidden, n_tiles,
             KIND: gl.constexpr, N: gl.constexpr, GATHERS: gl.constexpr):  # fmt: skip
    m_tiles = gl.load(tiles[0])
    steps = gl.cdiv(depth, DEPTH)
    gl.assume(steps > 0)  # or the assembler cannot tell that the products before a result are done, and runs them one by one
    further: gl.constexpr = N // PIECE if KIND == "d_hidden" else 0
    step = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        n, _, row, left = locate(tiles, tile, m_tiles, n_tiles)
        row += SECOND * HALF
        valid = gl.minimum(left - SECOND * HALF, HALF)
        if valid > 0:
            columns: gl.constexpr = KIND == "d_hidden" or KIND == "d_rows"
            product, step = multiply(ring, step, steps, SECOND, False, columns, N, GATHERS)
            if KIND == "up":
                store_swiglu(product, results, stores, row, valid, n * (N // 2), hidden)
            elif KIND == "d_hidden":
                partial = dots + n.to(gl.int64) * rows + row
                step = store_d_swiglu(product, ring, step, results, stores, weights, entries, partial, row, valid, n * N,
                                      hidden, SECOND)  # fmt: skip
            else:
                store_rows(product, results, stores[0], row, valid, n * N)
        else:
            step = drain(ring, step, steps + further)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["num_tiles", "tile_expert", "tile_row", "ends", "slots"],
)
def kernel(left_desc, right_desc, gate_in_desc, up_in_desc, out_desc, gate_desc, up_desc, tokens, stride, weights, entries,
           dots, rows, num_tiles, tile_expert, tile_row, ends, slots, slot_rows, depth, hidden, n_tiles, KIND: gl.constexpr,
           N: gl.constexpr, K: gl.constexpr, LAYOUT: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    begin(EARLY)
    tiles = (num_tiles, tile_expert, tile_row, ends)
    loads = (left_desc, right_desc, gate_in_desc, up_in_desc)  # Triton does not launch with tuples of views
    stores = (out_desc, gate_desc, up_desc)
    right: gl.constexpr = (DEPTH, N) if KIND == "d_hidden" or KIND == "d_rows" else (N, DEPTH)
    gathers: gl.constexpr = tokens is not None
    ring, results, others = allocate_ring((HALF, DEPTH), right, LAYOUT, gathers)
    gl.warp_specialize(
        [
            (
                consumer,
                (0, ring, results, stores, weights, entries, dots, rows, tiles, depth, hidden, n_tiles, KIND, N, gathers),
            ),
            (
                consumer,
                (1, ring, others, stores, weights, entries, dots, rows, tiles, depth, hidden, n_tiles, KIND, N, gathers),
            ),
            (producer, (ring, loads, tiles, slots, slot_rows, depth, hidden, n_tiles, KIND, N, gathers)),
            (gatherer, (ring, tokens, stride, entries, tiles, depth, n_tiles, KIND, N, K)),
        ],
        WARPS_WITH_GATHERERS,
        REGISTERS_WITH_GATHERERS,
    )
