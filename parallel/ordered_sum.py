"""Sums over ranks, whose bits depend on no message's size: every number is added in the order of the ranks, in float32.

An all-reduce may add in an order that depends on where a number stands in its message. Here an all-to-all gives each rank a
part of the message from all, and an all-gather gives the sums back: as many bytes as in a ring all-reduce. Over several nodes
of several ranks each node sums first, and only these sums travel between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.topology import World, across_and_inside, own_group
from parallel.two_level_exchange import has_two_levels


@dataclass(frozen=True)
class Level:
    """Ranks that add up what they have."""

    group: dist.ProcessGroup
    size: int


def levels(world: World) -> list[Level]:
    """This rank's groups, new ones, so that their messages wait for no others. Collective."""
    if has_two_levels(world.topology):
        across, inside = across_and_inside(world.topology)
        every = [inside, across]
    else:
        every = [[range(world.size)]]
    return [Level(own_group(world, groups), len(groups[0])) for groups in every]


def ordered_sum(message: Tensor, over: Sequence[Level]) -> Tensor:
    """The sum of the ranks' messages (N,), each partial sum rounded to their dtype; N is a multiple of the number of ranks."""
    part = message
    for level in over:
        arrived = torch.empty_like(part)
        dist.all_to_all_single(arrived, part, group=level.group, async_op=True).wait()
        rows = arrived.view(level.size, -1)
        total = rows[0].to(torch.float32, copy=True)
        for row in rows[1:]:
            total += row
        part = total.to(message.dtype)
    for level in reversed(over):
        whole = part.new_empty(part.numel() * level.size)
        dist.all_gather(list(whole.chunk(level.size)), part, group=level.group, async_op=True).wait()
        part = whole
    return part
