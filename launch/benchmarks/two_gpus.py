"""The model of time compared with two GPUs: a layer that ran on two H200, predicted from conf/machine/h200.yaml.

Measured on 2026-11-26 (tests/benchmarks/fssdp.md): forward and backward of an MoE layer of Qwen3-30B-A3B, 16,384 tokens a rank,
without attention, over NVLink, for three kinds of loads, with copies by cost and without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch

from launch.benchmarks.experts import zipf_ranks
from launch.benchmarks.options import SHAPES
from launch.machines import layer_costs, read_machine
from parallel.layer_cost import Setting, layer_time
from parallel.placement import Budget, Floats, Topology, even_owners
from parallel.policies import POLICIES, of_one_layer

TOKENS, MEMORY = 16384, 32  # of a rank, and the copies that it had room for
MEASURED_MS: Mapping[str, Mapping[str, float]] = {  # routing -> policy
    "even": {"cost": 8.70, "plain": 8.69},
    "zipf": {"cost": 8.92, "plain": 9.55},
    "hot": {"cost": 9.29, "plain": 12.9},
}


@cache
def predicted_over_measured() -> dict[str, dict[str, float]]:
    """routing -> policy -> ratio."""
    shape, topology = SHAPES["qwen3_30b_a3b"], Topology(2, 2)
    costs = layer_costs(read_machine("h200"), shape.hidden, shape.expert_hidden, attention_flops=0.0)
    setting = Setting(topology, shape.top_k, Budget(shape.experts, MEMORY), False, costs, "peer_memory")
    owner_E, found = even_owners(shape.experts, topology.devices), dict[str, dict[str, float]]()
    for routing, measured in MEASURED_MS.items():
        loads_E = _loads(routing)
        plans = {policy: of_one_layer(POLICIES[policy], loads_E, owner_E, setting) for policy in measured}
        found[routing] = {
            policy: 1e3 * layer_time(plan, loads_E, setting).total_s / measured[policy] for policy, plan in plans.items()
        }
    return found


def _loads(routing: str) -> Floats:
    """Entries of each expert from both ranks."""
    shape = SHAPES["qwen3_30b_a3b"]
    ranks_TK = zipf_ranks(shape, 2 * TOKENS, torch.Generator().manual_seed(0))
    ranked_E: Floats = torch.bincount(ranks_TK.flatten(), minlength=shape.experts).double().numpy()
    if routing == "even":
        return np.full(shape.experts, ranked_E.mean())
    return np.random.default_rng(0).permutation(ranked_E) if routing == "zipf" else ranked_E


def told() -> str:
    """The errors in a line."""
    parts = [
        ", ".join(f"{routing} {ratios[policy] - 1:+.0%}" for routing, ratios in predicted_over_measured().items())
        for policy in ("cost", "plain")
    ]
    where = "the model over what two H200 took, forward and backward (tests/benchmarks/fssdp.md)"
    return f"{where}: copies by cost {parts[0]}; no copies {parts[1]}"
