"""The router of an MoE layer: logits -> the K experts of every token and their combine weights.

Shape letters: T tokens, E experts, K top-k. The selection bias follows loss-free balancing (Wang et al., arXiv 2408.15664):
it decides who is selected and never enters the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Keeps the normalisation finite when every selected score has underflowed to zero.
SMALLEST_SUM = 1e-20


@dataclass(frozen=True)
class Routing:
    """Where every token goes."""

    experts_TK: Tensor  # int64; K different experts a token, the highest biased score first
    weights_TK: Tensor  # float32; differentiable with respect to the logits
    counts_E: Tensor  # int64; entries that each expert got from valid tokens


def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    scores: Literal["softmax", "sigmoid"],
    renormalize: bool,
    scale: float,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
) -> Routing:
    """Select the `top_k` experts with the largest score + bias and weigh them by their scores without the bias.

    Everything is computed in float32 (float64 logits stay float64). Among equal scores the lower expert index wins, on
    every device. Tokens where the bool tensor `valid_T` is False are routed too, but not counted.
    """
    if logits_TE.dtype != torch.float64:
        logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(dim=-1) if scores == "softmax" else logits_TE.sigmoid()
    experts_TK = _selection(scores_TE.detach(), top_k, bias_E)
    weights_TK = scores_TE.gather(1, experts_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
    if scale != 1.0:
        weights_TK = weights_TK * scale
    return Routing(experts_TK, weights_TK, _counts(experts_TK, logits_TE.shape[1], valid_T))


def _selection(scores_TE: Tensor, top_k: int, bias_E: Tensor | None) -> Tensor:
    if bias_E is not None:
        scores_TE = scores_TE + bias_E
    # A stable sort, because torch.topk leaves the order of ties to the implementation.
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()


def _counts(experts_TK: Tensor, num_experts: int, valid_T: Tensor | None) -> Tensor:
    entries_TK = torch.ones_like(experts_TK) if valid_T is None else valid_T[:, None].expand_as(experts_TK).long()
    # Integer sums: the same on every device, and unlike bincount without a wait for the GPU.
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_TK.device)
    return counts_E.scatter_add_(0, experts_TK.reshape(-1), entries_TK.reshape(-1))
