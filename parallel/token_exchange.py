"""Moving tokens to the ranks of their experts and back: an all-to-all that autograd can walk backwards.

Letters: N entries (token, k) of this rank, sorted by expert; R entries that this rank receives; D model; W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.topology import World


@dataclass(frozen=True)
class ExchangePlan:
    """How many rows go where. Backward uses the same plan the other way round."""

    send_W: list[int]  # rows to each rank
    receive_W: list[int]  # rows from each rank
    received_counts_WE: Tensor  # (W, local experts): rows from each rank for each of this rank's experts


def plan_exchange(counts_E: Tensor, world: World) -> ExchangePlan:
    """Tells every rank how many rows to expect. `counts_E`: this rank's entries for each expert of all ranks, (E,) int64."""
    counts_WE = counts_E.view(world.size, -1)
    received_WE = torch.empty_like(counts_WE)
    dist.all_to_all_single(received_WE, counts_WE.contiguous())
    sizes = torch.stack([counts_WE.sum(dim=1), received_WE.sum(dim=1)]).tolist()  # the one host sync of a layer
    return ExchangePlan(send_W=sizes[0], receive_W=sizes[1], received_counts_WE=received_WE)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND: Tensor, send_W: list[int], receive_W: list[int]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.send_W, ctx.receive_W = send_W, receive_W
        received_RD = rows_ND.new_empty(sum(receive_W), rows_ND.shape[1])
        dist.all_to_all_single(received_RD, rows_ND.contiguous(), receive_W, send_W)
        return received_RD

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        grad_ND = grad_RD.new_empty(sum(ctx.send_W), grad_RD.shape[1])
        dist.all_to_all_single(grad_ND, grad_RD.contiguous(), ctx.send_W, ctx.receive_W)
        return grad_ND, None, None


def dispatch(rows_ND: Tensor, plan: ExchangePlan) -> Tensor:
    """Rows to the ranks of their experts: (N, D) sorted by expert -> (R, D) sorted by source rank, then expert."""
    return _AllToAll.apply(rows_ND, plan.send_W, plan.receive_W)


def collect(rows_RD: Tensor, plan: ExchangePlan) -> Tensor:
    """The way back of `dispatch`: (R, D) -> (N, D), in the order in which the rows left."""
    return _AllToAll.apply(rows_RD, plan.receive_W, plan.send_W)
