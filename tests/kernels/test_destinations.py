"""The kernel that deals out entries against the reference, which tests/parallel/test_token_exchange.py checks by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.destinations import JUST_BELOW_ONE, destinations
from kernels.expert_order import ExpertOrder, expert_order
from parallel.token_exchange import boundaries


def moved(order: ExpertOrder, device: str) -> ExpertOrder:
    return ExpertOrder(*(part.to(device) for part in vars(order).values()))


@pytest.mark.parametrize(("tokens", "devices"), [(700, 8), (1, 3), (0, 2)])
@pytest.mark.parametrize("split", [False, True])
def test_the_kernel_equals_the_reference(kernel_device: str, tokens: int, devices: int, split: bool) -> None:
    from kernels.triton_destinations import launch_destinations

    random = np.random.default_rng(tokens)
    shares_ED = np.eye(devices)[random.integers(0, devices, 20)]
    if split:
        shares_ED = shares_ED + random.random((20, devices)) * (random.random((20, devices)) < 0.5)
    ends_ED, phase_E = (torch.from_numpy(part) for part in boundaries(shares_ED / shares_ED.sum(axis=1, keepdims=True), 1))
    experts_TK = torch.randint(-1, 20, (tokens, 6), generator=torch.Generator().manual_seed(0))
    order = expert_order(experts_TK, 20, num_entries=int((experts_TK >= 0).sum())) if split else None
    wanted_TK = destinations(experts_TK, order, ends_ED, phase_E)
    assert torch.equal(wanted_TK < 0, experts_TK < 0)
    there = None if order is None else moved(order, kernel_device)
    ends_ED, phase_E = ends_ED.to(kernel_device), phase_E.to(kernel_device)
    found_TK = launch_destinations(experts_TK.to(kernel_device), there, ends_ED, phase_E, JUST_BELOW_ONE)
    assert torch.equal(found_TK.cpu(), wanted_TK)
