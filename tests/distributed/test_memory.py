"""What a rank on a CPU takes of its host's memory at most is what trainer/estimate.py says, copies with it, libraries aside."""

from __future__ import annotations

import ctypes
import resource
from typing import Any

import psutil
import pytest

from parallel.topology import World
from tests.distributed.ranks import run_ranks
from tests.models import parallel, random_batch, spec, tiny_model
from trainer.batch import cross_entropy
from trainer.config.model import ModelConfig
from trainer.config.run import ParallelConfig
from trainer.estimate import memory_per_rank
from trainer.step import Trainer

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of mallopt(3)
MODEL = tiny_model(hidden_size=256, expert_hidden_size=512, num_layers=5, num_shared_experts=0)  # 6 MiB of experts a layer


def grown(world: World, model: ModelConfig, told: ParallelConfig) -> tuple[float, float]:
    """(MiB that this process has had at most beyond those before its trainer, MiB of copies there was room for)"""
    # Blocks of 64 KiB and more go back when they are freed. Otherwise the C library keeps ever larger ones from the first that
    # is freed, and how full its heap is at the peak is chance.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16) == 1
    before = psutil.Process().memory_info().rss
    trainer = Trainer(spec(model, parallel=told), world)
    for step in range(4):  # copies come after two
        rows = random_batch(step, rows=2).rows(world.rank, world.rank + 1)
        metrics: dict[str, Any] = trainer.learn(rows, cross_entropy, 1e-3)
    assert trainer.experts.arena.attention is None, "its events would add up: it is known by now, or nothing travels under it"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (most - before) / MIB, metrics["moe/copies_mib"]


def layout(**changes: Any) -> ParallelConfig:
    """EPLB fills all room for copies; messages, because pages that ranks share would be counted for each."""
    return parallel(policy="eplb", overlap=8, reshard_every=0, transport="messages", **changes)


def test_the_peak_of_a_rank_is_what_was_estimated() -> None:
    libraries = max(most for most, _ in run_ranks(grown, 2, tiny_model(num_layers=5), layout(memory=0)))
    peaks = {}
    for name, told in (
        ("owners alone", layout(memory=0)),
        ("copies of all layers", layout(memory=4)),
        ("copies of one layer", layout(memory=4, rematerialise=True)),
    ):
        estimated = memory_per_rank(MODEL, 2, 1, 12, "float32", told, recompute=False, on_gpu=False)
        found = run_ranks(grown, 2, MODEL, told)
        peaks[name] = min(most for most, _ in found) - libraries
        assert peaks[name] == pytest.approx(estimated.total / MIB, rel=0.15), name
        assert all(copies == pytest.approx(estimated.copies / MIB) for _, copies in found), name
    assert peaks["copies of all layers"] - peaks["owners alone"] > 0.9 * 4 * 6, "copies of four layers take no memory"
