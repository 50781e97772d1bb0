"""The plan of sparse collectives: every copy arrives once, messages match, an expert enters each node once, over few hops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.placement import Placement, Topology, even_owners, without_copies
from parallel.routes import routes
from parallel.sparse_collectives import gather_plan


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, Topology]:
    topology = Topology(draw(st.integers(1, 4)) * (per_node := draw(st.integers(1, 4))), per_node)
    experts = draw(st.integers(1, 12))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owner_E = random.integers(0, topology.devices, experts)
    copies_ED = random.random((experts, topology.devices)) < draw(st.floats(0, 1))
    copies_ED[np.arange(experts), owner_E] = True
    return Placement(owner_E, copies_ED), topology


@given(placements())
def test_every_copy_arrives_once_and_messages_match(case: tuple[Placement, Topology]) -> None:
    placement, topology = case
    plans = [gather_plan(placement, topology, rank) for rank in range(topology.devices)]
    arrived: Counter[tuple[int, int]] = Counter()
    for hop in range(len(plans[0].hops)):
        hops = [plan.hops[hop] for plan in plans]
        within = hop == len(plans[0].across)
        before = arrived.copy()
        sent = sorted((m.expert, rank, m.peer) for rank, h in enumerate(hops) for m in h.sends)
        received = sorted((m.expert, m.peer, rank) for rank, h in enumerate(hops) for m in h.receives)
        assert sent == received
        for expert, source, target in sent:
            same_node = topology.node_of(source) == topology.node_of(target)
            assert same_node == within
            has_it = source == placement.owner_E[expert] or before[expert, source] == 1
            assert has_it, "a rank sends an expert that it does not have yet"
            arrived[expert, target] += 1
        for h in hops:
            assert list(h.sends) == sorted(h.sends, key=lambda m: (m.expert, m.peer))
            assert list(h.receives) == sorted(h.receives, key=lambda m: (m.expert, m.peer))
    wanted = {(e, d) for e, d in np.argwhere(placement.copies_ED).tolist() if placement.owner_E[e] != d}
    assert arrived == Counter(wanted)


@given(placements())
def test_an_expert_enters_a_node_once(case: tuple[Placement, Topology]) -> None:
    placement, topology = case
    entered = Counter(
        (message.expert, topology.node_of(message.peer))
        for rank in range(topology.devices)
        for hop in gather_plan(placement, topology, rank).across
        for message in hop.sends
    )
    assert not entered or max(entered.values()) == 1


@given(placements())
def test_nodes_are_reached_in_a_logarithm_of_hops_and_nobody_sends_to_all(case: tuple[Placement, Topology]) -> None:
    placement, topology = case
    found = routes(placement, topology)
    assert found.across <= math.ceil(math.log2(topology.nodes))
    crossing = found.hop_M < found.across
    for side_M in (found.source_M, found.target_M):
        each = list(zip(*(numbers_M[crossing].tolist() for numbers_M in (found.hop_M, found.expert_M, side_M)), strict=True))
        assert len(set(each)) == len(each), "a device sends or takes an expert twice in a hop"


def test_without_copies_nothing_moves() -> None:
    plan = gather_plan(without_copies(even_owners(8, 4), 4), Topology(4, 2), 1)
    assert plan.num_sends == plan.num_receives == 0
