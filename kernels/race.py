"""Draws a token for every row of logits, by a race (Gumbel maximum) with counter-based noise.

Shape letters: B rows, V vocabulary. The reference is plain torch; CUDA takes kernels/triton_race.py, which reads the logits
once where the reference writes a dozen arrays of their size.
"""

from __future__ import annotations

from torch import Tensor

from kernels.random_bits import uniform_numbers


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
    uniform_BV = uniform_numbers(uids_B, positions_B, seed, vocab_size)
    # log1p: the small draws decide the race, and 1 - u would round them. The rare u = 1 gives infinity and loses every race.
    return uniform_BV.neg_().log1p_().neg_()
