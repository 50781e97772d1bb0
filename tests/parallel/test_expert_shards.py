"""Moves between owners fall into rounds that any memory has room for."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.expert_shards import exchanges


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_in_a_round_a_rank_gives_one_expert_and_gets_one(size: int, layers: int, per_rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(size), layers * per_rank)
    old_LE, new_LE = (random.permutation(owners).reshape(layers, -1) for _ in range(2))
    held_LE = old_LE.copy()
    for moves in exchanges(old_LE, new_LE):
        givers, takers = [move.source for move in moves], [move.target for move in moves]
        assert len(set(givers)) == len(givers) and sorted(givers) == sorted(takers)
        for move in moves:
            assert held_LE[move.layer, move.expert] == move.source
            held_LE[move.layer, move.expert] = move.target
    assert (held_LE == new_LE).all()
    assert sum(len(moves) for moves in exchanges(old_LE, new_LE)) == (old_LE != new_LE).sum()
