"""Sampling with counter-based randomness: a token depends on its logits and on (seed, uid, position), and on nothing else.

So a sample gets the same tokens whatever else is in the batch, on which engine it runs, and whether it was interrupted.
There is no generator state to save. Shape letters: B samples, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.random_bits import uniform_numbers


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: softmax(logits / temperature), and what of it is left out."""

    temperature: float
    seed: int  # of the noise
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float = 1.0  # only the likeliest tokens that make up this share (Holtzman et al., arXiv 1904.09751)
    min_p: float = 0.0  # only tokens at least this likely relative to the likeliest (Nguyen et al., arXiv 2407.01082)

    @property
    def whole(self) -> bool:
        """Whether nothing is left out, so that log-probabilities are the model's."""
        return self.top_k is None and self.top_p == 1 and self.min_p == 0


def sample(logits_BV: Tensor, uids_B: Tensor, positions_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draws one token each: (tokens int64, their log-probabilities float32 in the distribution drawn from), both (B,).

    `logits_BV` is float32, `uids_B` and `positions_B` int64. The draw is a race of exponential clocks, the Gumbel-max trick
    in another form: argmax of log p - log e with e exponential. Unlike an inverted cumulative sum it hardly ever changes its
    winner when logits differ in their last bits, as they do between engines.
    """
    scaled_BV = kept(logits_BV / sampling.temperature, sampling)
    race_BV = scaled_BV - exponential_noise(uids_B, positions_B, sampling.seed, logits_BV.shape[1]).log_()
    tokens_B = race_BV.argmax(dim=-1)
    chosen_B = scaled_BV.gather(1, tokens_B[:, None]).squeeze(1)
    return tokens_B, chosen_B - scaled_BV.logsumexp(dim=-1)


def kept(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The logits with -inf for what top-k, then top-p of the rest, then min-p leave out; equal logits stay or go together."""
    if sampling.top_k is not None:
        least_B1 = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV = logits_BV.sort(dim=-1, descending=True).values
        shares_BV = sorted_BV.softmax(dim=-1)
        before_BV = shares_BV.cumsum(dim=-1) - shares_BV  # of the likelier ones; the first token always stays
        least_B1 = sorted_BV.masked_fill(before_BV >= sampling.top_p, torch.inf).amin(dim=-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.min_p > 0:
        least_B1 = logits_BV.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    return logits_BV


def exponential_noise(uids_B: Tensor, positions_B: Tensor, seed: int, vocab_size: int) -> Tensor:
    """(B, V) float32 draws from the exponential distribution of mean 1, a pure function of the arguments."""
    uniform_BV = uniform_numbers(uids_B, positions_B, seed, vocab_size)
    # log1p: the small draws decide the race, and 1 - u would round them. The rare u = 1 gives infinity and loses every race.
    return uniform_BV.neg_().log1p_().neg_()
