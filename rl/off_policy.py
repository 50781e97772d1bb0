"""How tokens from older weights, and from an engine that rounds differently than the trainer, enter the policy update.

Two policies matter besides the one being trained: `behaviour`, which sampled a token (under any weight version; its
log-probability was stored with the token), and `proximal`, the trainer's policy when the update starts. If top-k, top-p or
min-p excluded tokens, `behaviour` is the distribution that was sampled from and `whole` the policy before the exclusion;
otherwise they are equal. whole / behaviour is the share of probability that was kept. Pure functions of log-probabilities at
the rollout temperature, (B, S), or any shape where sequences play no role.

A loss uses two numbers per token, see `Ratios`. The choices of `algorithm.off_policy`:

    recompute   ratio policy / proximal, importance 1: as if the proximal policy had sampled everything (APRIL, slime)
    staged      ratio policy / trainer's policy of the version that generated the token, importance 1 (CoPRIS; rl/staged.py)
    mask        the same as recompute, and only tokens of the newest weights are learned; rl/packing.py leaves the others out
    bypass      ratio policy / whole, importance whole / behaviour: only the clip limits old tokens
    decoupled   ratio policy / proximal, importance min(proximal / behaviour, truncation) (AReaL, 2505.24298)

Masks set the importance of tokens or of sequences to 0. Masked tokens stay in the denominator of the mean loss.

With one update a round the proximal policy is the one being trained, so a ratio to it is 1 and never clipped: an old token then
has its full effect again, however far the updates since have already moved the policy. With bypass the clip acts when the
policy is clip_low or clip_high away from the one that sampled the token, as in PPO, however many updates lie between. So bypass
is the default; tests/benchmarks/rl.md has the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) is far beyond every clip and still finite, so a ratio that overflows cannot make the gradient inf * 0 = NaN
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Ratios:
    """`log_ratio`: of what the loss clips, with gradient. `importance`: factor of the loss, without gradient."""

    log_ratio: Tensor
    importance: Tensor


def bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def recompute(logprobs: Tensor, proximal: Tensor) -> Ratios:
    """PPO's ratio to the proximal policy, whoever sampled."""
    return Ratios(log_ratio=logprobs - proximal, importance=torch.ones_like(proximal))


def bypass(logprobs: Tensor, whole: Tensor, behaviour: Tensor) -> Ratios:
    """PPO's ratio straight to the policy that sampled, and the share that was kept of its distribution, else 1.

    Their product is policy / behaviour. But a clip of that would be about the share as well, and pass over fresh tokens.
    """
    return Ratios(log_ratio=logprobs - whole, importance=bounded_exp(whole - behaviour))


def decoupled(logprobs: Tensor, proximal: Tensor, behaviour: Tensor, truncation: float) -> Ratios:
    """PPO's ratio to the proximal policy, and a truncated importance weight for who sampled."""
    return Ratios(log_ratio=logprobs - proximal, importance=bounded_exp(proximal - behaviour).clamp(max=truncation))


# ---------------------------------------------------------------- masks: True is kept


def in_band(log_ratio: Tensor, band: tuple[float, float]) -> Tensor:
    """low <= exp(log_ratio) <= high.

    Of proximal / whole of a token, IcePop's mask; of its mean over a sequence, the geometric sequence mask.
    """
    ratio = bounded_exp(log_ratio)
    return (ratio >= band[0]) & (ratio <= band[1])


def not_unlikely(mean_gap: Tensor, advantages: Tensor, delta: float) -> Tensor:
    """DeepSeek-V3.2's off-policy sequence mask: drops where A < 0 and mean(whole - policy) > delta.

    To push down what the policy would hardly say any more teaches little and disturbs much.
    """
    return ~((advantages < 0) & (mean_gap > delta))


def sequence_mean(values_BS: Tensor, documents_BS: Tensor, learned_BS: Tensor) -> Tensor:
    """At every position the mean of `values_BS` over the learned positions of its document; 0 where there are none. (B, S)

    A document stands whole in one row, so rows need nothing of each other. A product with the members of each document sums
    in a fixed order on every device, which adding by index does not.
    """
    numbers_N = torch.arange(int(documents_BS.max()) + 1, device=documents_BS.device)
    members_BSN = (documents_BS[..., None] == numbers_N).double()
    learned_B1S = learned_BS.double()[:, None]
    sums_B1N = (values_BS.double()[:, None] * learned_B1S) @ members_BSN
    counts_B1N = learned_B1S @ members_BSN
    means_BSN = sums_B1N / counts_B1N.clamp(min=1) * members_BSN
    return means_BSN.sum(dim=-1).to(values_BS.dtype)
