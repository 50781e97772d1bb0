"""Which rank serves which entry, where several ranks may hold an expert.

Shape letters: T tokens, K top-k, N = T * K entries, E experts, D devices. This file is the reference in plain torch; CUDA takes
kernels/triton_destinations.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.expert_order import ExpertOrder

JUST_BELOW_ONE = 1 - 1e-12


def destinations(experts_TK: Tensor, order: ExpertOrder | None, ends_ED: Tensor, phase_E: Tensor) -> Tensor:
    """The rank of each entry, (T, K) int32: the entries of an expert are dealt out in the proportion of the shares.

    Entry i of the n that this rank has for expert e goes where (i + phase) / n falls, so parts differ from the shares by less
    than one entry, and over ranks the phases even out.

    Args:
        experts_TK: int64 or int32; -1 for an entry that is absent, which goes to rank -1.
        order: of these entries; None where no expert has more than one share, so that all of its entries go the same way.
        ends_ED: float64, (E * D,) ascending; e + the sum of the shares of expert e up to a device.
        phase_E: float64, in [0, 1).
    """
    if experts_TK.is_cuda:
        from kernels.triton_destinations import launch_destinations  # here, because CPU machines may lack Triton

        return launch_destinations(experts_TK, order, ends_ED, phase_E, JUST_BELOW_ONE)
    devices = ends_ED.shape[0] // phase_E.shape[0]
    there_N = experts_TK.flatten() >= 0
    experts_N = experts_TK.flatten().long().clamp(min=0)
    at_N = phase_E[experts_N]
    if order is not None:
        starts_E = order.ends_E - order.counts_E
        rank_N = (order.place_N - starts_E[experts_N]).double()
        at_N = ((rank_N + at_N) / order.counts_E[experts_N].clamp(min=1)).clamp(0, JUST_BELOW_ONE)  # absent: anything
    found_N = torch.searchsorted(ends_ED, experts_N + at_N, right=True)
    return torch.where(there_N, found_N - experts_N * devices, -1).int().view(experts_TK.shape)
