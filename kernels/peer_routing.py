"""The choices of several ranks' tokens, read in each rank's memory, and the rows that follow from them; all ranks compute the
same.

Shape letters: W ranks, C tokens of each that there is room for, T tokens of this one, V = W * C, K top-k, R rows that this rank
serves, E experts, D width. This file is the reference in plain torch; CUDA takes kernels/triton_peer_routing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.peers import FIELDS, HEADER, PeerChoices, PeerRows, RowPlan


def lay_out(
    choices: PeerChoices, rows: PeerRows, rank: int, rank_TK: Tensor, experts_TK: Tensor, weights_TK: Tensor, x_TD: Tensor
) -> bool:
    """Writes this rank's tokens and choices where all ranks read them; where there are more than there is room for, only how
    many, and returns False.

    Args:
        rank_TK: int32; who serves each choice.
        experts_TK: int64 or int32.
        weights_TK: float32.
    """
    tokens, numbers = x_TD.shape[0], choices.of_rank[rank]
    if tokens > choices.capacity:
        numbers[:1].fill_(tokens)
        return False
    if x_TD.is_cuda:
        from kernels.triton_peer_routing import launch_lay_out  # here, because CPU machines may lack Triton

        launch_lay_out(choices, rows, rank, rank_TK, experts_TK, weights_TK, x_TD)
        return True
    numbers[:1].fill_(tokens)
    fields_FCK = numbers[HEADER:].view(FIELDS, choices.capacity, choices.top_k)
    for field_CK, values_TK in zip(fields_FCK, (rank_TK, experts_TK, weights_TK.view(torch.int32)), strict=True):
        field_CK[:tokens].copy_(values_TK)
    rows.of_rank[rank][:tokens].copy_(x_TD)
    return True


def plan_rows(choices: PeerChoices, index_E: Tensor, rank: int) -> RowPlan:
    """`index_E` (int32): which of the experts on rank `rank` an expert is.

    If a rank has more tokens than there is room for, it has laid none of its choices out: they are not read, since what lies
    in their place may be anything, and only `numbers[0]` is right.
    """
    if index_E.is_cuda:
        from kernels.triton_peer_routing import launch_plan  # here, because CPU machines may lack Triton

        return launch_plan(choices, index_E, rank)
    size, capacity, top_k = len(choices.blocks), choices.capacity, choices.top_k
    boards_WB = torch.stack(choices.of_rank)
    tokens_W = boards_WB[:, 0]
    fields_WFCK = boards_WB[:, HEADER:].view(size, FIELDS, capacity, top_k)
    laid_W = torch.where(tokens_W > capacity, 0, tokens_W)
    here_WC = torch.arange(capacity, device=index_E.device) < laid_W.unsqueeze(1)
    ranks_VK = torch.where(here_WC.unsqueeze(2), fields_WFCK[:, 0], -1).view(-1, top_k)
    wants_WV = torch.stack([(ranks_VK == other).any(dim=1) for other in range(size)])
    row_WV = torch.where(wants_WV, wants_WV.cumsum(1) - 1, -1).int()
    served_VK = ranks_VK == rank
    experts_VK = torch.where(served_VK, fields_WFCK[:, 1].reshape(-1, top_k), 0)
    slot_VK = torch.where(served_VK, index_E[experts_VK], -1)
    slots_VK = torch.full_like(slot_VK, -1)
    weights_VK = fields_WFCK[:, 2].reshape(-1, top_k).view(torch.float32).clone()
    here_V = wants_WV[rank]
    rows = int(here_V.sum())
    slots_VK[:rows], weights_VK[:rows] = slot_VK[here_V], weights_VK[here_V]
    numbers = torch.cat([tokens_W.max().view(1), served_VK.sum().view(1), wants_WV.sum(1)])
    return RowPlan(row_WV, slots_VK, weights_VK, numbers.int())
