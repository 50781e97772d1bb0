"""What the products on Hopper share: a ring of shared-memory stages between one producer and two consumers.

A block of three warp groups runs on each multiprocessor until the work is done. The producer has the tensor memory
accelerator load tiles of both operands into the ring; each consumer multiplies half of the left tile's rows, 64, by the whole
right tile and writes its results itself. `ready` says that a stage is loaded, `read` that both consumers are done with it.
Only the ring couples the consumers: one multiplies while the other writes its results, and the loads of the next tile run ahead
of both.

An operand may be rows of tokens instead of rows of entries. Then two more warps load it from where the tokens' rows are, with
copies of 16 bytes by each thread, since the accelerator of Hopper does not gather (SonicMoE, arXiv 2512.14080, section 4).

A ring is the tuple (left, right, ready, read); left is (2 * STAGES, .., ..): each consumer's half of a stage by itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.errors import UserError

HALF = gl.constexpr(64)  # rows of the left tile for each consumer
ROWS = gl.constexpr(128)  # of a left tile
DEPTH = gl.constexpr(64)  # of a step: 128 bytes of bfloat16, the width of the swizzle
PIECE = gl.constexpr(64)  # columns that leave a consumer at once
STAGES = gl.constexpr(4)  # all that shared memory holds beside the results on their way out
BUFFERS = gl.constexpr(2)  # for results, of each consumer
GROUP = gl.constexpr(16)  # row tiles that share column tiles, see `place`
WARPS = gl.constexpr((4, 1))  # of the second consumer and the producer; the first consumer has the kernel's own 4
REGISTERS = gl.constexpr((232, 40))  # of a thread; with the first consumer's 232 that is the whole register file
GATHERERS = gl.constexpr(2)  # warps that gather; registers are given to four warps at once, so the producer's are theirs, too
GATHERED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [GATHERERS.value, 1], [1, 0]))  # eight threads 128 bytes of a row
WARPS_WITH_GATHERERS = gl.constexpr((4, 1, GATHERERS.value))
REGISTERS_WITH_GATHERERS = gl.constexpr((232, 40, 40))


@gluon.jit
def begin(EARLY: gl.constexpr):
    """As kernels/launches.py, before the warps part."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@gluon.jit
def place(tile, m_tiles, n_tiles, GROUP: gl.constexpr):
    """(row tile, column tile) of a tile: GROUP row tiles go through all column tiles together.

    Blocks work on neighbours in this order at the same time, about 132 tiles of 128 x 256. As 16 row tiles by 8 column tiles
    they read the fewest rows and columns, 4096. With one row tile after the other, 28672 columns (Mixtral) would be read again
    for every 1.2 row tiles.
    """
    together = GROUP * n_tiles
    first = tile // together * GROUP
    rows = gl.minimum(m_tiles - first, GROUP)
    return first + tile % together % rows, tile % together // rows


@gluon.jit
def stage_of(step):
    """The stage of the ring that a step uses, and the parity of its use."""
    return step % STAGES, (step // STAGES) & 1


@gluon.jit
def allocate_ring(LEFT: gl.constexpr, RIGHT: gl.constexpr, layout: gl.constexpr, GATHERS: gl.constexpr):
    """The ring for half left tiles of shape LEFT and right tiles of shape RIGHT, and the result buffers of the consumers."""
    loads: gl.constexpr = 1 + 32 * GATHERERS if GATHERS else 1  # every thread that gathers says when its copies are done
    left = gl.allocate_shared_memory(gl.bfloat16, (2 * STAGES, LEFT[0], LEFT[1]), layout)
    right = gl.allocate_shared_memory(gl.bfloat16, (STAGES, RIGHT[0], RIGHT[1]), layout)
    results = gl.allocate_shared_memory(gl.bfloat16, (BUFFERS, HALF, PIECE), layout)
    others = gl.allocate_shared_memory(gl.bfloat16, (BUFFERS, HALF, PIECE), layout)
    ready = gl.allocate_shared_memory(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, (STAGES, 1), mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), loads)
        mbarrier.init(read.index(stage), 2)
    fence_async_shared()
    return (left, right, ready, read), results, others


@gluon.jit
def free_stage(ring, step):
    """(stage of `step` once both consumers are done with it, the barrier of its loads)."""
    stage, parity = stage_of(step)
    mbarrier.wait(ring[3].index(stage), parity ^ 1)
    return stage, ring[2].index(stage)


@gluon.jit
def acquire(ring, step, size: gl.constexpr):
    """(stage of `step` once both consumers are done with it, the barrier that `size` bytes of loads must complete)."""
    stage, ready = free_stage(ring, step)
    mbarrier.expect(ready, size)
    return stage, ready


@gluon.jit
def release(ring, step, wanted):
    """This consumer is done with the stage of `step`."""
    mbarrier.arrive(ring[3].index((step + STAGES) % STAGES), pred=wanted)


@gluon.jit
def await_stage(ring, step):
    stage, parity = stage_of(step)
    mbarrier.wait(ring[2].index(stage), parity)
    return stage


@gluon.jit
def drain(ring, step, steps):
    """Passes over the steps of a tile that this consumer has no rows in. Returns the next step."""
    for _ in range(steps):
        await_stage(ring, step)
        release(ring, step, True)
        step += 1
    return step


@gluon.jit
def multiply(ring, step, steps, SECOND: gl.constexpr, LEFT_COLUMNS: gl.constexpr, RIGHT_COLUMNS: gl.constexpr,
             N: gl.constexpr, GATHERS: gl.constexpr):  # fmt: skip
    """(this consumer's product over `steps` steps, (HALF, N) float32; the next step).

    LEFT_COLUMNS: left tiles lie as (DEPTH, HALF), the transpose of the operand. RIGHT_COLUMNS: right tiles lie as (DEPTH, N).
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    product = gl.zeros((HALF, N), gl.float32, layout)
    for i in range(steps):
        stage = await_stage(ring, step)
        if GATHERS:
            fence_async_shared()  # single-thread copies write as threads do, products read as the accelerator does
        left = ring[0].index(2 * stage + SECOND)
        right = ring[1].index(stage)
        if LEFT_COLUMNS:
            left = left.permute((1, 0))
        if not RIGHT_COLUMNS:
            right = right.permute((1, 0))
        running = warpgroup_mma(left, right, product, use_acc=i > 0, is_async=True)
        product = warpgroup_mma_wait(1, deps=(running,))
        release(ring, step - 1, i > 0)  # at most one product runs, so the one before has read its stage
        step += 1
    product = warpgroup_mma_wait(0, deps=(product,))
    release(ring, step - 1, steps > 0)
    return product, step


@gluon.jit
def halves(tile):
    """Columns [0, n/2) and [n/2, n) of a tile; no thread gives anything to another."""
    low, high = gl.split(gl.permute(gl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))
    return low, high


@gluon.jit
def beside(low, high):
    """The tile that `halves` takes apart."""
    return gl.reshape(gl.permute(gl.join(low, high), (0, 2, 1)), (low.shape[0], 2 * low.shape[1]))


@gluon.jit
def pieces_of(tile):
    """The tile's columns in pieces of PIECE: 2 or 4."""
    low, high = halves(tile)
    if tile.shape[1] == 2 * PIECE:
        return low, high
    else:
        first, second = halves(low)
        third, fourth = halves(high)
        return first, second, third, fourth


@gluon.jit
def send(buffer, desc, row, valid, column):
    """Writes the first `valid` rows of `buffer`, (HALF, PIECE), to the rows from `row` on of the matrix that `desc` clips."""
    tma.async_copy_shared_to_global(desc, [row + valid, HALF - valid, column], buffer.reshape((1, HALF, PIECE)))


@gluon.jit
def write(piece, buffer, desc, row, valid, column):
    buffer.store(piece.to(gl.bfloat16))
    fence_async_shared()
    send(buffer, desc, row, valid, column)


def clippable(rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(allocation, its last `rows` rows): a matrix whose parts the kernels can write or read up to any row, see `clipped`."""
    allocation = torch.empty(HALF.value + rows, columns, dtype=like.dtype, device=like.device)
    return allocation, allocation[HALF.value :]


def clipped(allocation: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A view of a `clippable` allocation for blocks of which only the first `valid` of HALF rows count.

    The hardware cuts blocks off only at the end of a dimension. So the view has two row dimensions with the same stride, the
    second one of HALF rows: a block at (row + valid, HALF - valid) lies at `row` of the matrix, HALF further in the allocation,
    and its rows from `valid` on are past the end of the second dimension: not written, and read as zeros.
    """
    rows, columns = allocation.shape
    stride = allocation.stride(0)
    return TensorDescriptor(allocation, [rows, HALF.value, columns], [stride, stride, 1], [1, *block], swizzled(3))


def blocks(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A view of a matrix for blocks; outside of it there are zeros."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block), swizzled(2))


@cache
def swizzled(rank: int) -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def stacked_rows(weights_SRC: Tensor, name: str) -> tuple[Tensor, int]:
    """(matrix of all rows of all slots, rows from one slot to the next). Slots may lie apart, by whole rows."""
    slots, rows, columns = weights_SRC.shape
    between, stride, unit = weights_SRC.stride()
    if unit != 1 or stride < columns or between % stride or stride % 8 or weights_SRC.data_ptr() % 16:
        raise UserError(
            f"{name} has strides {weights_SRC.stride()} at address {weights_SRC.data_ptr():#x}; the experts' kernels need "
            f"numbers of a row side by side, rows a multiple of 8 numbers and slots whole rows apart; call .contiguous()"
        )
    slot_rows = between // stride
    return weights_SRC.as_strided(((slots - 1) * slot_rows + rows, columns), (stride, 1)), slot_rows


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
