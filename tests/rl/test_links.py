"""Engines in groups for broadcasts."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rl.links import apart, shown_to


@given(st.lists(st.sampled_from("abc"), max_size=9))
def test_no_group_has_two_engines_on_one_gpu_and_there_are_as_few_as_can_be(gpus: list[str]) -> None:
    engines = {f"engine/{number}": gpu for number, gpu in enumerate(gpus)}
    groups = apart(engines)
    assert sorted(name for group in groups for name in group) == sorted(engines)
    assert all(len({engines[name] for name in group}) == len(group) > 0 for group in groups)
    assert len(groups) == max(Counter(gpus).values(), default=0)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=9), st.sampled_from("ab"), st.sets(st.sampled_from("abc")))
def test_a_rank_shows_its_memory_on_its_gpu_and_to_no_more_others_than_there_are_ranks(
    gpus: list[str | None], own: str, reached: set[str]
) -> None:
    engines = {f"engine/{number}": gpu for number, gpu in enumerate(gpus)}
    for ranks in (1, 2, 4):
        found = shown_to(own, sorted(reached), engines, ranks)
        others = [name for name, gpu in engines.items() if gpu in reached - {own}]
        assert [name for name in found if engines[name] == own] == [name for name, gpu in engines.items() if gpu == own]
        assert [name for name in found if engines[name] != own] == (others if len(others) <= ranks else [])
    assert shown_to(None, [], engines, 2) == [], "a rank on a CPU shows nothing"


def test_engines_without_a_gpu_are_one_group() -> None:
    assert apart({"engine/0": None, "engine/1": None}) == [["engine/0", "engine/1"]]
