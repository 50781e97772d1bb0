"""The router of an MoE layer: logits -> the K experts of every token, their combine weights, and what balances the load.

Shape letters: T tokens, E experts, K top-k, G groups of experts. The selection bias follows loss-free balancing (Wang et al.,
arXiv 2408.15664): it decides who is selected and never enters the output. Group-limited selection follows DeepSeek-V3
(arXiv 2412.19437, section 2.1.2), sqrt_softplus scores DeepSeek-V4, the z-loss ST-MoE (arXiv 2202.08906).

This file is the reference in plain torch; float32, bfloat16 and float16 logits on CUDA take kernels/triton_router.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kernels.errors import UserError
from kernels.sigmoid import sigmoid

Scores = Literal["softmax", "sigmoid", "sqrt_softplus"]

SMALLEST_SUM = 1e-20  # keeps the normalisation finite when every score of a sum has underflowed to zero
SQRT_SOFTPLUS_TAIL = -40.0  # below it sqrt(softplus(x)) is exp(x / 2) in float64 too, and has a derivative that never is 0 / 0
MAX_KERNEL_EXPERTS, MAX_KERNEL_TOP_K = 1024, 32  # the kernel holds the scores of a token in registers


@dataclass(frozen=True)
class Routing:
    """Where every token goes. Sums and loss exist only when asked for: route(auxiliary=True).

    Where experts choose tokens (kernels/expert_choice.py) a token has up to K experts; -1 after them, with weights of 0.
    """

    experts_TK: Tensor  # int64; K different experts a token, the highest biased score first
    weights_TK: Tensor  # float32; differentiable with respect to the logits
    counts_E: Tensor  # int64; entries that each expert got from valid tokens
    score_sums_E: Tensor | None = None  # float32, differentiable; sum over valid tokens of scores that sum to 1 per token
    z_loss: Tensor | None = None  # float32 scalar, differentiable; mean over valid tokens of logsumexp(logits)^2, 0 without any
    num_entries: int | None = None  # how many of the T * K are there; None: all


def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    scores: Scores,
    renormalize: bool,
    scale: float,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    num_groups: int = 1,
    top_groups: int = 1,
    auxiliary: bool = False,
) -> Routing:
    """Select the `top_k` experts with the largest score + bias and weigh them by their scores without the bias.

    The experts stand in `num_groups` equal groups; a group's score is the sum of its two best biased scores, and only experts
    of the `top_groups` best groups can be selected. Everything is computed in float32 (float64 logits stay float64). Among
    equal scores the lower index wins, on every device. Tokens where the bool tensor `valid_T` is False are routed too, but
    not counted. A token's experts and weights do not depend on the tokens beside it. No wait for the GPU.

    Raises UserError where no selection is possible.
    """
    _check(logits_TE, top_k, bias_E, valid_T, num_groups, top_groups)
    if num_groups == top_groups:
        num_groups = top_groups = 1
    if logits_TE.is_cuda and logits_TE.dtype != torch.float64:
        _check_kernel(logits_TE.shape[1], top_k, num_groups)
        from kernels.triton_router import route_with_kernels, settings_of  # here, because CPU machines may lack Triton

        settings = settings_of(
            logits_TE.shape[1], top_k, num_groups, top_groups, scores, renormalize, scale, auxiliary, SMALLEST_SUM
        )
        return Routing(*route_with_kernels(logits_TE, bias_E, valid_T, settings))
    if logits_TE.dtype != torch.float64:
        logits_TE = logits_TE.float()
    scores_TE = scores_of(logits_TE, scores)
    experts_TK = _selection(scores_TE.detach(), top_k, bias_E, num_groups, top_groups)
    weights_TK = weights_of(scores_TE, experts_TK, renormalize, scale)
    counts_E = counts_of(experts_TK, logits_TE.shape[1], valid_T)
    sums = _auxiliary(logits_TE, scores_TE, scores, valid_T) if auxiliary else (None, None)
    return Routing(experts_TK, weights_TK, counts_E, *sums)


def weights_of(scores_TE: Tensor, experts_TK: Tensor, renormalize: bool, scale: float) -> Tensor:
    weights_TK = scores_TE.gather(1, experts_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
    return weights_TK * scale


def scores_of(logits_TE: Tensor, scores: Scores) -> Tensor:
    if scores == "softmax":
        return logits_TE.softmax(dim=-1)
    if scores == "sigmoid":
        return sigmoid(logits_TE)
    body_TE = functional.softplus(logits_TE.clamp(min=SQRT_SOFTPLUS_TAIL), threshold=-SQRT_SOFTPLUS_TAIL).sqrt()
    tail_TE = (logits_TE.clamp(max=SQRT_SOFTPLUS_TAIL) / 2).exp()
    return torch.where(logits_TE < SQRT_SOFTPLUS_TAIL, tail_TE, body_TE)


def _selection(scores_TE: Tensor, top_k: int, bias_E: Tensor | None, num_groups: int, top_groups: int) -> Tensor:
    if bias_E is not None:
        scores_TE = scores_TE + bias_E.to(scores_TE.dtype)
    if num_groups > 1:
        by_group_TGe = scores_TE.unflatten(1, (num_groups, -1))
        groups_TG = _best_first(by_group_TGe.topk(2).values.sum(dim=-1))[:, :top_groups]
        kept_TG = torch.zeros_like(by_group_TGe[..., 0], dtype=torch.bool).scatter_(1, groups_TG, True)
        scores_TE = by_group_TGe.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(1)
    return _best_first(scores_TE)[:, :top_k].contiguous()


def _best_first(scores: Tensor) -> Tensor:
    # A stable sort, because torch.topk leaves the order of ties to the implementation.
    return scores.sort(dim=-1, descending=True, stable=True).indices


def counts_of(experts_TK: Tensor, num_experts: int, valid_T: Tensor | None) -> Tensor:
    entries_TK = torch.ones_like(experts_TK) if valid_T is None else valid_T[:, None].expand_as(experts_TK).long()
    # Integer sums: the same on every device, and unlike bincount without a wait for the GPU.
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_TK.device)
    return counts_E.scatter_add_(0, experts_TK.reshape(-1), entries_TK.reshape(-1))


def _auxiliary(logits_TE: Tensor, scores_TE: Tensor, scores: Scores, valid_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """(score_sums_E, z_loss)."""
    if valid_T is None:
        valid_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool)
    shares_TE = scores_TE
    if scores != "softmax":
        shares_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
    squares_T = logits_TE.logsumexp(dim=-1).square()
    score_sums_E = torch.where(valid_T[:, None], shares_TE, 0.0).sum(dim=0)
    return score_sums_E, torch.where(valid_T, squares_T, 0.0).sum() / valid_T.sum().clamp(min=1)


def _check_kernel(experts: int, top_k: int, num_groups: int) -> None:
    # Groups are padded to powers of two, in number and in size.
    padded = (1 << (num_groups - 1).bit_length()) * (1 << (experts // num_groups - 1).bit_length())
    if max(experts, padded) > MAX_KERNEL_EXPERTS or top_k > MAX_KERNEL_TOP_K:
        raise UserError(
            f"the router's kernel holds at most {MAX_KERNEL_EXPERTS} experts (groups padded to powers of two) and "
            f"top_k={MAX_KERNEL_TOP_K}; this is {experts} experts in {num_groups} groups ({padded} padded) with top_k={top_k}; "
            f"use fewer, or float64 logits, which take the reference"
        )


def _check(
    logits_TE: Tensor, top_k: int, bias_E: Tensor | None, valid_T: Tensor | None, num_groups: int, top_groups: int
) -> None:
    if logits_TE.ndim != 2:
        raise UserError(f"logits_TE has shape {tuple(logits_TE.shape)}; give it one row per token, one column per expert")
    tokens, experts = logits_TE.shape
    if not 1 <= num_groups <= experts or experts % num_groups:
        raise UserError(f"{experts} experts do not divide into num_groups={num_groups} groups; choose a divisor of {experts}")
    size = experts // num_groups
    if num_groups > 1 and size < 2:
        raise UserError(
            f"num_groups={num_groups} leaves 1 expert a group, but a group is judged by its two best; "
            f"choose at most {experts // 2} groups"
        )
    if not 1 <= top_groups <= num_groups:
        raise UserError(f"top_groups={top_groups} of num_groups={num_groups} groups cannot be kept; choose 1 to {num_groups}")
    if not 1 <= top_k <= top_groups * size:
        raise UserError(
            f"top_k={top_k} cannot be selected from {top_groups * size} experts "
            f"({top_groups} of {num_groups} groups of {size}); choose 1 to {top_groups * size}, or more top_groups"
        )
    if bias_E is not None and bias_E.shape != (experts,):
        raise UserError(f"bias_E has shape {tuple(bias_E.shape)}, but there are {experts} experts; give it one number each")
    if valid_T is not None and (valid_T.shape != (tokens,) or valid_T.dtype != torch.bool):
        raise UserError(
            f"valid_T is {valid_T.dtype} of shape {tuple(valid_T.shape)}; give it one bool for each of the {tokens} tokens"
        )
