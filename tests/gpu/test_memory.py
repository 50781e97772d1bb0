"""What copies take of a GPU's memory at most, beside what trainer/estimate.py says: run with -s to see the table.

It needs the GPUs for itself: what other processes take of them in the meantime counts.
"""

from __future__ import annotations

import gc

import pytest
import torch

from parallel.topology import World
from tests.distributed.ranks import run_ranks
from tests.distributed.test_memory import layout
from tests.gpu.needs import gpus, hopper, linked
from tests.models import random_batch, spec, tiny_model
from trainer.batch import cross_entropy
from trainer.config.model import ModelConfig
from trainer.config.run import ParallelConfig
from trainer.estimate import GIB, memory_per_rank, vocab_size
from trainer.step import Trainer

pytestmark = [pytest.mark.gpu, gpus(2), hopper()]

RANKS, LENGTH = 2, 2048
MODEL = tiny_model(  # experts as those of Qwen3-30B-A3B, half as many, in four layers: 1.2 billion parameters
    hidden_size=2048, num_heads=32, num_kv_heads=4, head_dim=128, num_layers=5, num_experts=64, top_k=8, expert_hidden_size=768,
    dense_hidden_size=6144, num_shared_experts=0, init_std=0.02, max_positions=LENGTH, vocab_size=4096,
)  # fmt: skip
TINY = tiny_model(hidden_size=64, expert_hidden_size=32)
LAYOUTS = {
    "ep": layout(memory=0),
    "memory=4": layout(memory=4),
    "memory=16": layout(memory=16),
    "memory=4 rematerialise": layout(memory=4, rematerialise=True),
    "memory=16 rematerialise": layout(memory=16, rematerialise=True),
}


def beside_torch() -> int:
    """Bytes of this GPU that PyTorch's allocator does not hold: the context, NCCL, and memory that peers read."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def learned(world: World, model: ModelConfig, told: ParallelConfig, length: int) -> tuple[Trainer, float]:
    """After some updates; MiB of copies that a rank had room for."""
    trainer = Trainer(spec(model, parallel=told, dtype="bfloat16"), world)
    for step in range(4):  # copies come after two
        batch = random_batch(step, rows=RANKS, length=length, vocab=vocab_size(model))
        metrics = trainer.learn(batch.rows(world.rank, world.rank + 1), cross_entropy, 1e-3)
    return trainer, float(metrics["moe/copies_mib"])


def peaks(world: World, layouts: dict[str, ParallelConfig]) -> dict[str, tuple[int, float]]:
    """(bytes beyond those before the trainer at most, MiB of copies) of each layout, one after the other."""
    learned(world, TINY, layouts["memory=4"], 16)  # what libraries take at their first use is nobody's
    found = {}
    for name, told in layouts.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() + beside_torch()
        trainer, copies_mib = learned(world, MODEL, told, LENGTH)
        found[name] = torch.cuda.max_memory_allocated() + beside_torch() - before, copies_mib
        del trainer
    return found


@pytest.mark.parametrize("transport", ["messages", pytest.param("peer_memory", marks=linked(2))])
def test_what_copies_take_is_what_was_estimated(transport: str) -> None:
    layouts = {name: told.model_copy(update={"transport": transport}) for name, told in LAYOUTS.items()}
    by_rank = run_ranks(peaks, RANKS, layouts, kind="cuda")
    estimates = {
        name: memory_per_rank(MODEL, RANKS, 1, LENGTH, "bfloat16", told, recompute=False, on_gpu=True)
        for name, told in layouts.items()
    }
    most = {name: max(rank[name][0] for rank in by_rank) for name in layouts}
    print(f"\n{transport:<26}peak, over ep    estimate, over ep")
    for name, peak in most.items():
        over, told_over = peak / most["ep"] - 1, estimates[name].total / estimates["ep"].total - 1
        print(f"{name:<26}{peak / GIB:5.2f} GiB {over:+6.1%}  {estimates[name].total / GIB:5.2f} GiB {told_over:+6.1%}")
    for name, peak in most.items():
        assert peak == pytest.approx(estimates[name].total, rel=0.3), name
        room = estimates[name].copies / 2**20
        assert all(0.8 * room <= rank[name][1] <= room for rank in by_rank), f"{name}: {by_rank}, room for {room} MiB"
        if "rematerialise" in name:
            assert peak <= 1.12 * most["ep"], name
