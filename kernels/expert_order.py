"""The order in which (token, choice) entries lie beside their expert.

Shape letters: T tokens, K top-k, N = T * K entries, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertOrder:
    """Entries sorted by expert; entry t * K + k is choice k of token t."""

    order_N: Tensor  # int64; the entry at each place of the sorted list
    counts_E: Tensor  # int64; entries of each expert, those of invalid tokens included; sums to N


def expert_order(experts_TK: Tensor, num_experts: int) -> ExpertOrder:
    """Sort the entries of `experts_TK` (int64, 0 <= expert < num_experts) by expert, entries of one expert in token order."""
    experts_N = experts_TK.reshape(-1)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_N.device)
    counts_E.scatter_add_(0, experts_N, torch.ones_like(experts_N))
    return ExpertOrder(order_N=experts_N.argsort(stable=True), counts_E=counts_E)
