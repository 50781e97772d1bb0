"""Randomness without a state: numbers that are a pure function of a seed and of their position, on every device.

A recomputation draws the same numbers, on any rank and in any batch, and there is no generator to save.
Shape letters: B places, V numbers at each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_bits(uids_B: Tensor, positions_B: Tensor, seed: int, width: int) -> Tensor:
    """(B, V) int32, 32 random bits each: a 64-bit key of (seed, uid, position), and a 32-bit hash of key and column.

    The key is mixed by the finaliser of splitmix64 (Steele et al. 2014), the column by one of the "lowbias32" kind
    (C. Wellons' hash prospector); both words of the key go into the second. Integer products wrap around.
    """
    key_B = _mix64(torch.full_like(uids_B, seed))
    key_B = _mix64(_mix64(key_B + uids_B) + positions_B)
    low_B1, high_B1 = key_B.int()[:, None], (key_B >> 32).int()[:, None]
    columns_V = torch.arange(width, dtype=torch.int32, device=uids_B.device)
    x_BV = columns_V * _signed(0x9E3779B9, 32) + low_B1
    x_BV ^= (x_BV >> 16).bitwise_and_(0xFFFF)  # shifts of signed integers drag the sign along; the mask removes it
    x_BV *= _signed(0x21F0AAAD, 32)
    x_BV ^= high_B1
    x_BV ^= (x_BV >> 15).bitwise_and_(0x1FFFF)
    x_BV *= _signed(0xD35A2D97, 32)
    x_BV ^= (x_BV >> 15).bitwise_and_(0x1FFFF)
    return x_BV


def uniform_numbers(uids_B: Tensor, positions_B: Tensor, seed: int, width: int) -> Tensor:
    """(B, V) float32 in (0, 1], of 31 bits each before rounding."""
    bits_BV = random_bits(uids_B, positions_B, seed, width)
    return bits_BV.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)


def normal_numbers(uids_B: Tensor, positions_B: Tensor, seed: int, width: int) -> Tensor:
    """(B, V) float32 of the standard normal distribution, by Box and Muller's transform (1958); none is beyond 6.7."""
    first_BV, second_BV = uniform_numbers(uids_B, positions_B, seed, 2 * width).chunk(2, dim=1)
    return (-2 * first_BV.log()).sqrt_() * (2 * math.pi * second_BV).cos_()


def _mix64(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15, 64)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of an unsigned constant."""
    return value - (1 << bits) if value >> (bits - 1) else value
