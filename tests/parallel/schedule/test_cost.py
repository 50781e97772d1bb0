"""Fitted lines are the best ones; workloads count what a layer sends and computes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.flows import Plan, flows
from parallel.layer_cost import LayerCosts, Link, Setting, pass_times
from parallel.placement import Budget, Topology, even_owners, without_copies
from parallel.schedule.cost import EspCosts, Line, esp_chunk, esp_workload, fit, sharded_chunk, sharded_workload

COSTS = LayerCosts(1e-8, 1e-6, 4096.0, 1e7, 2e7, Link(1e-5, 1e-11), Link(2e-5, 1e-10), 1e-3, 0.0, 1e-9, 1e-5, 2e-6, 0.0)


@given(st.floats(0, 1e-2), st.floats(1e-12, 1e-6), st.integers(2, 24))
def test_a_line_is_found_again(alpha_s: float, beta_s: float, count: int) -> None:
    amounts = [2**18 * (1 + i) for i in range(count)]
    found = fit(amounts, [alpha_s + beta_s * amount for amount in amounts])
    assert found.line.alpha_s == pytest.approx(alpha_s, rel=1e-6, abs=1e-9) and found.line.beta_s == pytest.approx(beta_s)
    assert found.r_squared == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=12), st.integers(0, 2**32 - 1))
def test_no_other_line_without_negative_parts_is_closer(samples: list[tuple[float, float]], seed: int) -> None:
    amounts, seconds = [x for x, _ in samples], [y for _, y in samples]
    if len({*amounts}) < 2 or max(amounts) - min(amounts) < 1e-3:
        return
    found = fit(amounts, seconds)
    assert found.line.alpha_s >= 0 and found.line.beta_s >= 0 and found.r_squared <= 1 + 1e-9
    x, y = np.array(amounts), np.array(seconds)

    def error(alpha: float, beta: float) -> float:
        return float(((alpha + beta * x - y) ** 2).sum())

    least, random = error(found.line.alpha_s, found.line.beta_s), np.random.default_rng(seed)
    for _ in range(50):
        other = np.abs(random.normal((found.line.alpha_s, found.line.beta_s), (1.0, 0.1)))
        assert error(*other) >= least - 1e-6 * (1 + least)


@pytest.mark.parametrize(
    ("amounts", "seconds"), [([1, 1], [1, 2]), ([1], [1]), ([1, 2], [1, 2, 3]), ([1, 2], [-1, 2]), ([1, float("nan")], [1, 2])]
)
def test_samples_that_make_no_line_are_refused(amounts: list[float], seconds: list[float]) -> None:
    with pytest.raises(ValueError):
        fit(amounts, seconds)


def test_nothing_takes_no_time() -> None:
    assert Line(1.0, 2.0).seconds(0) == 0 and Line(1.0, 2.0).seconds(3) == 7.0


def test_workload_of_the_paper() -> None:
    """Section 4.1: k f B L M / N_ESP, k f B L M, k f B L M H / N_ESP."""
    work = esp_workload(4 * 1024, 2048, 8192, 2, 1.2, 8, 3)
    assert work.gather == pytest.approx(2 * 1.2 * 4096 * 2048) and work.exchange == pytest.approx(work.gather / 8)
    assert work.product == pytest.approx(work.gather * 8192 / 8) and work.products == 3


@given(st.integers(1, 16))
def test_a_chunk_is_one_part_and_every_start(degree: int) -> None:
    costs = EspCosts(Line(1.0, 1.0), Line(2.0, 1.0), Line(3.0, 1.0), Line(0.0, 1.0), Line(4.0, 1.0))
    work = esp_workload(64, 16, 16, 1, 1.0, 4, 3)
    forward, backward = (esp_chunk(costs, work, degree, backward=way) for way in (False, True))
    assert forward.across_s == backward.across_s == pytest.approx(1 + 256 / degree)
    assert (forward.gather_s, forward.scatter_s) == (pytest.approx(2 + 1024 / degree), pytest.approx(3 + 1024 / degree))
    assert forward.expert_s == pytest.approx(3 * (4 + 4096 / degree)) and backward.expert_s == 2 * forward.expert_s
    alone = esp_chunk(costs, esp_workload(64, 16, 16, 1, 1.0, 1, 3), degree, backward=False)
    assert alone.gather_s == alone.scatter_s == 0, "a node of one device cuts no experts"


@given(st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1), (1, 2)]), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_our_workload_is_what_the_model_of_placements_counts(nodes_of: tuple[int, int], top_k: int, seed: int) -> None:
    """Whole, its chunk takes what `pass_times` predicts, but that both kinds of links are told apart and that rows are with the
    experts."""
    nodes, per_node = nodes_of
    topology = Topology(nodes * per_node, per_node)
    loads_E = np.random.default_rng(seed).integers(0, 1000, 16).astype(float)
    plan = Plan(without_copies(even_owners(16, topology.devices), topology.devices))
    setting = Setting(topology, top_k, Budget(0, 0), False, COSTS, "messages" if seed % 2 else "two_level")
    work = sharded_workload(plan, loads_E, setting)
    forward, backward = (sharded_chunk(COSTS, work, 1, backward=way) for way in (False, True))
    products_s, tokens_s = pass_times(flows(plan, setting.topology, loads_E), setting)
    links_s = 4 * (max(forward.across_s, forward.within_s) + forward.gather_s)
    assert forward.expert_s + backward.expert_s == pytest.approx(products_s + tokens_s - links_s)
    assert tokens_s - links_s == pytest.approx(4 * work.rows_s + COSTS.exchange_s) and work.rows_s > 0
    assert (forward.across_s > 0) == bool(flows(plan, topology, loads_E).across_in_D.any())
    half = sharded_chunk(COSTS, work, 2, backward=False)
    assert half.expert_s == pytest.approx((forward.expert_s + work.weights_s + COSTS.exchange_s) / 2)
