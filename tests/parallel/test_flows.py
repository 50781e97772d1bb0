"""Dispatch goes to holders, near first, and loses nothing; the flows are what it amounts to."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.flows import flows, shares
from parallel.placement import Topology
from tests.parallel.plans import loads, plans, topologies


@given(topologies(), st.integers(1, 16), st.integers(0, 9999))
def test_shares_go_to_holders_and_near_ones_first(topology: Topology, experts: int, seed: int) -> None:
    plan = plans(seed, topology, experts)
    copies_ED = plan.placement.copies_ED
    for device in range(topology.devices):
        shares_ED = shares(plan, topology, device)
        np.testing.assert_allclose(shares_ED.sum(axis=1), 1.0)
        assert not shares_ED[~copies_ED].any()
        if plan.nearest_first:
            assert (shares_ED[copies_ED[:, device], device] == 1.0).all()
            first = topology.node_of(device) * topology.devices_per_node
            mine = slice(first, first + topology.devices_per_node)
            served_near_E = plan.weights_ED[:, mine].any(axis=1)
            np.testing.assert_allclose(shares_ED[served_near_E, mine].sum(axis=1), 1.0)


@given(topologies(), st.integers(1, 16), st.integers(0, 9999))
def test_flows_are_the_sums_of_the_shares(topology: Topology, experts: int, seed: int) -> None:
    plan, loads_E = plans(seed, topology, experts), loads(seed, experts)
    devices, node_D = topology.devices, np.arange(topology.devices) // topology.devices_per_node
    sent_DD = np.stack([(loads_E[:, None] / devices * shares(plan, topology, d)).sum(axis=0) for d in range(devices)])
    near_DD = (node_D[:, None] == node_D) & ~np.eye(devices, dtype=bool)
    far_DD = node_D[:, None] != node_D
    found = flows(plan, topology, loads_E)
    wanted = {
        "entries_D": sent_DD.sum(axis=0),
        "within_in_D": (sent_DD * near_DD).sum(axis=0),
        "within_out_D": (sent_DD * near_DD).sum(axis=1),
        "across_in_D": (sent_DD * far_DD).sum(axis=0),
        "across_out_D": (sent_DD * far_DD).sum(axis=1),
    }
    for name, wanted_D in wanted.items():
        np.testing.assert_allclose(getattr(found, name), wanted_D, atol=1e-9, err_msg=name)
    served_ED = sum(shares(plan, topology, d) for d in range(devices)) > 0
    np.testing.assert_array_equal(found.experts_D, (served_ED & (loads_E > 0)[:, None]).sum(axis=0))
