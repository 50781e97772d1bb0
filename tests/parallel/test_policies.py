"""Every policy's plan is legal, within memory and the same everywhere; Tessera's is never predicted slower than no copies."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.benchmarks.traces import capped
from launch.machines import layer_costs, read_machine
from parallel import policies
from parallel.copy_numbers import expected_times, fewest_crossing, numbers_of_copies
from parallel.flows import Plan, device_loads, flows, imbalance
from parallel.layer_cost import (
    LayerCosts,
    Link,
    Setting,
    copy_times,
    exchange_time,
    exchanged,
    hidden_copies,
    layer_time,
    least_pass_s,
    pass_times,
)
from parallel.packing import MANY_LAYERS, even_replicas, pack
from parallel.placement import Budget, Floats, Ints, Placement, Topology, TransportKind, without_copies
from parallel.policies import POLICIES, by_cost, of_one_layer, plain
from parallel.transport import auto_kind
from parallel.two_level_exchange import rows_across
from tests.parallel.plans import loads, owners, plans, settings, topologies

H200 = LayerCosts(  # Qwen3-30B-A3B, one layer
    entry_s=1.6e-8,
    expert_s=2.7e-6,
    row_bytes=4096,
    expert_bytes=9.4e6,
    sum_bytes=1.9e7,
    within=Link(2e-5, 1 / 370e9),
    across=Link(3e-5, 1 / 50e9),
    attention_s=2e-3,
    planning_s=1e-3,
    row_s=2e-9,
    exchange_s=2e-4,
    order_s=7e-5,
    sum_s=1.1e-5,
)


@pytest.mark.parametrize("name", POLICIES)
@given(topology=topologies(), experts=st.integers(1, 16), memory=st.integers(0, 8), seed=st.integers(0, 9999))
def test_plans_are_legal_within_memory_and_repeatable(
    name: str, topology: Topology, experts: int, memory: int, seed: int
) -> None:
    loads_E, owner_E, setting = loads(seed, experts), owners(seed, topology, experts), settings(seed, topology, memory)
    plan = of_one_layer(POLICIES[name], loads_E, owner_E, setting)  # `Placement` and `Plan` refuse what is not legal
    assert (plan.placement.owner_E == owner_E).all()
    assert (plan.placement.extra_D <= memory).all()
    again = of_one_layer(POLICIES[name], loads_E.copy(), owner_E.copy(), setting)
    assert (again.placement.copies_ED == plan.placement.copies_ED).all()
    assert (again.weights_ED == plan.weights_ED).all()
    np.testing.assert_allclose(device_loads(plan, topology, loads_E).sum(), loads_E.sum())


@given(topologies(), st.integers(1, 16), st.integers(0, 8), st.integers(0, 9999))
def test_by_cost_is_never_predicted_slower_than_no_copies(topology: Topology, experts: int, memory: int, seed: int) -> None:
    loads_E, owner_E, setting = loads(seed, experts), owners(seed, topology, experts), settings(seed, topology, memory)
    plans = of_one_layer(by_cost, loads_E, owner_E, setting), plain(loads_E, owner_E, setting)
    times = [layer_time(plan, loads_E, setting).total_s for plan in plans]
    assert times[0] <= times[1]


def same(found: Plan, wanted: Plan) -> bool:
    """In every bit."""
    alike = (found.placement.copies_ED == wanted.placement.copies_ED).all() and (found.weights_ED == wanted.weights_ED).all()
    return bool(alike) and found.nearest_first == wanted.nearest_first


@given(
    *[topologies(), st.integers(1, 16), st.integers(0, 8), st.integers(1, 9)],
    st.lists(st.integers(0, 9999), min_size=1, max_size=9),
)
def test_by_cost_plans_layers_together_as_one_by_one(
    topology: Topology, experts: int, memory: int, at_once: int, seeds: list[int]
) -> None:
    loads_LE = np.stack([loads(seed, experts) for seed in seeds])
    owner_LE = np.stack([owners(seed, topology, experts) for seed in seeds])
    setting = settings(seeds[0], topology, memory)
    alone = [of_one_layer(by_cost, *one, setting) for one in zip(loads_LE, owner_LE, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "CELLS_AT_ONCE", at_once * experts * topology.devices)
        together = by_cost(loads_LE, owner_LE, setting)
    assert all(same(*pair) for pair in zip(together, alone, strict=True))


def test_by_cost_plans_large_layers_together_as_one_by_one() -> None:
    for devices in (8, 64):
        topology = Topology(devices, 8)
        layers = [zipf(topology, 128, 4, tokens) for tokens in (512, 2048, 8192, 16384, 32768)]
        loads_LE, owner_LE, setting = np.stack([one[0] for one in layers]), np.stack([one[1] for one in layers]), layers[0][2]
        alone = [of_one_layer(by_cost, *one, setting) for one in zip(loads_LE, owner_LE, strict=True)]
        assert all(same(*pair) for pair in zip(by_cost(loads_LE, owner_LE, setting), alone, strict=True))
        assert all(plan.placement.extra_D.any() for plan in alone)


def zipf(topology: Topology, experts: int, memory: int, tokens: int) -> tuple[np.ndarray, np.ndarray, Setting]:
    random = np.random.default_rng(0)
    share_E = random.permutation(1.0 / np.arange(1, experts + 1))
    loads_E = np.floor(share_E / share_E.sum() * tokens * 8 * topology.devices)
    setting = Setting(topology, 8, Budget(hidden_copies(H200, topology.nodes), memory), False, H200)
    return loads_E, random.permutation(np.arange(experts) % topology.devices), setting


def times_of_all(loads_E: Floats, owner_E: Ints, setting: Setting) -> dict[str, float]:
    plans = {name: of_one_layer(policy, loads_E, owner_E, setting) for name, policy in POLICIES.items()}
    return {name: layer_time(plan, loads_E, setting).total_s for name, plan in plans.items()}


@pytest.mark.parametrize(("devices", "experts", "memory"), [(8, 128, 4), (64, 128, 2), (64, 128, 8), (256, 256, 4)])
def test_by_cost_against_the_others_under_zipf(devices: int, experts: int, memory: int) -> None:
    """With fast links on nodes and attention to hide copies under, hardly another policy is predicted faster."""
    loads_E, owner_E, setting = zipf(Topology(devices, 8), experts, memory, tokens=16384)
    times = times_of_all(loads_E, owner_E, setting)
    assert times["cost"] <= 1.2 * min(times.values()), times
    assert times["cost"] < times["plain"] / 1.5


SHAPES = [  # hidden, expert hidden, experts, top-k: few large ones (Mixtral, DBRX, Llama 4) to many small ones (Qwen3-Next)
    (4096, 14336, 8, 2), (6144, 10752, 16, 4), (5120, 8192, 16, 1), (2048, 1024, 64, 8), (2048, 768, 128, 8),
    (7168, 2048, 256, 8), (2048, 512, 512, 10),
]  # fmt: skip


def drawn(random: np.random.Generator) -> tuple[Floats, Ints, Setting]:
    """A layer of some model on some cluster, with loads of some kind."""
    hidden, expert_hidden, experts, top_k = SHAPES[random.integers(len(SHAPES))]
    devices, tokens = int(random.choice([2, 4, 8, 16, 32, 64])), int(random.choice([256, 1024, 4096, 16384, 32768]))
    topology = Topology(devices, min(devices, int(random.choice([1, 4, 8, 8]))))
    some_E = random.choice(experts, max(experts // 8, top_k), replace=False)
    popularity_E = random.uniform(0.5, 1.5, experts)
    kind = random.integers(5)
    if kind == 1:
        popularity_E = random.permutation(1.0 / np.arange(1, experts + 1) ** random.uniform(0.3, 2))
    elif kind == 2:
        popularity_E[some_E[0]] *= 10 ** random.uniform(1, 3)  # one is hot
    elif kind == 3:
        popularity_E[some_E] *= random.uniform(2, 30)  # some are
    elif kind == 4:
        popularity_E = np.where(np.isin(np.arange(experts), some_E), popularity_E, 0)  # nobody chooses the others
    loads_E = random.multinomial(tokens * top_k * devices, capped(popularity_E, 1 / top_k)).astype(np.float64)
    attention = float(random.choice([0, 1, 3])) * tokens * (8 * hidden**2 + 2 * 4096 * hidden)
    costs = layer_costs(read_machine(str(random.choice(["h200", "a100"]))), hidden, expert_hidden, attention)
    budget = Budget(min(hidden_copies(costs, topology.nodes), experts), min(int(random.choice([1, 2, 4, 8, 32])), experts))
    kind = auto_kind(topology, in_reach=topology.nodes == 1)
    setting = Setting(topology, top_k, budget, bool(random.random() < 0.3), costs, kind)
    return loads_E, random.permutation(np.arange(experts) * devices // experts), setting


def test_other_policies_are_hardly_ever_ahead_whatever_the_model_the_cluster_and_the_loads() -> None:
    """A plan has no time to look at all that they would do."""
    behind = []
    for seed in range(150):
        times = times_of_all(*drawn(np.random.default_rng(seed)))
        behind.append(times.pop("cost") / min(times.values()))
    assert sum(one > 1.01 for one in behind) <= 0.04 * len(behind), sorted(behind)[-9:]
    assert np.exp(np.log(behind).mean()) < 0.99


@given(topologies(), st.integers(1, 16), st.integers(1, 8), st.integers(0, 9999))
def test_choices_have_room_and_what_is_expected_of_them_is_near(
    topology: Topology, experts: int, memory: int, seed: int
) -> None:
    """Of copies that go everywhere nothing is left to chance: there the expected time is the predicted one."""
    loads_E, owner_E = loads(seed, experts) + 1.0, owners(seed, topology, experts)
    setting = settings(seed, topology, memory)
    (choices_CE,), (there_C,) = numbers_of_copies(loads_E[None], setting)
    extra_CE = choices_CE[there_C]
    assert there_C[0] or topology.devices == 1, "the choice that comes first has room"
    assert (extra_CE >= 0).all() and (extra_CE < topology.devices).all()
    assert (extra_CE.sum(axis=1) > 0).all() and (extra_CE.sum(axis=1) <= topology.devices * memory).all()
    if topology.devices > 1:
        everywhere_E = np.full(experts, topology.devices - 1)
        placement = Placement(owner_E, np.ones((experts, topology.devices), dtype=np.bool_))
        costs = replace(setting.costs, sum_s=0.0, expert_bytes=0.0, sum_bytes=0.0, attention_s=1e9)
        free = replace(setting, costs=costs, budget=Budget(0, experts))
        expected = expected_times(everywhere_E[None, None], loads_E[None], owner_E[None], free, None)
        assert float(expected.item()) == pytest.approx(layer_time(Plan(placement), loads_E, free).total_s)


def test_tokens_are_few_and_weights_are_slow() -> None:
    """With few tokens weights do not pay; by_cost leaves them where they are."""
    loads_E, owner_E, setting = zipf(Topology(64, 8), 128, 4, tokens=4)
    setting = replace(setting, costs=replace(H200, attention_s=0.0))
    assert not of_one_layer(by_cost, loads_E, owner_E, setting).placement.extra_D.any()


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.integers(0, 60), st.integers(1, 9))
def test_replicas_leave_the_largest_load_per_replica_least(loads_: list[int], seats: int, most: int) -> None:
    loads_E = np.array(loads_, dtype=np.float64)
    (extra_E,) = even_replicas(loads_E[None], seats, most)
    assert extra_E.sum() <= seats and (extra_E <= most).all() and (extra_E >= 0).all()
    greedy_E = np.zeros_like(extra_E)
    for _ in range(seats):
        open_E = (greedy_E < most) & (loads_E > 0)
        if open_E.any():
            greedy_E[np.where(open_E, loads_E / (greedy_E + 1), -1.0).argmax()] += 1
    movable = loads_E > 0
    found, wanted = ((loads_E / (e + 1))[movable & (e < most)].max(initial=0) for e in (extra_E, greedy_E))
    assert found <= wanted * (1 + 1e-8) and (extra_E.sum() == greedy_E.sum())


@given(topologies(), st.integers(1, 16), st.integers(1, 4), st.integers(0, 9999))
def test_copies_go_where_least_is_one_by_one(topology: Topology, experts: int, memory: int, seed: int) -> None:
    """Against the rule itself: the node with fewest of the expert, its least loaded device, the least loaded of these."""
    random, devices, per_node = np.random.default_rng(seed), topology.devices, topology.devices_per_node
    owner_E, extra_E = owners(seed, topology, experts), random.integers(0, devices, experts)
    loads_E = loads(seed, experts) * math.lcm(*range(1, devices + 1))  # so that sums are exact
    each_E, wanted_ED, room_D = loads_E / (extra_E + 1), owner_E[:, None] == np.arange(devices), np.full(devices, memory)
    order = np.argsort(-each_E, kind="stable").tolist()
    for expert in [e for e in order if extra_E[e] == devices - 1][:memory]:
        room_D -= ~wanted_ED[expert]
        wanted_ED[expert] = True
    load_D = each_E @ wanted_ED
    for expert in [e for e in order if not wanted_ED[e].all()]:
        before_D = load_D.copy()
        for _ in range(extra_E[expert]):
            has_N = wanted_ED[expert].reshape(topology.nodes, per_node).sum(axis=1)
            able = [d for d in range(devices) if room_D[d] and not wanted_ED[expert, d]]
            if able:
                device = min(able, key=lambda d: (has_N[d // per_node], before_D[d], d))
                wanted_ED[expert, device] = True
                load_D[device] += each_E[expert]
                room_D[device] -= 1
    for layers in (1, MANY_LAYERS):  # by lists, and on one node by arrays
        many = (np.tile(one, (layers, 1)) for one in (extra_E, loads_E, owner_E))
        assert (pack(*many, topology, memory) == wanted_ED).all()


@given(topologies(), st.integers(1, 16), st.integers(0, 9999))
def test_no_plan_takes_less_than_the_least(topology: Topology, experts: int, seed: int) -> None:
    plan, loads_E, setting = plans(seed, topology, experts), loads(seed, experts), settings(seed, topology, 0)
    if setting.alone and plan.stays:
        plan = replace(plan, nearest_first=False)  # tokens are exchanged
    found, entries = flows(plan, topology, loads_E), float(loads_E.sum())
    crossing_L, busiest_L, entries_L = np.array([[found.across_in_D.sum()], [found.entries_D.max()], [entries]])
    least_s = float(least_pass_s(crossing_L, busiest_L, entries_L, setting).item())
    assert least_s <= sum(pass_times(found, setting)) * (1 + 1e-9)
    even = Plan(plan.placement)
    replicas_E = plan.placement.copies_ED.sum(axis=1)
    crossing = flows(even, topology, loads_E).across_in_D.sum()
    assert float(fewest_crossing(replicas_E[None, None] - 1, loads_E[None], topology).item()) <= crossing * (1 + 1e-9) + 1e-9


def test_times_by_hand() -> None:
    """Two nodes of two; expert 0 lies on devices 0 and 2, expert 1 on device 3; 40 entries each."""
    topology = Topology(4, 2)
    copies_ED = np.array([[True, False, True, False], [False, False, False, True]])
    plan = Plan(Placement(np.array([0, 3]), copies_ED))
    loads_E = np.array([40.0, 40.0])
    found = flows(plan, topology, loads_E)
    np.testing.assert_allclose(found.entries_D, [20, 0, 20, 40])
    np.testing.assert_allclose(found.within_in_D, [10, 0, 10, 10])
    np.testing.assert_allclose(found.across_in_D, [0, 0, 0, 20])
    links = Link(1.0, 0.1), Link(2.0, 0.5)
    rest = {"attention_s": 30.0, "planning_s": 0.0, "row_s": 3.0, "exchange_s": 7.0, "order_s": 4.0, "sum_s": 9.0}
    costs = LayerCosts(1.0, 5.0, 2.0, 100.0, 200.0, *links, **rest)
    setting = Setting(topology, 1, Budget(8, 8), False, costs)
    # Device 3 computes 40 entries of one expert; it takes 20 rows of 2 bytes across and 10 within: the slower link decides. It
    # has 20 tokens of its own, and the rows of 40 come to it, 10 of them its own.
    assert exchange_time(found, setting) == pytest.approx((2 + 20 * 2 * 0.5) + (20 + 40) * 3)
    # In two levels devices 2 and 3 take 10 of the 20 each. Device 3 takes 10 of its neighbour's own and 10 that came to it. It
    # lays out its own 20, passes these and the 10 that came on (in place, and laid out again), and serves 40.
    two_level = replace(setting, kind="two_level")
    assert exchange_time(found, two_level) == pytest.approx((2 + 10 * 2 * 0.5) + (1 + 20 * 2 * 0.1) + (20 + 2 * 30 + 40) * 3)
    times = copy_times(plan.placement, topology, costs)  # one expert, once across, and one gradient added
    assert (times.gather_s, times.return_s) == (pytest.approx(2 + 100 * 0.5), pytest.approx(2 + 200 * 0.5))
    time = layer_time(plan, loads_E, setting)
    assert time.products_s == pytest.approx(3 * 45) and time.tokens_s == pytest.approx(4 * (22 + 180) + 7)
    assert time.weights_s == pytest.approx((52 - 30) + (102 - 60)) and time.sums_s == pytest.approx(2 * 9)
    again = layer_time(plan, loads_E, replace(setting, rematerialise=True))
    assert again.weights_s == pytest.approx((52 - 30) + (52 + 102 - 60))
    assert hidden_copies(costs, 2) == int(28 / 50) and hidden_copies(costs, 1) == int(29 / 10)
    assert LayerCosts.from_numbers(costs.numbers) == costs
    bare = layer_time(Plan(without_copies(np.array([0, 3]), 4)), loads_E, setting)
    assert bare.weights_s == 0 and imbalance(np.zeros(4)) == 1.0


@given(st.sampled_from([(2, 2), (2, 4), (4, 2), (3, 3)]), st.integers(1, 4), st.integers(0, 9))
def test_in_two_levels_a_token_crosses_to_a_node_once(nodes_of: tuple[int, int], top_k: int, seed: int) -> None:
    """Even choices of random experts, one of each device: against rows that are counted."""
    topology = Topology(nodes_of[0] * nodes_of[1], nodes_of[1])
    tokens, generator = 4000, torch.Generator().manual_seed(seed)
    rank_TK = torch.randint(topology.devices, (tokens, top_k), generator=generator)
    by_rank, by_node = rows_across(rank_TK, 0, topology)
    bare = Plan(without_copies(np.arange(topology.devices), topology.devices))
    loads_E = np.full(topology.devices, float(tokens * top_k))
    setting = replace(settings(seed, topology, 0), top_k=top_k, costs=replace(H200, row_bytes=1.0))
    rows_of_kind: dict[TransportKind, int] = {"messages": by_rank, "two_level": by_node}
    for kind, rows in rows_of_kind.items():
        sent = exchanged(flows(bare, topology, loads_E), replace(setting, kind=kind))
        assert sent.across_bytes == pytest.approx(rows, rel=0.1)


def test_a_token_goes_to_a_device_once_whatever_its_choices() -> None:
    """Two devices, even load: with K choices half of them are the other's, so 1 - 2^-K of the tokens travel."""
    topology, tokens = Topology(2, 2), 1000.0
    plan = Plan(without_copies(np.array([0, 1]), 2))
    for top_k in (1, 2, 8):
        costs = replace(H200, row_bytes=1.0, within=Link(0.0, 1.0), row_s=0.0)
        setting = replace(settings(0, topology, 0), top_k=top_k, costs=costs)
        time = exchange_time(flows(plan, topology, np.full(2, tokens * top_k)), setting)
        assert time == pytest.approx(tokens * (1 - 0.5**top_k))
