"""Random legal loads, owners, plans and machines, for the tests of planning."""

from __future__ import annotations

from typing import get_args

import numpy as np
from hypothesis import strategies as st

from parallel.flows import Plan
from parallel.layer_cost import NUMBERS, LayerCosts, Setting
from parallel.placement import Budget, Floats, Ints, Placement, Topology, TransportKind


def topologies() -> st.SearchStrategy[Topology]:
    return st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda pair: Topology(pair[0] * pair[1], pair[1]))


def loads(seed: int, *shape: int) -> Floats:
    """From even to very skewed, with experts that nobody chose, or none chosen at all."""
    random = np.random.default_rng(seed)
    found = random.integers(0, 100, shape) * random.random(shape) ** (seed % 7) * (random.random(shape) < 0.8)
    return np.asarray(np.floor(found * (seed % 11 > 0)), dtype=np.float64)


def owners(seed: int, topology: Topology, *shape: int) -> Ints:
    return np.random.default_rng(seed).integers(0, topology.devices, shape)


def plans(seed: int, topology: Topology, experts: int) -> Plan:
    """Any holders, with any weights; some holders get nothing."""
    random = np.random.default_rng(seed)
    owner_E = owners(seed, topology, experts)
    copies_ED = random.random((experts, topology.devices)) < random.random()
    copies_ED[np.arange(experts), owner_E] = True
    weight_ED = copies_ED * random.random(copies_ED.shape) * (random.random(copies_ED.shape) < 0.7)
    weight_ED[np.arange(experts), owner_E] += 0.1
    return Plan(Placement(owner_E, copies_ED), weight_ED if seed % 3 else None, nearest_first=seed % 2 == 0)


def settings(seed: int, topology: Topology, memory: int) -> Setting:
    """From machines on which weights cost nothing to those on which tokens do not."""
    random = np.random.default_rng(seed)
    costs = LayerCosts.from_numbers((random.random(NUMBERS) * 10.0 ** random.integers(-3, 3, NUMBERS)).tolist())
    budget, kinds = Budget(int(random.integers(0, 20)), memory), get_args(TransportKind)
    return Setting(topology, 1 + seed % 4, budget, seed % 2 == 0, costs, kinds[seed % len(kinds)])
