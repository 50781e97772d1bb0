"""Cuts of rows into chunks: every row is in one, chunks are adjacent in the order of cells, what waits for nobody fills in."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.cuts import FINEST, Cut, backward_cut, forward_cut, stay_apart
from parallel.schedule.pipeline import MOST_CHUNKS

cuts = st.builds(Cut, st.integers(1, MOST_CHUNKS), st.integers(0, 2))


@given(cuts, st.integers(0, 50), st.booleans())
def test_a_row_is_in_the_chunk_that_has_its_token(cut: Cut, tokens: int, stays: bool) -> None:
    cells = torch.arange(tokens) * FINEST // max(tokens, 1) + FINEST * (not stays)
    chunks = cut.chunk_of(cells)
    assert chunks.tolist() == sorted(chunks.tolist()), "the rows of a chunk are adjacent"
    apart = stays and cut.staying > 0
    for chunk in range(cut.staying) if apart else range(cut.staying, len(cut)):
        assert (chunks == chunk).nonzero().flatten().tolist() == list(range(tokens)[cut.tokens_of(chunk, tokens)])
    assert ((chunks < cut.staying) == apart).all()


@given(cuts)
def test_what_stays_comes_first_and_last(cut: Cut) -> None:
    assert sorted(cut.turns) == list(range(len(cut)))
    travelling = [chunk for chunk in cut.turns if chunk >= cut.staying]
    assert travelling == list(range(cut.staying, len(cut)))
    assert (cut.turns[0] < cut.staying) == (cut.staying > 0) and (cut.turns[-1] < cut.staying) == (cut.staying > 1)


def test_whole_layers_and_those_of_many_ranks_or_over_two_levels_have_nothing_apart() -> None:
    assert stay_apart(2, two_level=False) and stay_apart(4, two_level=False)
    assert not stay_apart(5, two_level=False) and not stay_apart(4, two_level=True)
    for cut_of, staying in ((forward_cut, 2), (backward_cut, 1)):
        assert cut_of(1, apart=True) == cut_of(1, apart=False) == Cut(1)
        assert cut_of(3, apart=True) == Cut(3, staying) and cut_of(3, apart=False) == Cut(3)
