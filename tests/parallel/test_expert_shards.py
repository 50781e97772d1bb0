"""Moves between owners fall into rounds that any memory has room for; gradients that kernels add are those handed over."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.adamw import AdamWSettings
from parallel.expert_arena import ExpertArena, ExpertShape
from parallel.expert_optimizer import DeviceAdamW
from parallel.expert_shards import exchanges
from parallel.expert_states import StatesInMemory
from parallel.placement import without_copies
from parallel.topology import World


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_in_a_round_a_rank_gives_one_expert_and_gets_one(size: int, layers: int, per_rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(size), layers * per_rank)
    old_LE, new_LE = (random.permutation(owners).reshape(layers, -1) for _ in range(2))
    held_LE = old_LE.copy()
    for moves in exchanges(old_LE, new_LE):
        givers, takers = [move.source for move in moves], [move.target for move in moves]
        assert len(set(givers)) == len(givers) and sorted(givers) == sorted(takers)
        for move in moves:
            assert held_LE[move.layer, move.expert] == move.source
            held_LE[move.layer, move.expert] = move.target
    assert (held_LE == new_LE).all()
    assert sum(len(moves) for moves in exchanges(old_LE, new_LE)) == (old_LE != new_LE).sum()


def test_gradients_that_a_kernel_adds_by_itself_are_those_that_are_handed_over() -> None:
    alone, shape = World(0, 1, torch.device("cpu"), ranks_per_node=1), ExpertShape(2, 4, 8, 4)
    found = []
    for by_itself in (False, True):
        adamw = DeviceAdamW(StatesInMemory(8, shape.parts, alone.device), AdamWSettings((0.9, 0.98), 1e-8, 0.0, 1.0))
        sums = adamw.sums if by_itself else None
        arena = ExpertArena(shape, 8, 0, alone, torch.float32, adamw.add_gradients, "messages", sums=sums)
        arena.place([without_copies(np.zeros(4, dtype=np.int64), 1)] * 2)
        generator = torch.Generator().manual_seed(0)
        for micro_batch in range(2):
            with arena.backward_pass():
                for layer in (1, 0):
                    parts = tuple(torch.randn(4, *part, generator=generator) for part in shape.parts)
                    own = arena.sums(layer)
                    assert (own is not None) == by_itself
                    for total, part in zip(own or (), parts, strict=False):
                        assert total.fresh == (micro_batch == 0)
                        total.total_EAB.copy_(part) if total.fresh else total.total_EAB.add_(part)
                    arena.return_gradients(layer, tuple(part[4:] for part in parts) if by_itself else parts)
        found.append(adamw.gradients())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[0] is not None and all(bool(part.any()) for part in found[0])
