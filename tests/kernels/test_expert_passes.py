"""Rows in any parts, other ones forward and backward, give the same bits; and what `expert_mlp` gives in one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.accumulate import Sum
from kernels.expert_mlp import expert_mlp
from kernels.expert_order import ExpertOrder, expert_order, parts_of
from kernels.expert_passes import ArenaExperts, BackwardPass, ForwardPass
from tests.kernels.test_expert_mlp import Case, different_experts, gpu, needs_hopper, without

SLOTS = 3  # more than there are experts


def in_an_arena(case: Case) -> ArenaExperts:
    """Experts from the last slot on down."""
    parts = (case.gate_up_ECD, case.down_EDF)
    gate_up_SCD, down_SDF = (torch.cat([part.new_full((SLOTS, *part.shape[1:]), 9.0), part.flip(0)]) for part in parts)
    experts = case.down_EDF.shape[0]
    slots_E = torch.arange(experts - 1, -1, -1, dtype=torch.int32, device=case.x_TD.device) + SLOTS
    return ArenaExperts(gate_up_SCD, down_SDF, slots_E)


def passes(case: Case, d_y_TD: Tensor, order: ExpertOrder, starts: list[list[int]]) -> list[Tensor]:
    """y, the gradients of tokens and weights, and those of the matrices, for which pre-activations are computed again.
    `starts`: where parts begin, forward and backward."""
    rows, experts, place_TK = case.x_TD.shape[0], in_an_arena(case), order.place_N.view(case.experts_TK.shape)
    weights_TK = case.weights_TK.float()

    def parted(begin: list[int]) -> list[tuple[slice, ExpertOrder]]:
        ends = [*begin[1:], rows]
        part_R = torch.repeat_interleave(torch.tensor([end - start for start, end in zip(begin, ends, strict=True)]))
        orders = parts_of(order, case.experts_TK, part_R.to(case.x_TD.device), len(begin))
        return [(slice(start, end), part) for start, end, part in zip(begin, ends, orders, strict=True)]

    ahead = ForwardPass(order.entry_N.shape[0], experts, case.x_TD)
    y = [ahead.rows(case.x_TD[here], place_TK[here], weights_TK[here], part) for here, part in parted(starts[0])]
    again = ForwardPass(order.entry_N.shape[0], experts, case.x_TD)
    for here, part in parted(starts[0]):
        again.hidden_of_rows(case.x_TD[here], place_TK[here], part)
    back = BackwardPass(order, again.h, weights_TK, experts)
    found = [back.rows(d_y_TD[here], place_TK[here], part) for here, part in parted(starts[1])]
    return [torch.cat(y), *map(torch.cat, zip(*found, strict=True)), *back.weights(case.x_TD, place_TK)]


def in_place(case: Case, d_y_TD: Tensor, order: ExpertOrder, sums: tuple[Sum, Sum] | None = None) -> list[Tensor]:
    """The same with all rows at once, and results that are written where the caller says."""
    experts, weights_TK = in_an_arena(case), case.weights_TK.float()
    y_TD, d_x_TD = (torch.full_like(case.x_TD, torch.nan) for _ in range(2))
    d_weights_TK = torch.full_like(weights_TK, torch.nan)
    ahead = ForwardPass(order.entry_N.shape[0], experts, case.x_TD)
    ahead.whole(case.x_TD, weights_TK, order, y_TD)
    again = ForwardPass(order.entry_N.shape[0], experts, case.x_TD)
    again.hidden_of_whole(case.x_TD, weights_TK.shape[1], order)
    back = BackwardPass(order, again.h, weights_TK, experts, lambda: sums, d_y_TD)
    dots_PN = back.hidden(order)
    d_down = back.down()
    back.tokens(order.place_N.view(weights_TK.shape), dots_PN, order, (d_x_TD, d_weights_TK))
    return [y_TD, d_x_TD, d_weights_TK, back.gate_up(case.x_TD), d_down]


def check(case: Case, starts: list[list[int]], share: float, tolerance: float) -> None:
    absent_TK = torch.rand(case.experts_TK.shape, generator=torch.Generator().manual_seed(3)) < share
    case = without(case, absent_TK.to(case.x_TD.device))
    order = expert_order(case.experts_TK, case.down_EDF.shape[0], num_entries=int((case.experts_TK >= 0).sum()))
    d_y_TD = torch.randn(case.x_TD.shape, generator=torch.Generator().manual_seed(5)).to(case.x_TD)
    whole, cut = passes(case, d_y_TD, order, [[0], [0]]), passes(case, d_y_TD, order, starts)
    for one, other, written in zip(cut, whole, in_place(case, d_y_TD, order), strict=True):
        assert torch.equal(one, other) and torch.equal(written, other)
    case = replace(case, weights_TK=case.weights_TK.masked_fill(case.experts_TK < 0, 0))  # where autograd multiplies by zero
    inputs = [part.clone().requires_grad_() for part in (case.x_TD, case.weights_TK, case.gate_up_ECD, case.down_EDF)]
    y_TD = expert_mlp(inputs[0], order, *inputs[1:])
    for found, wanted in zip(whole, [y_TD, *torch.autograd.grad(y_TD, inputs, d_y_TD)], strict=True):
        torch.testing.assert_close(found.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance)


parts = st.lists(st.integers(0, 40), min_size=0, max_size=5)


def begins(cuts: list[int], rows: int) -> list[int]:
    return [0, *sorted(min(cut, rows) for cut in cuts)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(1, 6), st.sampled_from([0.0, 0.5, 1.0]), parts, parts, st.integers(0, 99))
def test_any_parts_give_the_same_bits(
    rows: int, experts: int, share: float, ahead: list[int], back: list[int], seed: int
) -> None:
    routing = different_experts(rows, experts, min(2, experts), seed)
    case = Case.draw(routing, experts, 16, 8, seed).to("cpu", torch.float32)
    check(case, [begins(ahead, rows), begins(back, rows)], share, 1e-5)


@gpu
@needs_hopper
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("rows", [7, 1000])
def test_kernels_give_the_same_bits_in_any_parts(rows: int, share: float) -> None:
    case = Case.draw(different_experts(rows, 8, 4, 0), 8, 128, 96).to("cuda", torch.bfloat16)
    check(case, [[0, rows // 3, rows // 3, rows - 1], [0, 5]], share, 2e-2)


@gpu
@needs_hopper
@pytest.mark.parametrize("summed", [3, 8])
def test_kernels_add_gradients_of_the_first_experts_to_sums(summed: int) -> None:
    case = Case.draw(different_experts(700, 8, 4, 0), 8, 128, 96).to("cuda", torch.bfloat16)
    order, d_y_TD = expert_order(case.experts_TK, 8), torch.ones_like(case.x_TD)
    totals = [torch.zeros(summed, *part.shape[1:], device="cuda") for part in (case.gate_up_ECD, case.down_EDF)]
    *tokens, gate_up, down = in_place(case, d_y_TD, order)
    *again, others_gate_up, others_down = in_place(case, d_y_TD, order, tuple(Sum(total, fresh=False) for total in totals))
    for one, other in zip(again, tokens, strict=True):
        assert torch.equal(one, other)
    for total, others, whole in zip(totals, (others_gate_up, others_down), (gate_up, down), strict=True):
        assert torch.equal(others, whole[summed:])
        torch.testing.assert_close(total.bfloat16(), whole[:summed], rtol=2**-7, atol=1e-6)
