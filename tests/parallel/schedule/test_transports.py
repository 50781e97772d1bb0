"""How tokens travel is what the plans of both ways say, whatever links there are; layers from published speeds add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.flows import flows
from parallel.layer_cost import pass_times
from parallel.schedule.cost import Line, ShardedWorkload, sharded_workload
from parallel.schedule.execution import NEARLY, ExecutionCosts, LayerWork, in_sequence_s, plan_layer
from parallel.schedule.generalised import Around
from parallel.schedule.published import published
from parallel.schedule.transports import Way, choose_transport
from tests.parallel.plans import loads, plans, topologies
from tests.parallel.plans import settings as settings_of

starts = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))
lines = st.builds(Line, starts, st.floats(1e-6, 10.0))
costs = st.builds(ExecutionCosts, lines, lines, lines, lines, lines, lines, starts, lines, lines, starts)
amounts = st.floats(0.0, 100.0)
works = st.builds(LayerWork, amounts, amounts, st.one_of(st.just(0.0), amounts))


@settings(max_examples=50)
@given(st.integers(1, 3), st.integers(1, 40), st.data())
def test_no_other_way_is_expected_to_take_less(layers: int, tokens: int, data: st.DataObject) -> None:
    drawn = [data.draw(st.lists(works, min_size=layers, max_size=layers)) for _ in range(2)]
    ways = {kind: Way(data.draw(costs), works_L) for kind, works_L in zip(("messages", "two_level"), drawn, strict=True)}
    arounds = [Around(data.draw(starts)) for _ in range(layers)]
    choice = choose_transport(ways, tokens, arounds)
    assert choice.kind in ways and all(choice.seconds[choice.kind] <= seconds for seconds in choice.seconds.values())
    for kind, way in ways.items():
        alone = [plan_layer(way.costs, work, tokens, around=around) for work, around in zip(way.works, arounds, strict=True)]
        assert choice.plans[kind] == alone
        assert choice.seconds[kind] == pytest.approx(sum(one.seconds + way.costs.announce_s for one in alone))
    assert str(choice).startswith(f"{choice.kind} {1e3 * choice.seconds[choice.kind]:.4g} ms")


NONE, FREE = Line(0.0, 0.0), Line(1e-6, 0.0)


def way(across_s: float, inside_s: float, across: float, inside: float, announce_s: float) -> Way:
    """Experts 10 forward and 20 backward; seconds a byte of each kind of link, and bytes on them."""
    experts = Line(0.0, 10.0)
    link = ExecutionCosts(Line(0.0, across_s), NONE, experts, experts, experts, NONE, announce_s, inside=Line(0.0, inside_s))
    return Way(link, [LayerWork(across, 1.0, inside)])


@pytest.mark.parametrize(
    ("across_s", "inside_s", "announce_s", "wanted"),
    [
        (1.0, 0.01, 1.0, "two_level"),  # links between nodes are scarce: half the rows on them
        (1.0, 1.0, 1.0, "messages"),  # those inside are as scarce, and carry what was saved and more
        (0.01, 0.001, 1.0, "messages"),  # all of it hides, and two exchanges of sizes take longer than one
    ],
)
def test_the_choice_by_a_table_of_links(across_s: float, inside_s: float, announce_s: float, wanted: str) -> None:
    """16 bytes go to other nodes by rank, 8 by node; 24 go on inside them."""
    straight, two = way(across_s, 0.0, 16.0, 0.0, announce_s), way(across_s, inside_s, 8.0, 24.0, 2 * announce_s)
    choice = choose_transport({"messages": straight, "two_level": two}, 100, [Around()])
    slower = max(choice.seconds.values()) / min(choice.seconds.values())
    assert choice.kind == wanted, (choice, slower, NEARLY)


@given(st.integers(0, 2**32 - 1), topologies())
def test_a_layer_from_published_speeds_takes_what_the_model_of_placements_says(seed: int, topology: object) -> None:
    """In sequence, without its exchange of sizes: products and tokens of both passes."""
    setting = settings_of(seed, topology, 2)  # type: ignore[arg-type]
    loads_E = loads(seed, 12) + 1.0
    plan = plans(seed, setting.topology, 12)
    work = sharded_workload(plan, loads_E, setting)
    lines, amount = published(setting.costs, work, 0.25, 0.0)
    products_s, tokens_s = pass_times(flows(plan, setting.topology, loads_E), setting)
    idle = not (work.within_bytes or work.across_bytes)
    empty_s = 4 * lines.exchange.seconds(amount.row_bytes) if idle or (work.two_level and not work.across_bytes) else 0.0
    announced_s = setting.costs.exchange_s if work.exchanged else setting.costs.order_s
    expected_s = products_s + tokens_s - announced_s + 0.25 + work.exchanged * empty_s
    assert in_sequence_s(lines, amount) == pytest.approx(expected_s)
    assert lines.announce_s == (1 + bool(work.two_level and work.exchanged)) * announced_s
    assert work.exchanged == (not (setting.alone and plan.stays))
    empty = ShardedWorkload(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, two_level=False, staying=0.0, exchanged=1.0)
    assert np.isfinite(in_sequence_s(*published(setting.costs, empty, 0.0, 0.0)))
