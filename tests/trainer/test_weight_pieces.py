"""Runs of consecutive numbers, and pieces that together are all weights."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.models import tiny_model
from trainer.model.transformer import LanguageModel
from trainer.weight_pieces import Piece, Span, put, runs, shared_pieces


@given(st.sets(st.integers(0, 60)).map(sorted))
def test_runs_are_the_numbers_in_as_few_stretches_as_can_be(places: list[int]) -> None:
    found = runs(places)
    assert [first + step for _, first, count in found for step in range(count)] == places
    assert [start + step for start, _, count in found for step in range(count)] == list(range(len(places)))
    assert len(found) == len([place for place in places if place - 1 not in places])


def test_pieces_of_a_model_make_another_one_the_same() -> None:
    source, target = (LanguageModel.initialize(tiny_model(), seed) for seed in (1, 2))
    state = source.state()
    cut = 100
    parts = [Piece(Span(f"experts.{part}", 0, cut), state[f"experts.{part}"].view(-1)[:cut]) for part in ("gate_up", "down")]
    rest = [
        Piece(Span(name, cut, state[name].numel() - cut), state[name].view(-1)[cut:])
        for name in ("experts.gate_up", "experts.down")
    ]
    put([*shared_pieces(source.dense, source.bias_LE), *parts, *rest], target.state())
    assert all((tensor == state[name]).all() for name, tensor in target.state().items())
