"""The order of entries by expert."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.expert_order import expert_order


@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 8), st.integers(0, 100))
def test_entries_are_sorted_by_expert_then_token(tokens: int, top_k: int, experts: int, seed: int) -> None:
    chosen = torch.randint(0, experts, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    order = expert_order(chosen, experts)
    entries = [(int(expert), entry) for entry, expert in enumerate(chosen.flatten())]
    assert order.order_N.tolist() == [entry for _, entry in sorted(entries)]
    assert order.counts_E.tolist() == [sum(expert == e for expert, _ in entries) for e in range(experts)]
