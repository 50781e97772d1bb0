"""Auxiliary-loss-free load balancing: a selection bias that moves against the load.

Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv 2408.15664, section 3. The
bias is used in the choice of experts only, never in the combine weights. It is updated after each global batch from the loads
of that batch, so no token sees a bias that was computed from later tokens.

Letters: L MoE layers, E experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["sign", "proportional"]


def updated_bias(bias_LE: Tensor, counts_LE: Tensor, rule: Rule, rate: float) -> Tensor:
    """The bias after one global batch.

    Args:
        bias_LE: float32, the bias that routed the batch.
        counts_LE: tokens per expert, summed over all ranks and micro-batches.
        rule: `sign` moves every expert by `rate`; `proportional` by `rate` times its relative distance from the mean.
        rate: step of the bias, in units of the router's scores.

    Returns:
        A new tensor with mean zero in every layer: top-k does not see a common shift, and centring keeps it bounded.
    """
    counts_LE = counts_LE.to(torch.float32)
    mean_L1 = counts_LE.mean(dim=1, keepdim=True)
    missing_LE = mean_L1 - counts_LE
    direction_LE = missing_LE.sign() if rule == "sign" else missing_LE / mean_L1.clamp(min=1.0)
    moved_LE = bias_LE + rate * direction_LE
    return moved_LE - moved_LE.mean(dim=1, keepdim=True)


def max_violation(counts_LE: Tensor) -> Tensor:
    """MaxVio of each layer, (L,) float32: how far the busiest expert exceeds the mean load. 0 is perfect balance; E - 1 is
    collapse at top-1. A layer that no token passed has 0. (Wang et al., section 4.1.)"""
    counts_LE = counts_LE.to(torch.float32)
    mean_L = counts_LE.mean(dim=1)
    return torch.where(mean_L > 0, counts_LE.amax(dim=1) / mean_L.clamp(min=1e-9) - 1, torch.zeros_like(mean_L))


def balance_metrics(load_LE: Tensor) -> dict[str, float | list[list[float]]]:
    """What a run tells of the tokens per expert of an update, or of a round; `load_LE` is on the host."""
    violation_L = max_violation(load_LE)
    return {
        "moe/max_vio": float(violation_L.mean()),
        "moe/max_vio_worst_layer": float(violation_L.max()),
        "moe/dead_experts": int((load_LE == 0).sum()),
        "moe/load": [[round(share, 5) for share in row] for row in load_shares(load_LE).tolist()],
    }


def load_shares(counts_LE: Tensor) -> Tensor:
    """Each expert's share of its layer's tokens, (L, E) float32; rows sum to one."""
    counts_LE = counts_LE.to(torch.float32)
    return counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1.0)
