"""The plan of sparse collectives: every copy arrives once, messages match, an expert enters each node once, over few hops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.placement import Placement, Topology, even_owners, without_copies
from parallel.routes import WHOLE, routes
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
    arrived: Counter[tuple[int, int, int]] = Counter()  # halves
    for hop in range(len(plans[0].hops)):
        hops = [plan.hops[hop] for plan in plans]
        within = hop == len(plans[0].across)
        before = arrived.copy()
        sent = sorted((m.expert, rank, m.peer, m.half) for rank, h in enumerate(hops) for m in h.sends)
        received = sorted((m.expert, m.peer, rank, m.half) for rank, h in enumerate(hops) for m in h.receives)
        assert sent == received
        for expert, source, target, half in sent:
            same_node = topology.node_of(source) == topology.node_of(target)
            assert same_node == within == (half == WHOLE)
            for one in (0, 1) if half == WHOLE else (half,):
                has_it = source == placement.owner_E[expert] or before[expert, source, one] == 1
                assert has_it, "a rank sends an expert that it does not have yet"
                arrived[expert, target, one] += 1
        for h in hops:
            assert list(h.sends) == sorted(h.sends, key=lambda m: (m.expert, m.peer, m.half))
            assert list(h.receives) == sorted(h.receives, key=lambda m: (m.expert, m.peer, m.half))
    copies = [(e, d) for e, d in np.argwhere(placement.copies_ED).tolist() if placement.owner_E[e] != d]
    assert arrived == Counter((*copy, half) for copy in copies for half in (0, 1))
    assert sum(plan.num_sends for plan in plans) == sum(plan.num_receives for plan in plans) == len(copies)


@given(placements())
def test_an_expert_enters_a_node_once_and_nobody_sends_more_of_it_than_it_takes(case: tuple[Placement, Topology]) -> None:
    placement, topology = case
    found = routes(placement, topology)
    assert found.across <= math.ceil(math.log2(topology.nodes))
    crossing = np.flatnonzero(found.half_M != WHOLE)
    assert (found.hop_M[crossing] < found.across).all()
    halves = list(zip(found.expert_M[crossing].tolist(), found.half_M[crossing].tolist(), strict=True))
    nodes = found.target_M[crossing] // topology.devices_per_node
    assert len({(*half, node) for half, node in zip(halves, nodes.tolist(), strict=True)}) == len(halves)
    sent, taken = (
        Counter(zip(found.expert_M[crossing].tolist(), side_M[crossing].tolist(), strict=True))
        for side_M in (found.source_M, found.target_M)
    )
    for (expert, device), count in sent.items():
        assert count <= 2, "an owner sends it once, others as much as they took: two halves"
        assert device == placement.owner_E[expert] or taken[expert, device] == 2


def test_without_copies_nothing_moves() -> None:
    plan = gather_plan(without_copies(even_owners(8, 4), 4), Topology(4, 2), 1)
    assert plan.num_sends == plan.num_receives == 0
