"""The selection bias moves against the load, stays centred, and balances a skewed router."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.router import route
from parallel.balance import Rule, load_shares, max_violation, updated_bias

RULES = get_args(Rule)
counts = st.integers(2, 12).flatmap(
    lambda experts: st.lists(st.lists(st.integers(0, 500), min_size=experts, max_size=experts), min_size=1, max_size=4)
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(counts, st.sampled_from(RULES), st.floats(1e-4, 0.5), st.integers(0, 99))
def test_overloaded_experts_fall_behind_underloaded_ones(table: list[list[int]], rule: Rule, rate: float, seed: int) -> None:
    counts_LE = torch.tensor(table)
    bias_LE = torch.randn(counts_LE.shape, generator=torch.Generator().manual_seed(seed))
    moved_LE = updated_bias(bias_LE, counts_LE, rule, rate) - bias_LE
    mean_L1 = counts_LE.float().mean(dim=1, keepdim=True)
    for moved_E, over_E, under_E in zip(moved_LE, counts_LE > mean_L1, counts_LE < mean_L1, strict=True):
        if over_E.any():  # then some expert is below the mean as well
            assert moved_E[over_E].max() < moved_E[under_E].min()
        else:
            torch.testing.assert_close(moved_E, moved_E.mean().expand_as(moved_E), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(counts, st.sampled_from(RULES))
def test_the_bias_stays_centred(table: list[list[int]], rule: Rule) -> None:
    counts_LE = torch.tensor(table)
    bias_LE = updated_bias(torch.zeros(counts_LE.shape), counts_LE, rule, 0.1)
    torch.testing.assert_close(bias_LE.mean(dim=1), torch.zeros(len(table)), rtol=0, atol=1e-6)


def test_sign_moves_by_the_rate_and_proportional_by_the_relative_distance() -> None:
    counts_LE = torch.tensor([[30, 10, 20, 20]])
    bias_LE = torch.zeros(1, 4)
    torch.testing.assert_close(updated_bias(bias_LE, counts_LE, "sign", 0.1), torch.tensor([[-0.1, 0.1, 0.0, 0.0]]))
    torch.testing.assert_close(updated_bias(bias_LE, counts_LE, "proportional", 0.1), torch.tensor([[-0.05, 0.05, 0.0, 0.0]]))


def test_max_violation_by_hand() -> None:
    counts_LE = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(max_violation(counts_LE), torch.tensor([0.0, 3.0, 0.0]))
    torch.testing.assert_close(load_shares(counts_LE).sum(dim=1), torch.tensor([1.0, 1.0, 0.0]))


def routed_counts(logits_TE: Tensor, bias_E: Tensor) -> Tensor:
    routing = route(logits_TE, top_k=2, scores="sigmoid", renormalize=True, scale=1.0, bias_E=bias_E, valid_T=None)
    return routing.counts_E


@pytest.mark.parametrize(("rule", "rate"), [("sign", 0.01), ("proportional", 0.05)])
def test_a_skewed_router_is_balanced(rule: Rule, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    skew_E = torch.linspace(-1, 1, 16)
    bias_LE = torch.zeros(1, 16)
    violations = []
    for _ in range(200):
        logits_TE = torch.randn(2048, 16, generator=generator) + skew_E
        counts_E = routed_counts(logits_TE, bias_LE[0])
        violations.append(float(max_violation(counts_E[None])))
        bias_LE = updated_bias(bias_LE, counts_E[None], rule, rate)
    floor = (2 * torch.log(torch.tensor(16.0)) * 16 / 4096).sqrt()  # of sampling: sqrt(2 ln E * E / (T K))
    assert violations[0] > 1
    assert sum(violations[-20:]) / 20 < 1.6 * floor
