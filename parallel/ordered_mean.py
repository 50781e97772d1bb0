"""Means over ranks, whose bits depend on no message's size: every number is added in the order of the ranks, in float32.

An all-reduce may add in an order that depends on where a number stands in its message. Here each rank gets a part of the
message from all and gives their mean back: as many bytes as in a ring all-reduce. Both ways are collectives, an all-to-all and
an all-gather; over several nodes of several ranks each node sums first, and only these sums travel between nodes. Where ranks
read each other's memory both ways are copies out of it, which copy engines of a GPU make beside its computing. The kernels of a
collective would take processors from the products of the backward pass for as long as the links need.

Letters: N numbers of a message, a multiple of the ranks; W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.accumulate import add_rows
from parallel.all_to_all import AllToAll
from parallel.peer_memory import PeerMemory, view
from parallel.topology import World, across_and_inside, own_group
from parallel.two_level_exchange import has_two_levels


class Means(Protocol):
    """All ranks make the same calls in the same order."""

    def room(self, numbers: int) -> Tensor:
        """Where a message (N,) is to be written."""

    def mean(self, message_N: Tensor) -> Tensor:
        """Of the ranks' messages, each written where `room` said: (N,)."""


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


class MessageMeans:
    """Over process groups."""

    def __init__(self, over: Sequence[Level], dtype: torch.dtype, device: torch.device) -> None:
        self._levels, self._dtype, self._device = over, dtype, device

    def room(self, numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=self._dtype, device=self._device)

    def mean(self, message_N: Tensor) -> Tensor:
        """Sums of the ranks of a node are rounded to the messages' dtype before they travel on."""
        part, ranks = message_N, 1
        for level in self._levels:
            arrived = torch.empty_like(part)
            each = [part.numel() // level.size] * level.size
            AllToAll(arrived, part, each, each, level.group).wait()
            part = torch.empty_like(part[: each[0]])
            ranks *= level.size
            add_rows(arrived.view(level.size, -1), ranks if level is self._levels[-1] else 1, part)
        for level in reversed(self._levels):
            whole = part.new_empty(part.numel() * level.size)
            dist.all_gather(list(whole.chunk(level.size)), part, group=level.group, async_op=True).wait()
            part = whole
        return part


class PeerMeans:
    """Where every rank reads every other's memory. Made by all ranks together."""

    def __init__(self, world: World, most: int, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        """`most`: numbers of a message. `group`: of the ranks, in which nothing else is under way."""
        self.world = world
        part = -(-most // world.size)
        messages = part * world.size
        self._memory = PeerMemory(world, (messages + part) * dtype.itemsize, group)
        self._message_of = [view(block, 0, (messages,), dtype) for block in self._memory.of_rank]
        self._mean_of = [view(block, messages * dtype.itemsize, (part,), dtype) for block in self._memory.of_rank]
        self._arrived = torch.empty(messages, dtype=dtype, device=world.device)

    def room(self, numbers: int) -> Tensor:
        """All ranks are through with the message before, as this one's mean is there."""
        return self._message_of[self.world.rank][:numbers]

    def mean(self, message_N: Tensor) -> Tensor:
        rank, ranks = self.world.rank, self.world.size
        part = message_N.numel() // ranks
        arrived_WN = self._arrived[: message_N.numel()].view(ranks, part)
        # From the next rank on, so that not all read from the same one at once.
        in_turn = [(rank + step) % ranks for step in range(1, ranks + 1)]
        self._memory.meet()
        for r in in_turn:
            arrived_WN[r].copy_(self._message_of[r][rank * part : (rank + 1) * part], non_blocking=True)
        add_rows(arrived_WN, ranks, self._mean_of[rank][:part])
        self._memory.meet()
        means_N = torch.empty_like(message_N)
        for r in in_turn:
            means_N[r * part : (r + 1) * part].copy_(self._mean_of[r][:part], non_blocking=True)
        return means_N
