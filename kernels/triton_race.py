"""The race of kernels/race.py in two Triton kernels.

Shape letters: B rows, V vocabulary, P parts of a row. Each program races through a part of a row; the second kernel compares
the winners. What is compared are integers, the bits of a score above the complement of its token, so the first of equal scores
wins whatever the parts are.

Bounds: 4 B V bytes, read once, and some 30 operations a number with two logarithms: at B=128, V=32768 17 MB, 4 us at 4.2 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import begin, cdiv, early, next_power_of_2
from kernels.triton_log1p import log1p

BLOCK = 2048  # numbers that a program looks at together
PROGRAMS = 1024  # about as many are busy at once

LAST = tl.constexpr(0x7FFFFFFF)  # the largest complement of a token, which orders equal scores
LOWEST = tl.constexpr(-(2**63))  # below every key


def launch_race(logits_BV: Tensor, uids_B: Tensor, positions_B: Tensor, seed: int, temperature: float) -> Tensor:
    """kernels.race.race."""
    (rows, vocabulary), device = logits_BV.shape, logits_BV.device
    tokens_B = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return tokens_B
    span = BLOCK * cdiv(cdiv(vocabulary, BLOCK), max(1, PROGRAMS // rows))
    parts = cdiv(vocabulary, span)
    best_BP = torch.empty(rows, parts, dtype=torch.int64, device=device)
    assert logits_BV.dtype == torch.float32 and uids_B.dtype == positions_B.dtype == torch.int64
    _race_kernel[(rows, parts)](
        logits_BV,
        uids_B,
        positions_B,
        best_BP,
        *logits_BV.stride(),
        uids_B.stride(0),
        positions_B.stride(0),
        vocabulary,
        span,
        seed,
        temperature,
        BLOCK=BLOCK,
        num_warps=8,
        **early(device, rows),
    )
    _winner_kernel[(rows,)](best_BP, tokens_B, parts, PADDED=next_power_of_2(parts), **early(device, rows))
    return tokens_B


@triton.jit
def _mix64(x):  # type: ignore[no-untyped-def]
    """kernels.random_bits._mix64."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _bits(token, low, high):  # type: ignore[no-untyped-def]
    """kernels.random_bits.random_bits, of one row's key."""
    x = token * -0x61C88647 + low
    x ^= (x >> 16) & 0xFFFF
    x *= 0x21F0AAAD
    x ^= high
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x2CA5D269
    return x ^ ((x >> 15) & 0x1FFFF)


@triton.jit(do_not_specialize=["vocabulary", "span", "seed", "temperature"])
def _race_kernel(  # type: ignore[no-untyped-def]
    logits,
    uids,
    positions,
    best,
    row_stride,
    unit_stride,
    uid_stride,
    position_stride,
    vocabulary,
    span,
    seed,
    temperature,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    key = _mix64(tl.load(uids + row * uid_stride) * 0 + seed)
    key = _mix64(_mix64(key + tl.load(uids + row * uid_stride)) + tl.load(positions + row * position_stride))
    low, high = key.to(tl.int32), (key >> 32).to(tl.int32)
    first = tl.program_id(1) * span
    winner = tl.full([BLOCK], LOWEST, tl.int64)
    for start in range(first, tl.minimum(first + span, vocabulary), BLOCK):
        token = start + tl.arange(0, BLOCK)
        at = logits + row * row_stride + token.to(tl.int64) * unit_stride
        logit = tl.load(at, mask=token < vocabulary, other=0.0)
        uniform = ((_bits(token, low, high) & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10
        score = logit / temperature - tl.log(-log1p(-uniform))
        bits = score.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        mine = (ordered.to(tl.int64) << 32) | (token ^ LAST).to(tl.int64)
        winner = tl.maximum(winner, tl.where(token < vocabulary, mine, LOWEST))
    tl.store(best + row * tl.num_programs(1) + tl.program_id(1), tl.max(winner, axis=0))


@triton.jit(do_not_specialize=["parts"])
def _winner_kernel(best, tokens, parts, PADDED: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    begin(EARLY)
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    key = tl.max(tl.load(best + row * parts + part, mask=part < parts, other=LOWEST), axis=0)
    tl.store(tokens + row, (key & 0xFFFFFFFF) ^ LAST)
