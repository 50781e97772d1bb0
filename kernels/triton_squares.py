"""kernels/squares.py in one Triton kernel and a sum of what its programs found.

Bounds: 4 bytes a number, read once, and one conversion and one float64 multiplication and addition, of which a Hopper GPU does
far more than its memory brings numbers. Converted by torch, float64 copies of all gradients are written and read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import cdiv

BLOCK = 2048  # numbers that a program reads at once
STEPS = 16  # of them, one after the other


def launch_squares(gradient: Tensor) -> Tensor:
    """kernels.squares.squares."""
    experts, device = gradient.shape[0], gradient.device
    if not gradient.numel():
        return torch.zeros(experts, dtype=torch.float64, device=device)
    numbers = gradient.numel() // experts
    programs = cdiv(numbers, BLOCK * STEPS)
    partial = torch.empty(experts, programs, dtype=torch.float64, device=device)
    total = torch.empty(experts, dtype=torch.float64, device=device)
    _squares_kernel[(experts, programs)](gradient, partial, numbers, programs, BLOCK=BLOCK, STEPS=STEPS, num_warps=8)
    _sum_kernel[(experts,)](partial, total, programs, BLOCK=BLOCK, num_warps=4)
    return total


@triton.jit
def _squares_kernel(gradient, partial, numbers, programs, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program adds up STEPS blocks of one expert, lane by lane, and then its lanes."""
    expert = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * BLOCK * STEPS
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for step in range(STEPS):
        at = first + step * BLOCK + tl.arange(0, BLOCK)
        found = tl.load(gradient + expert * numbers + at, mask=at < numbers, other=0.0).to(tl.float64)
        total += found * found
    tl.store(partial + expert * programs + tl.program_id(1), tl.sum(total, axis=0))


@triton.jit
def _sum_kernel(partial, total, programs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the programs of one expert found, in the same order however many experts there are."""
    expert = tl.program_id(0).to(tl.int64)
    found = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, programs, BLOCK):
        at = first + tl.arange(0, BLOCK)
        found += tl.load(partial + expert * programs + at, mask=at < programs, other=0.0)
    tl.store(total + expert, tl.sum(found, axis=0))
