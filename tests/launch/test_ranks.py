"""Benchmarks on several ranks."""

from __future__ import annotations

from launch.benchmarks.ranks import on_ranks
from parallel.topology import World


def large(world: World, count: int, cases: None) -> list[int]:
    return list(range(world.rank, count))


def test_a_result_that_no_pipe_holds_comes_back() -> None:
    assert on_ranks(large, 2, 1_000_000, None, "cpu") == list(range(1_000_000))
