"""Routing replay: a token goes to the experts that were chosen for it before, weighted by the scores of the current weights.

Source: routing replay of GSPO (2507.18071, section 5.3) and rollout routing replay, R3 (2510.11370). If engine and trainer
round differently, or the weights have changed since a token was generated, the router of an MoE model picks other experts for
some tokens, and the ratio of such a token then compares two different networks.

Shape letters: T tokens, E experts, K top-k. Plain torch on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.router import Routing, Scores, counts_of, scores_of, weights_of


def record_dtype(num_experts: int) -> torch.dtype:
    """The smallest that holds every expert and one number more, `unrecorded`."""
    return torch.uint8 if num_experts < 256 else torch.int16


def unrecorded(dtype: torch.dtype) -> int:
    """What stands in place of an expert where nothing was recorded."""
    return torch.iinfo(dtype).max


def replay(
    logits_TE: Tensor,
    recorded_TK: Tensor,
    own: Routing,
    *,
    scores: Scores,
    renormalize: bool,
    scale: float,
    valid_T: Tensor | None,
) -> tuple[Routing, Tensor]:
    """The routing of `logits_TE` with the selection of `recorded_TK`, and what that changed.

    With s = scores(logits) and e_1..e_K the recorded experts of a token, whatever bias or groups chose them,

        weight_k = scale * s[e_k] / sum_j s[e_j]        without `renormalize`  weight_k = scale * s[e_k]

    The scores come from the whole row of live logits, so the gate gets the gradient that it would get had it chosen these
    itself; with softmax that is g_k = I_k exp(l_k) / sum_j I_j exp(l_j). The counts are those of the recorded experts: balance
    sees what was computed. A token whose record is `unrecorded` keeps its `own` routing. On a CPU a replay of the own selection
    is the own routing bit for bit, gradients too; on a GPU `route` takes a kernel, which may round the weights differently.

    `recorded_TK` is of `record_dtype`. Returns (routing, changed_T): float32, the share of a token's recorded experts that are
    not among its own.
    """
    known_T1 = recorded_TK[:, :1] != unrecorded(recorded_TK.dtype)
    experts_TK = torch.where(known_T1, recorded_TK.long(), own.experts_TK)
    found_TK = (experts_TK[:, :, None] == own.experts_TK[:, None, :]).any(dim=-1)
    if logits_TE.dtype != torch.float64:
        logits_TE = logits_TE.float()
    weights_TK = weights_of(scores_of(logits_TE, scores), experts_TK, renormalize, scale)
    counts_E = counts_of(experts_TK, logits_TE.shape[1], valid_T)
    return Routing(experts_TK, weights_TK, counts_E), (~found_TK).float().mean(dim=-1)
