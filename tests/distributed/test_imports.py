"""What a rank imports, which is most of what it computes before its first update."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.topology import join, leave
from tests.models import parallel, random_batch, spec, tiny_model
from trainer.batch import cross_entropy
from trainer.step import Trainer

pytestmark = pytest.mark.cpu_adam


def test_an_update_imports_no_compiler(tmp_path: Path) -> None:
    """In a process of its own: the server that other ranks are forked from has imported what some of them need."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        found = fresh.submit(_compilers_after_updates, tmp_path / "store").result()
    assert found == {"none": set(), "cpu": set()}


def _compilers_after_updates(store: Path) -> dict[str, set[str]]:
    """By where the optimizer is, one after the other."""
    world, found = join(dist.FileStore(str(store), 1), 0, 1, torch.device("cpu"), timeout_s=60), {}
    assert "deepspeed" not in sys.modules, "its import would be none of the update's"
    for offload in ("none", "cpu"):
        Trainer(spec(tiny_model(), parallel=parallel(offload=offload)), world).learn(random_batch(0), cross_entropy, 1e-2)
        found[offload] = {"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()
    leave(world)
    return found
