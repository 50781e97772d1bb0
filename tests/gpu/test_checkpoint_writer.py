"""Copies of a GPU's tensors for a checkpoint: pinned, whole when training goes on, and in the same memory every time."""

from __future__ import annotations

import time

import pytest
import torch

from tests.gpu.needs import gpus
from trainer.checkpoint_writer import HostCopies

pytestmark = [pytest.mark.gpu, gpus(1)]


def test_copies_of_a_gpu_are_pinned_and_whole_when_training_goes_on() -> None:
    device = torch.device("cuda", 0)
    tensors = {f"a{index}": torch.randn(1024 + index, 1024, device=device) for index in range(96)}
    tensors |= {
        "large": torch.randn(400, 2**20 // 4, device=device),
        "number": torch.ones((), device=device),
        "host": torch.ones(3),
    }
    copies, size = HostCopies(pinned=True), sum(tensor.nbytes for tensor in tensors.values())
    slabs: list[list[int]] = []
    for attempt in range(3):
        expected = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        torch.cuda.synchronize()
        started = time.perf_counter()
        taken = copies.take((name, tensor.clone()) for name, tensor in tensors.items())  # none outlives the next
        seconds = time.perf_counter() - started
        for tensor in tensors.values():
            tensor.add_(1)
        assert all(torch.equal(taken[name], tensor) for name, tensor in expected.items())
        assert all(copy.is_pinned() for copy in taken.values())
        print(f"copy {attempt}: {size / 2**30:.2f} GiB in {seconds:.3f} s, {size / 2**30 / seconds:.1f} GiB/s")
        slabs.append([slab.data_ptr() for slab in copies._slabs])
    assert slabs[0] == slabs[1] == slabs[2], "memory is used again"
