"""Expert choice: experts take tokens, instead of tokens experts (Zhou et al., arXiv 2202.09368, section 3.2).

Every expert takes equally many of a batch's tokens, so the load is even without any balancing. Whether it takes a token
depends on the tokens after it too: this breaks the causality of a language model, lets the future leak into each token (by
Wang et al., arXiv 2408.15664, more than K log2((E - K) / K) bits a layer), and has no meaning where tokens are generated one
by one.

Shape letters: T tokens, E experts, K experts of a token on average, M at most. Sorts of the library on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import UserError
from kernels.router import SMALLEST_SUM, Routing, Scores, scores_of


def choose_tokens(
    logits_TE: Tensor, *, top_k: int, most_experts: int, scores: Scores, renormalize: bool, scale: float, valid_T: Tensor | None
) -> Routing:
    """Each expert takes the ceil(valid tokens * top_k / E) tokens of its largest scores; of equal ones the lower indices.

    `top_k` is the capacity factor of the paper. A token that more than `most_experts` took stays with those of its largest
    scores; most_experts = E leaves every expert what it took. The record has M = `most_experts` columns: a token's experts,
    the largest score first, then -1 with weights of 0; tokens that nobody took have none. Tokens where `valid_T` is False are
    not taken. Scores, `renormalize` and `scale` are those of router.route. One wait for the device, which counts the entries.
    """
    experts = logits_TE.shape[1]
    if not 1 <= top_k <= most_experts <= experts:
        raise UserError(
            f"{experts} experts cannot take tokens so that one has top_k={top_k} of them on average and "
            f"most_experts={most_experts} at most; choose 1 <= top_k <= most_experts <= {experts}"
        )
    if logits_TE.dtype != torch.float64:
        logits_TE = logits_TE.float()
    if valid_T is None:
        valid_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool)
    scores_TE = scores_of(logits_TE, scores)
    taken_TE = _taken(scores_TE.detach(), valid_T, top_k)
    by_score_TE = torch.where(taken_TE, scores_TE.detach(), -torch.inf)
    experts_TM = by_score_TE.sort(dim=1, descending=True, stable=True).indices[:, :most_experts]
    present_TM = taken_TE.gather(1, experts_TM)
    weights_TM = torch.where(present_TM, scores_TE.gather(1, experts_TM), 0.0)
    if renormalize:
        weights_TM = weights_TM / (weights_TM.sum(dim=1, keepdim=True) + SMALLEST_SUM)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=logits_TE.device)
    counts_E.scatter_add_(0, experts_TM.flatten(), present_TM.flatten().long())
    experts_TM = torch.where(present_TM, experts_TM, -1)
    return Routing(experts_TM, weights_TM * scale, counts_E, num_entries=int(present_TM.sum()))


def _taken(scores_TE: Tensor, valid_T: Tensor, top_k: int) -> Tensor:
    """(T, E) bool: which tokens each expert takes."""
    best_first_TE = torch.where(valid_T[:, None], scores_TE, -torch.inf).sort(dim=0, descending=True, stable=True).indices
    experts = scores_TE.shape[1]
    capacity = (valid_T.sum() * top_k + experts - 1) // experts
    within_T1 = (torch.arange(scores_TE.shape[0], device=scores_TE.device) < capacity)[:, None]
    taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    return taken_TE.scatter_(0, best_first_TE, within_T1.expand_as(scores_TE)) & valid_T[:, None]
