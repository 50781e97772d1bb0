"""The token exchange over nodes of several ranks: a token crosses to another node once, and is spread inside it.

The first leg goes to the rank of the same place in each node that serves any of a token's choices, so what goes between nodes
is a row a node, whatever K (as in DeepSeek-V3, arXiv 2412.19437, section 3.2.2). The second goes on to the ranks of that node.
Results are summed inside the node, in float32 and rounded to their dtype, before one row crosses back, and gradients likewise:
so numbers differ from those of one level by the order of sums. Each level has process groups of its own: links of both kinds
carry at the same time, other chunks of the same layer (FSMoE, arXiv 2501.10714, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import UserError
from parallel.hooks import Hooks
from parallel.placement import Topology
from parallel.topology import World, across_and_inside, own_group
from parallel.ways import Level, Levels


def two_levels(world: World, hooks: Hooks) -> Levels:
    """Between nodes, then inside them. Makes process groups: all ranks call it together."""
    topology = world.topology
    across, inside = (own_group(world, groups) for groups in across_and_inside(topology))
    size = topology.devices_per_node
    return Level(world, across, topology.nodes, size, hooks), Level(world, inside, size, 1, hooks)


def has_two_levels(topology: Topology) -> bool:
    """Whether there are several nodes with several ranks each."""
    return topology.nodes > 1 and topology.devices_per_node > 1


def check_two_levels(topology: Topology) -> None:
    """Raises UserError where one of the levels has nothing to carry."""
    if not has_two_levels(topology):
        nodes = f"{topology.nodes} node{'s' * (topology.nodes > 1)}"
        raise UserError(
            f"transport=two_level, but {topology.devices} ranks on {nodes} of {topology.devices_per_node} leave one level "
            "only: there have to be several nodes with several ranks each; set transport=auto"
        )


def rows_across(rank_TK: Tensor, rank: int, topology: Topology) -> tuple[int, int]:
    """How many rows of `rank`'s tokens go to other nodes: (one for each rank there that serves a token, one for each node)."""
    tokens, size = rank_TK.shape[0], topology.devices_per_node
    served_TW = torch.zeros(tokens, topology.devices + 1, dtype=torch.bool, device=rank_TK.device)
    served_TW = served_TW.scatter_(1, rank_TK.long() + 1, True)[:, 1:]  # before it what is absent, -1
    served_TW[:, rank // size * size : (rank // size + 1) * size] = False
    return int(served_TW.sum()), int(served_TW.unflatten(1, (-1, size)).any(dim=2).sum())
