"""Rows to every rank and from every rank, several under way at once, in a group of all ranks and in groups of some."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel.all_to_all import AllToAll
from parallel.topology import World, own_group
from tests.distributed.ranks import run_ranks

UNDER_WAY, WIDTH = 5, 3


def counts(size: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.int64]]:
    """Rows of each exchange from each member to each; many are none."""
    random = np.random.default_rng(size)
    return random.integers(0, 4000, (UNDER_WAY, size, size)) * (random.random((UNDER_WAY, size, size)) < 0.7)


def rows(turn: int, source: int, target: int, count: int) -> Tensor:
    return (1e6 * turn + 1e5 * source + 1e4 * target) + torch.arange(float(count * WIDTH)).view(count, WIDTH) / WIDTH


def exchange(world: World, groups: list[range]) -> list[list[list[int]]]:
    """(under way at once, member) of the group -> its counts, once every row is where it belongs."""
    group = own_group(world, groups) if len(groups) > 1 else None
    members = next(ranks for ranks in groups if world.rank in ranks)
    size, here = len(members), members.index(world.rank)
    under_way = []
    for turn, counts_WW in enumerate(counts(size)):
        send_W, receive_W = counts_WW[here].tolist(), counts_WW[:, here].tolist()
        sent = torch.cat([rows(turn, here, peer, count) for peer, count in enumerate(send_W)])
        received = torch.full((sum(receive_W), WIDTH), torch.nan)
        under_way.append((AllToAll(received, sent, receive_W, send_W, group), received, receive_W))
    for turn, (one, received, receive_W) in reversed(list(enumerate(under_way))):
        one.wait()
        ends = [0, *accumulate(receive_W)]
        for peer, count in enumerate(receive_W):
            assert torch.equal(received[ends[peer] : ends[peer + 1]], rows(turn, peer, here, count))
    return [receive_W for _, _, receive_W in under_way]


@pytest.mark.parametrize(
    ("size", "groups"),
    [(2, [range(2)]), (5, [range(5)]), (4, [range(0, 4, 2), range(1, 4, 2)])],
    ids=["two", "five", "every second of four"],
)
def test_every_row_comes_from_whom_it_was_sent(size: int, groups: list[range]) -> None:
    by_rank = run_ranks(exchange, size, groups)
    received = sum(count for found in by_rank for receive_W in found for count in receive_W)
    assert received == len(groups) * counts(len(groups[0])).sum() > 0
