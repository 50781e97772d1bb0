"""What a checkpoint says of the machine is used again, options of the run that goes on with it count, and so do copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parallel.adamw import AdamWSettings
from parallel.expert_arena import ExpertShape
from parallel.expert_optimizer import DeviceAdamW
from parallel.expert_shards import ExpertShards
from parallel.expert_states import StatesInMemory
from parallel.flows import Plan
from parallel.layer_cost import LayerCosts, Link
from parallel.materialisation import MIB, Materialisation, MaterialisationSettings
from parallel.placement import even_owners, without_copies
from parallel.policies import POLICIES
from parallel.topology import World

LAYERS, EXPERTS, RANKS = 2, 8, 2
LINK = Link(1e-6, 1e-9)
COSTS = LayerCosts(1e-3, 0.0, 64.0, 1e3, 2e3, LINK, LINK, 1e-3, 0.0, 0.0, 0.0, 0.0, 0.0)  # attention hides many copies

LOADS = torch.ones(1, LAYERS, EXPERTS, dtype=torch.float64)
LOADS[:, :, :3] = 100.0  # all of the first rank
MACHINE = torch.tensor([RANKS, 8, 3, *COSTS.numbers], dtype=torch.float64)  # room for three copies of a layer


def materialisation(overlap: int | None, memory: int | None, policy: str = "hecate") -> Materialisation:
    """Of a rank of a node that has not measured anything."""
    world, shape = World(0, RANKS, torch.device("cpu"), ranks_per_node=RANKS), ExpertShape(LAYERS, EXPERTS, 8, 4)
    owner_LE = np.tile(even_owners(EXPERTS, RANKS), (LAYERS, 1))
    states = StatesInMemory(LAYERS * EXPERTS // RANKS, shape.parts, world.device)
    adamw = DeviceAdamW(states, AdamWSettings((0.9, 0.98), 1e-8, 0.0, 1.0))

    def zeros(layer: int, expert: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(part) for part in shape.parts)

    shards = ExpertShards(shape, zeros, owner_LE, 0, world, torch.float32, adamw, "messages")
    return Materialisation(shards, MaterialisationSettings(POLICIES[policy], overlap, memory, False, 0, False, top_k=2))


@pytest.mark.parametrize(
    ("overlap", "memory", "policy", "most"),
    [(None, None, "hecate", 3), (None, 1, "hecate", 1), (1, None, "hecate", 1), (0, 3, "hecate", 0), (None, 0, "plain", 0)],
)
def test_options_of_the_run_that_goes_on_count(overlap: int | None, memory: int | None, policy: str, most: int) -> None:
    resumed = materialisation(overlap, memory, policy)
    resumed.load_state(LOADS, MACHINE)
    extra_LD = np.stack([plan.placement.extra_D for plan in resumed.plans])
    assert (extra_LD.max(axis=1) == most).all()
    room = 3 if memory is None else memory
    assert resumed.shards.arena.copies == LAYERS * room
    if overlap is None and memory is None:
        assert torch.equal(resumed.machine(), MACHINE)


def test_on_other_nodes_the_machine_is_measured_again() -> None:
    resumed, elsewhere = materialisation(None, None), MACHINE.clone()
    elsewhere[0] = RANKS // 2
    resumed.load_state(LOADS, elsewhere)
    assert resumed.setting is None and resumed.shards.arena.attention is not None
    assert torch.equal(resumed.state()[-1:], LOADS) and not any(plan.placement.extra_D.any() for plan in resumed.plans)


def test_copies_are_counted_as_gates_have_left_them() -> None:
    resumed = materialisation(None, None)
    resumed.load_state(LOADS, MACHINE)
    resumed.plans[0] = Plan(without_copies(resumed.shards.owner_LE[0], RANKS))  # as `calibrate` does
    metrics = resumed.ahead(np.ones((LAYERS, EXPERTS)), updates=3).metrics
    assert metrics["moe/copies_per_layer"] == 3 / LAYERS
    assert metrics["moe/copies_mib"] == 3 * resumed.shards.arena.expert_bytes / MIB
