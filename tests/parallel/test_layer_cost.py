"""The time of a layer's products and tokens is what counting device by device says; a layer whose tokens stay where they are
exchanges nothing where ranks read each other's memory, and all that an exchange costs otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.copy_numbers import expected_times
from parallel.flows import Plan, flows, flows_of, shares
from parallel.layer_cost import LayerCosts, Link, Setting, exchanged, exchanges, layer_time, pass_times
from parallel.placement import Budget, Floats, Ints, Placement, Placements, Topology, TransportKind, without_copies
from parallel.policies import by_cost, calibrated, of_one_layer
from parallel.schedule.cost import sharded_workload
from tests.parallel.plans import loads, owners, plans, settings, topologies

SMALL = LayerCosts(  # experts of 100 kB, whose copies and gradients cost next to nothing beside an exchange
    entry_s=1e-9,
    expert_s=1e-7,
    row_bytes=1024,
    expert_bytes=1e5,
    sum_bytes=2e5,
    within=Link(2e-5, 1 / 370e9),
    across=Link(3e-5, 1 / 50e9),
    attention_s=1e-3,
    planning_s=1e-5,
    row_s=2e-9,
    exchange_s=3e-4,
    order_s=5e-5,
    sum_s=1e-7,
)


def everywhere(owner_E: Ints, devices: int, weight_ED: Floats | None = None) -> Plan:
    return Plan(Placement(owner_E, np.ones((len(owner_E), devices), dtype=np.bool_)), weight_ED)


def some_plan(seed: int, topology: Topology, experts: int) -> Plan:
    """Every third has all experts everywhere, with weights or without."""
    plan = plans(seed, topology, experts)
    if seed % 3:
        return plan
    owner_E = plan.placement.owner_E
    weight_ED = np.random.default_rng(seed).random((experts, topology.devices)) + 0.1
    return replace(everywhere(owner_E, topology.devices, weight_ED if seed % 2 else None), nearest_first=seed % 4 < 3)


def counted(plan: Plan, loads_E: Floats, setting: Setting) -> tuple[float, float]:
    """`pass_times` with a row for each rank, from the shares of every pair of devices."""
    topology, costs, top_k = setting.topology, setting.costs, setting.top_k
    devices, of_all = range(topology.devices), float(loads_E.sum())
    sent = np.array([(loads_E[:, None] / topology.devices * shares(plan, topology, device)) for device in devices])  # (D, E, D)
    products_s = max(
        sent[:, :, to].sum() * costs.entry_s + (sent[:, :, to].sum(axis=0) > 0).sum() * costs.expert_s for to in devices
    )
    served_at_home = all(np.array_equal(shares(plan, topology, one)[:, one], np.ones(len(loads_E))) for one in devices)
    everything_everywhere = plan.nearest_first and bool(plan.placement.copies_ED.all())
    assert served_at_home or not everything_everywhere
    if everything_everywhere and (topology.devices == 1 or (setting.in_place and not setting.rematerialise)):
        return 3 * products_s, costs.order_s
    tokens = of_all / top_k / topology.devices
    rows, ways = np.full(topology.devices, tokens), []
    for near, link in ((True, costs.within), (False, costs.across)):
        taken, given_ = np.zeros((2, topology.devices))
        sources = topology.devices_per_node - 1 if near else topology.devices - topology.devices_per_node
        for one in devices:
            for other in devices:
                if one != other and (topology.node_of(one) == topology.node_of(other)) == near:
                    taken[other] += sent[one, :, other].sum()
                    given_[one] += sent[one, :, other].sum()
        come = np.zeros(topology.devices)
        if sources and of_all:
            come = sources * tokens * (1 - (1 - np.minimum(taken / (sources * tokens * top_k), 1)) ** top_k)
        rows += come
        most = max(come.max(), given_.max() * come.sum() / taken.sum()) if taken.sum() > 0 else 0.0
        ways.append(link.latency_s + most * costs.row_bytes * link.byte_s if most > 0 else 0.0)
    own = np.array([sent[one, :, one].sum() for one in devices])
    if of_all:
        rows += tokens * (1 - (1 - np.minimum(own / (tokens * top_k), 1)) ** top_k)
    return 3 * products_s, 4 * (max(ways) + rows.max() * costs.row_s) + costs.exchange_s


@given(topologies(), st.integers(1, 12), st.integers(0, 9999))
def test_times_are_those_of_counting_device_by_device(topology: Topology, experts: int, seed: int) -> None:
    plan, loads_E = some_plan(seed, topology, experts), loads(seed, experts)
    setting = settings(seed, topology, 0)
    one_level: tuple[TransportKind, ...] = ("messages", "peer_memory")
    for kind in one_level:
        for rematerialise in (False, True):
            one = replace(setting, kind=kind, rematerialise=rematerialise)
            found = pass_times(flows(plan, topology, loads_E), one)
            assert [float(part) for part in found] == pytest.approx(counted(plan, loads_E, one), rel=1e-9)


@given(topologies(), st.integers(1, 12), st.integers(0, 9999))
def test_tokens_that_stay_exchange_nothing_in_place_and_pay_for_it_otherwise(
    topology: Topology, experts: int, seed: int
) -> None:
    """With messages, over one level or two, and where backward fetches copies again, an exchange in which no token travels lays
    out rows and has its start all the same; so does one of tokens that go to all holders alike."""
    owner_E, loads_E = owners(seed, topology, experts), loads(seed, experts) + 1.0
    plan, setting = everywhere(owner_E, topology.devices), settings(seed, topology, experts)
    alone = replace(setting, kind="peer_memory", rematerialise=False)
    time, found = layer_time(plan, loads_E, alone), flows(plan, topology, loads_E)
    assert time.tokens_s == alone.costs.order_s and exchanged(found, alone).rows == 0 and not exchanges(found, alone)
    assert time.products_s > 0 and sharded_workload(plan, loads_E, alone).rows_s == 0
    others = [replace(setting, kind="messages"), replace(setting, rematerialise=True)] if topology.devices > 1 else []
    for one in others:
        slower = layer_time(plan, loads_E, one)
        assert slower.tokens_s >= one.costs.exchange_s > 0 and exchanged(found, one).rows > 0
        assert slower.products_s == time.products_s and slower.sums_s == time.sums_s
    assert layer_time(replace(plan, nearest_first=False), loads_E, alone).tokens_s >= alone.costs.exchange_s
    if topology.devices > 1:  # one copy less, even of an expert that nobody chose, and there is an exchange
        less_ED = plan.placement.copies_ED.copy()
        less_ED[0, (owner_E[0] + 1) % topology.devices] = False
        loads_E[0] = 0.0
        assert layer_time(Plan(Placement(owner_E, less_ED)), loads_E, alone).tokens_s >= alone.costs.exchange_s


@given(topologies(), st.integers(1, 9), st.lists(st.integers(0, 9999), min_size=1, max_size=6))
def test_layers_that_stay_among_others_are_timed_as_one_by_one(topology: Topology, experts: int, seeds: list[int]) -> None:
    """The same bits."""
    setting = replace(settings(seeds[0], topology, 0), kind="peer_memory", rematerialise=False)
    placements = [some_plan(seed, topology, experts).placement for seed in seeds]
    loads_LE = np.stack([loads(seed, experts) for seed in seeds])
    together = pass_times(flows_of(Placements.of(*placements), topology, loads_LE), setting)
    for layer, (placement, loads_E) in enumerate(zip(placements, loads_LE, strict=True)):
        alone = pass_times(flows(Plan(placement), topology, loads_E), setting)
        assert [part_L[layer] for part_L in together] == list(alone)


@given(st.integers(2, 8), st.integers(1, 16), st.integers(0, 9999))
def test_small_experts_are_copied_everywhere_where_that_saves_the_exchange(devices: int, experts: int, seed: int) -> None:
    """With room for one copy less on a rank, the plan is that of ranks which always exchange."""
    topology, loads_E, owner_E = Topology(devices, devices), 100 * loads(seed, experts) + 1.0, np.arange(experts) % devices
    setting = Setting(topology, 1, Budget(experts, experts), rematerialise=False, costs=SMALL, kind="peer_memory")
    plan = of_one_layer(by_cost, loads_E, owner_E, setting)
    assert plan.stays and layer_time(plan, loads_E, setting).tokens_s == SMALL.order_s
    bare = Plan(without_copies(owner_E, devices))
    assert layer_time(plan, loads_E, setting).total_s < layer_time(bare, loads_E, setting).total_s
    behind = calibrated(bare, loads_E, setting)
    assert layer_time(behind, loads_E, setting, bare.placement).total_s <= layer_time(bare, loads_E, setting).total_s
    most_missing = experts - int(np.bincount(owner_E, minlength=devices).min())
    full = replace(setting, budget=Budget(experts, most_missing - 1))
    crowded = of_one_layer(by_cost, loads_E, owner_E, full)
    assert not crowded.stays
    messages = of_one_layer(by_cost, loads_E, owner_E, replace(full, kind="messages"))
    assert (crowded.placement.copies_ED == messages.placement.copies_ED).all()


@given(topologies().filter(lambda topology: topology.devices > 1), st.integers(1, 12), st.integers(0, 9999))
def test_all_experts_everywhere_are_expected_to_exchange_nothing_if_they_fit(
    topology: Topology, experts: int, seed: int
) -> None:
    owner_E, loads_E = owners(seed, topology, experts), loads(seed, experts) + 1.0
    costs = replace(settings(seed, topology, 0).costs, sum_s=0.0, expert_bytes=0.0, sum_bytes=0.0, attention_s=1e9)
    missing = experts - int(np.bincount(owner_E, minlength=topology.devices).min())
    for memory in (missing, missing - 1):
        setting = Setting(topology, 1, Budget(0, memory), rematerialise=False, costs=costs, kind="peer_memory")
        extra_LCE = np.full((1, 1, experts), topology.devices - 1)
        expected = float(expected_times(extra_LCE, loads_E[None], owner_E[None], setting, None).item())
        plan = everywhere(owner_E, topology.devices)
        time = layer_time(plan, loads_E, replace(setting, kind="peer_memory" if memory == missing else "messages"))
        assert expected == pytest.approx(time.total_s)
