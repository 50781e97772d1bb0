"""The experts of one MoE layer: order -> dispatch -> experts -> combine, on one device or over all ranks.

The gate stands in the model (its weight is a dense parameter); what it decides arrives here as a `Routing`.
Letters: T tokens, K top-k, N = T * K entries, R rows received, D model, F expert hidden, C = 2F, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.expert_mlp import combine, expert_mlp, sorted_rows
from kernels.expert_order import expert_order
from kernels.router import Routing
from parallel.token_exchange import ExchangePlan, collect, dispatch, plan_exchange
from parallel.topology import World


@dataclass(frozen=True)
class LocalExperts:
    """All experts of a layer on this device."""

    gate_up_ECD: Tensor
    down_EDF: Tensor

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        order = expert_order(routing.experts_TK, self.gate_up_ECD.shape[0])
        return expert_mlp(x_TD, order, routing.weights_TK, self.gate_up_ECD, self.down_EDF)


@dataclass(frozen=True)
class ParallelExperts:
    """This rank's equal share of a layer's experts: rank r of W owns r * E/W .. (r+1) * E/W - 1. All ranks call it together."""

    gate_up_ECD: Tensor  # E is the rank's own number of experts here
    down_EDF: Tensor
    world: World

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        local_experts, top_k = self.gate_up_ECD.shape[0], routing.experts_TK.shape[1]
        order = expert_order(routing.experts_TK, local_experts * self.world.size)
        plan = plan_exchange(order.counts_E, self.world)
        rows_RD = dispatch(sorted_rows(x_TD, order.entry_N, top_k), plan)
        received = expert_order(received_experts(plan), local_experts)
        rows_ND = collect(expert_mlp(rows_RD, received, None, self.gate_up_ECD, self.down_EDF), plan)
        return combine(rows_ND, order.place_N, top_k, routing.weights_TK)


def received_experts(plan: ExchangePlan) -> Tensor:
    """The local expert of each received row, (R, 1); they come sorted by source rank, then by expert."""
    ranks, local_experts = plan.received_counts_WE.shape
    experts_WE = torch.arange(local_experts, device=plan.received_counts_WE.device).repeat(ranks)
    counts = plan.received_counts_WE.flatten()
    return experts_WE.repeat_interleave(counts, output_size=sum(plan.receive_W)).unsqueeze(1)
