"""A token for every row of logits, drawn by a race with counter-based noise, and the noise.

Shape letters: B rows, V vocabulary. The reference is plain torch; CUDA takes kernels/triton_race.py, which reads the logits
once where the reference writes a dozen arrays of their size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def race(logits_BV: Tensor, uids_B: Tensor, positions_B: Tensor, seed: int, temperature: float = 1.0) -> Tensor:
    """One token of each row, (B,) int64, drawn from softmax(logits / temperature); float32 logits, -inf for what may not be.

    argmax of logit / temperature - log e with e exponential, the Gumbel-max trick as a race of exponential clocks. Unlike an
    inverted cumulative sum it hardly ever changes its winner when logits differ in their last bits, as they do between engines.
    """
    if logits_BV.is_cuda:
        from kernels.triton_race import launch_race  # here, because CPU machines may lack Triton

        return launch_race(logits_BV, uids_B, positions_B, seed, temperature)
    noise_BV = exponential_noise(uids_B, positions_B, seed, logits_BV.shape[1])
    return (logits_BV / temperature - noise_BV.log_()).argmax(dim=-1)


def exponential_noise(uids_B: Tensor, positions_B: Tensor, seed: int, vocab_size: int) -> Tensor:
    """(B, V) float32 draws from the exponential distribution of mean 1, a pure function of the arguments."""
    bits_BV = random_bits(uids_B, positions_B, seed, vocab_size)
    uniform_BV = bits_BV.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    # log1p: the small draws decide the race, and 1 - u would round them. The rare u = 1 gives infinity and loses every race.
    return uniform_BV.neg_().log1p_().neg_()


def random_bits(uids_B: Tensor, positions_B: Tensor, seed: int, vocab_size: int) -> Tensor:
    """(B, V) int32, 32 random bits each: a 64-bit key of (seed, uid, position), and a 32-bit hash of key and token.

    The key is mixed by the finaliser of splitmix64 (Steele et al. 2014), the token by one of the "lowbias32" kind
    (C. Wellons' hash prospector); both words of the key go into the second. Integer products wrap around.
    """
    key_B = _mix64(torch.full_like(uids_B, seed))
    key_B = _mix64(_mix64(key_B + uids_B) + positions_B)
    low_B1, high_B1 = key_B.int()[:, None], (key_B >> 32).int()[:, None]
    tokens_V = torch.arange(vocab_size, dtype=torch.int32, device=uids_B.device)
    x_BV = tokens_V * _signed(0x9E3779B9, 32) + low_B1
    x_BV ^= (x_BV >> 16).bitwise_and_(0xFFFF)  # shifts of signed integers drag the sign along; the mask removes it
    x_BV *= _signed(0x21F0AAAD, 32)
    x_BV ^= high_B1
    x_BV ^= (x_BV >> 15).bitwise_and_(0x1FFFF)
    x_BV *= _signed(0xD35A2D97, 32)
    x_BV ^= (x_BV >> 15).bitwise_and_(0x1FFFF)
    return x_BV


def _mix64(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15, 64)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of an unsigned constant."""
    return value - (1 << bits) if value >> (bits - 1) else value
