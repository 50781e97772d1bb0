"""Engines in groups for broadcasts."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rl.links import apart


@given(st.lists(st.sampled_from("abc"), max_size=9))
def test_no_group_has_two_engines_on_one_gpu_and_there_are_as_few_as_can_be(gpus: list[str]) -> None:
    engines = {f"engine/{number}": gpu for number, gpu in enumerate(gpus)}
    groups = apart(engines)
    assert sorted(name for group in groups for name in group) == sorted(engines)
    assert all(len({engines[name] for name in group}) == len(group) > 0 for group in groups)
    assert len(groups) == max(Counter(gpus).values(), default=0)


def test_engines_without_a_gpu_are_one_group() -> None:
    assert apart({"engine/0": None, "engine/1": None}) == [["engine/0", "engine/1"]]
