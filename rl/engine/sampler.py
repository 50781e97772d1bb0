"""Sampling with counter-based randomness: a token depends only on its logits and on (seed, uid, position).

So a sample gets the same tokens whatever else is in the batch, on which engine it runs, and whether it was interrupted.
There is no generator state to save. Shape letters: B samples, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.race import race
from trainer.config.rl import is_whole


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
        return is_whole(self.top_k, self.top_p, self.min_p)


class Drawn(NamedTuple):
    """A token for each of B rows, and its log-probabilities."""

    tokens_B: Tensor  # int64
    logprobs_B: Tensor  # float32; in the distribution drawn from
    whole_logprobs_B: Tensor | None  # float32; in the one before tokens were left out of it, None where none are

    def map(self, change: Callable[[Tensor], Tensor]) -> Drawn:
        whole_B = self.whole_logprobs_B
        return Drawn(change(self.tokens_B), change(self.logprobs_B), None if whole_B is None else change(whole_B))


def sample(logits_BV: Tensor, uids_B: Tensor, positions_B: Tensor, sampling: Sampling) -> Drawn:
    """Draws one token each. `logits_BV` is float32, `uids_B` and `positions_B` int64."""
    scaled_BV = logits_BV / sampling.temperature
    kept_BV = kept(scaled_BV, sampling)
    tokens_B = race(kept_BV, uids_B, positions_B, sampling.seed)
    chosen_B = scaled_BV.gather(1, tokens_B[:, None]).squeeze(1)
    whole_B = None if sampling.whole else chosen_B - scaled_BV.logsumexp(dim=-1)
    return Drawn(tokens_B, chosen_B - kept_BV.logsumexp(dim=-1), whole_B)


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
