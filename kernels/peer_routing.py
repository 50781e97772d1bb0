"""What the tokens of several ranks chose, read in place, and the rows that follow from it: every rank works out the same.

Shape letters: W ranks, C tokens of each that there is room for, V = W * C, K top-k, R rows that this rank serves, E experts.
This file is the reference in plain torch; CUDA takes kernels/triton_peer_routing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HEADER = 4  # int32 numbers in front; the first is how many tokens a rank has
FIELDS = 3  # of a choice: who serves it (int32), its expert (int32), its weight (float32)


@dataclass(frozen=True)
class PeerChoices:
    """The choices of each rank, at the beginning of its block: the header, then the fields, (C, K) each."""

    blocks: Sequence[Tensor]  # uint8, (W,) blocks that this device reads in place
    pointers_W: Tensor  # int64; where they begin, on the device
    capacity: int  # C
    top_k: int

    @property
    def nbytes(self) -> int:
        return 4 * (HEADER + FIELDS * self.capacity * self.top_k)

    def lay_out(self, rank: int, rank_TK: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> bool:
        """Writes those of this rank; where there are more than there is room for, only how many, and returns False."""
        tokens, numbers = rank_TK.shape[0], self.blocks[rank][: self.nbytes].view(torch.int32)
        numbers[:1].fill_(tokens)
        if tokens > self.capacity:
            return False
        fields = numbers[HEADER:].view(FIELDS, self.capacity, self.top_k)[:, :tokens]
        fields[0].copy_(rank_TK)
        fields[1].copy_(experts_TK)
        fields[2].view(torch.float32).copy_(weights_TK)
        return True


@dataclass(frozen=True)
class RowPlan:
    """A rank serves the tokens that chose it in the order of ranks, then of tokens."""

    row_WV: Tensor  # int32; the row of every rank's tokens at each rank that serves them, -1 elsewhere
    slots_VK: Tensor  # int32; by rows: which of this rank's experts serves each choice; -1 where it does not, and from row R on
    weights_VK: Tensor  # float32; by rows: the weights of choices served here; elsewhere anything
    numbers: Tensor  # int32, (2 + W,): the most tokens of a rank, the choices served here, the rows of each rank


def plan_rows(choices: PeerChoices, index_E: Tensor, rank: int) -> RowPlan:
    """`index_E` (int32): which of the experts on rank `rank` an expert is.

    If a rank has more tokens than there is room for, only `numbers[0]` is right.
    """
    if index_E.is_cuda:
        from kernels.triton_peer_routing import launch_plan  # here, because CPU machines may lack Triton

        return launch_plan(choices, index_E, rank)
    size, capacity, top_k = len(choices.blocks), choices.capacity, choices.top_k
    boards_WB = torch.stack([block[: choices.nbytes].view(torch.int32) for block in choices.blocks])
    tokens_W = boards_WB[:, 0]
    fields_WFCK = boards_WB[:, HEADER:].view(size, FIELDS, capacity, top_k)
    here_WC = torch.arange(capacity, device=index_E.device) < tokens_W.unsqueeze(1)
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
