"""Hecate's placements are within memory and never busier than none; owners stay equally many and move for a gain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.flows import Plan, device_loads, imbalance
from parallel.placement import Budget, Floats, Ints, Topology, without_copies
from parallel.planning import LESS, WORTH_MOVING, apportion, busiest, hottest, materialise, reshard
from tests.parallel.plans import loads, owners, topologies


@given(topologies(), st.integers(1, 16), st.integers(0, 20), st.integers(0, 20), st.integers(0, 9999))
def test_copies_are_of_the_hottest_within_memory_and_help(topology: Topology, experts: int, t: int, m: int, seed: int) -> None:
    loads_E, owner_E = loads(seed, experts), owners(seed, topology, experts)
    placement = materialise(loads_E, owner_E, topology, Budget(t, m))
    assert (placement.extra_D <= m).all()
    copied = set(np.flatnonzero(placement.copies_ED.sum(axis=1) > 1).tolist())
    assert copied <= set(hottest(loads_E, t).tolist())
    again = materialise(loads_E.copy(), owner_E.copy(), topology, Budget(t, m))
    assert (again.copies_ED == placement.copies_ED).all()
    bare = without_copies(owner_E, topology.devices)
    if t == 0 or m == 0:
        assert (placement.copies_ED == bare.copies_ED).all()
    busiest, alone = (device_loads(Plan(p), topology, loads_E).max() for p in (placement, bare))
    assert busiest <= alone, "copies leave the busiest device more to do than none"
    if copied and m >= t:
        assert placement.copies_ED[list(copied)].all(), "what has room everywhere goes everywhere"


@given(topologies(), st.integers(1, 16), st.integers(0, 9999))
def test_with_room_for_everything_no_device_is_busier(topology: Topology, experts: int, seed: int) -> None:
    loads_E, owner_E = loads(seed, experts), owners(seed, topology, experts)
    placement = materialise(loads_E, owner_E, topology, Budget(experts, experts))
    assert imbalance(device_loads(Plan(placement), topology, loads_E)) <= 1 / LESS + 1e-9


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(0, 60), st.integers(1, 9))
def test_seats_are_apportioned_fairly(weights: list[int], seats: int, most: int) -> None:
    weights_E = np.array(weights, dtype=np.float64)
    given_E = apportion(weights_E, seats, most)
    assert given_E.sum() == min(seats, most * len(weights)) and given_E.max() <= most
    order = np.argsort(-weights_E, kind="stable")
    assert (np.diff(given_E[order]) <= 1).all(), "more weight, fewer seats"


def test_hecate_on_a_zipf_load() -> None:
    """32 devices on 4 nodes, 64 experts: the more may be copied, the more even."""
    topology = Topology(32, 8)
    loads_E = 1.0 / np.arange(1, 65)
    owner_E = np.arange(64) // 2
    found = [
        imbalance(device_loads(Plan(materialise(loads_E, owner_E, topology, Budget(t, m))), topology, loads_E))
        for t, m in [(0, 0), (4, 4), (8, 2), (16, 4), (32, 4), (64, 8)]
    ]
    assert found[0] == pytest.approx(1.5 / loads_E.sum() * 32)
    assert found == sorted(found, reverse=True) and found[1] < 3 and found[-1] < 1.15, found


@given(topologies(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 6), st.integers(0, 9999))
def test_owners_stay_equally_many_and_move_only_for_a_gain(
    topology: Topology, layers: int, each: int, t: int, seed: int
) -> None:
    experts = each * topology.devices
    random = np.random.default_rng(seed)
    owner_LE = random.permutation(np.repeat(np.arange(topology.devices), layers * each)).reshape(layers, experts)
    loads_LE = loads(seed, layers, experts)

    def plan(loads_LE: Floats, owner_LE: Ints) -> list[Plan]:
        return [Plan(materialise(*one, topology, Budget(t, t))) for one in zip(loads_LE, owner_LE, strict=True)]

    new_LE, plans = reshard(loads_LE, owner_LE, topology, t, plan)
    assert (np.bincount(new_LE.ravel(), minlength=topology.devices) == layers * each).all()
    if (new_LE != owner_LE).any():
        before, after = (busiest(loads_LE, plan(loads_LE, owner), topology) for owner in (owner_LE, new_LE))
        assert after <= WORTH_MOVING * before
    assert all((one.placement.owner_E == owner_E).all() for one, owner_E in zip(plans, new_LE, strict=True))
    assert reshard(loads_LE, new_LE, topology, t, plan)[0] is new_LE, "a second look moves more"
