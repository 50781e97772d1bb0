"""Copies that follow each other on both sides are fetched as one, and their gradients are added as few."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.peer_experts import _runs, way_home
from parallel.placement import Placement, on_owners

Move = tuple[int, int, int]


def test_neighbours_on_both_sides_go_together() -> None:
    assert _runs([(5, 0, 2), (4, 0, 1), (6, 1, 3), (7, 1, 5), (8, 1, 6)]) == [(4, 0, 1, 2), (6, 1, 3, 1), (7, 1, 5, 2)]


@given(st.dictionaries(st.integers(0, 20), st.tuples(st.integers(0, 2), st.integers(0, 9))))
def test_every_copy_is_fetched_once(moves: dict[int, tuple[int, int]]) -> None:
    wanted: list[Move] = sorted((to, owner, row) for to, (owner, row) in moves.items())
    runs = _runs(wanted)
    assert [(to + i, owner, row + i) for to, owner, row, count in runs for i in range(count)] == wanted


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 12), st.floats(0, 1))
def test_gradients_of_every_copy_come_home_in_the_order_of_ranks(seed: int, ranks: int, experts: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    owner_E = rng.integers(0, ranks, experts)
    placement = Placement(owner_E, on_owners(owner_E, ranks) | (rng.random((experts, ranks)) < share))
    shown = [[expert for expert in range(experts) if placement.beside_ED[expert, rank]] for rank in range(ranks)]
    for rank in range(ranks):
        found, own = way_home(placement, rank), np.flatnonzero(owner_E == rank).tolist()
        assert (found.most, found.shown) == (max(map(len, shown)), len(shown[rank]))
        came = {to + i: (shown[device][place + i], device) for to, device, place, n in found.moves for i in range(n)}
        assert sorted(came) == list(range(found.coming))
        added = [(own[own.index(first) + i], came[at + i]) for first, at, n in found.sums for i in range(n)]
        assert all(expert == of for expert, (of, _) in added)
        for expert in own:
            devices = [device for to, (_, device) in added if to == expert]
            assert devices == np.flatnonzero(placement.beside_ED[expert]).tolist()


def test_two_ranks_that_copy_everything_add_all_at_once() -> None:
    owner_E = np.array([0, 0, 1, 1])
    found = way_home(Placement(owner_E, np.ones((4, 2), dtype=bool)), 1)
    assert (found.moves, found.sums) == ([(0, 0, 0, 2)], [(2, 0, 2)])
