"""BLEU on token ids: a pure function of batches, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def bleu(
    candidates_BT: Tensor, candidate_lengths_B: Tensor, references_BS: Tensor, reference_lengths_B: Tensor, max_order: int = 4
) -> Tensor:
    """BLEU of each candidate against its one reference, in [0, 1]; (B,) float32.

    BLEU = min(1, exp(1 - r / c)) * (p_1 * ... * p_N)^(1/N) for a candidate of c and a reference of r tokens, N = `max_order`
    (Papineni et al. 2002, https://aclanthology.org/P02-1040, sections 2.1 to 2.3). p_n is the share of the candidate's n-grams
    that are in the reference, each counted at most as often as there; for n > 1 both numbers of the share are one more (Lin and
    Och 2004, https://aclanthology.org/C04-1072, section 4), since single sentences often have no common 4-gram. A candidate
    without a token of the reference gets 0, a copy of the reference 1.

    Token ids are integers >= 0; what stands after the lengths is not looked at. Memory grows linearly with
    B * (T + S).
    """
    rows = torch.arange(len(candidates_BT), device=candidates_BT.device)
    size = 1 + max(int(tokens.max()) if tokens.numel() else 0 for tokens in (candidates_BT, references_BS))
    candidate, reference = _tokens(candidates_BT, candidate_lengths_B), _tokens(references_BS, reference_lengths_B)
    single = _numbered(rows[:, None] * size + candidate, rows[:, None] * size + reference)
    grams, log_precisions_B = single, torch.zeros(len(rows), device=rows.device)
    for order in range(1, max_order + 1):
        if order > 1:
            count = candidate.numel() + reference.numel()  # more than there are different tokens
            following = (torch.roll(ids, 1 - order, dims=1) for ids in single)
            grams = _numbered(*(ids * count + after for ids, after in zip(grams, following, strict=True)))
        common_B = _common(grams, (candidate_lengths_B, reference_lengths_B), order)
        total_B = (candidate_lengths_B - order + 1).clamp(min=0)
        more = int(order > 1)
        log_precisions_B += ((common_B + more) / (total_B + more)).nan_to_num(0.0).log()
    brevity_B = (1 - reference_lengths_B / candidate_lengths_B.clamp(min=1)).clamp(max=0)
    return (brevity_B + log_precisions_B / max_order).exp()


def _tokens(tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """The ids, with 0 after the lengths."""
    places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return torch.where(places < lengths_B[:, None], tokens_BT, 0)


def _numbered(candidate_BT: Tensor, reference_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Equal entries of both get the same number, counted from 0."""
    numbers = torch.unique(torch.cat([candidate_BT.flatten(), reference_BS.flatten()]), return_inverse=True)[1]
    return numbers[: candidate_BT.numel()].view_as(candidate_BT), numbers[candidate_BT.numel() :].view_as(reference_BS)


def _common(grams: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor], order: int) -> Tensor:
    """(B,) how many n-grams of each candidate are in its reference, each at most as often as there.

    A number stands for an n-gram of one row: the numbers of single tokens already differ from row to row.
    """
    size = 1 + max(int(ids.max()) if ids.numel() else 0 for ids in grams)
    counts, row_of = [], torch.zeros(size, dtype=torch.int64, device=grams[0].device)
    for ids_BT, lengths_B in zip(grams, lengths, strict=True):
        rows, places = torch.nonzero(torch.arange(ids_BT.shape[1], device=ids_BT.device) <= (lengths_B - order)[:, None]).T
        row_of[ids_BT[rows, places]] = rows
        counts.append(torch.bincount(ids_BT[rows, places], minlength=size))
    common = torch.zeros(len(lengths[0]), dtype=torch.int64, device=row_of.device)
    return common.index_add(0, row_of, torch.minimum(*counts))
