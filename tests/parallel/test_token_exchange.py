"""Entries of an expert are dealt out in the proportion of the shares, whatever the number of ranks and tokens."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.destinations import destinations
from kernels.expert_order import expert_order
from parallel.placement import Floats
from parallel.token_exchange import boundaries


def random_shares(random: np.random.Generator, experts: int, devices: int) -> Floats:
    shares_ED = random.random((experts, devices)) * (random.random((experts, devices)) < 0.6)
    shares_ED[np.arange(experts), random.integers(0, devices, experts)] += 0.1
    return np.asarray(shares_ED / shares_ED.sum(axis=1, keepdims=True))


@given(st.integers(0, 120), st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(0, 7), st.integers(0, 9999))
def test_parts_are_within_one_entry_of_the_shares(
    tokens: int, top_k: int, experts: int, devices: int, rank: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shares_ED = random_shares(random, experts, devices)
    experts_TK = torch.from_numpy(random.integers(0, experts, (tokens, top_k)))
    ends_ED, phase_E = (torch.from_numpy(part) for part in boundaries(shares_ED, rank))
    found_TK = destinations(experts_TK, expert_order(experts_TK, experts), ends_ED, phase_E)
    dealt_ED = np.zeros((experts, devices))
    np.add.at(dealt_ED, (experts_TK.numpy().ravel(), found_TK.numpy().ravel()), 1)
    assert not dealt_ED[shares_ED == 0].any(), "an entry went where its expert is not"
    wanted_ED = shares_ED * dealt_ED.sum(axis=1, keepdims=True)
    assert (np.abs(dealt_ED - wanted_ED) < 1 + 1e-9).all()


def test_single_entries_of_many_ranks_spread_over_the_copies() -> None:
    devices = 4
    dealt_D = np.zeros(devices)
    for rank in range(64):
        ends_ED, phase_E = (torch.from_numpy(part) for part in boundaries(np.full((1, devices), 1 / devices), rank))
        one = torch.zeros(1, 1, dtype=torch.int64)
        dealt_D[int(destinations(one, expert_order(one, 1), ends_ED, phase_E))] += 1
    assert dealt_D.min() >= 14, dealt_D
