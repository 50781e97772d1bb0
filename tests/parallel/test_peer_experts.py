"""Copies that follow each other on both sides are fetched as one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parallel.peer_experts import _runs

Move = tuple[int, int, int]


def test_neighbours_on_both_sides_go_together() -> None:
    assert _runs([(5, 0, 2), (4, 0, 1), (6, 1, 3), (7, 1, 5), (8, 1, 6)]) == [(4, 0, 1, 2), (6, 1, 3, 1), (7, 1, 5, 2)]


@given(st.dictionaries(st.integers(0, 20), st.tuples(st.integers(0, 2), st.integers(0, 9))))
def test_every_copy_is_fetched_once(moves: dict[int, tuple[int, int]]) -> None:
    wanted: list[Move] = sorted((to, owner, row) for to, (owner, row) in moves.items())
    runs = _runs(wanted)
    assert [(to + i, owner, row + i) for to, owner, row, count in runs for i in range(count)] == wanted
