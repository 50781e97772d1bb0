"""On a GPU an update tells its MFU and how long the GPU had nothing to do.

Needs its GPU alone: what else is at work there shows.
"""

from __future__ import annotations

import time

import pytest
import torch

from tests.gpu.needs import gpus
from trainer.usage import SAMPLE_S, IdleWatch, published_peak

pytestmark = [pytest.mark.gpu, gpus(1)]


def test_the_watch_tells_work_from_rest() -> None:
    device = torch.device("cuda", 0)
    watch = IdleWatch.of(device)
    assert watch is not None, "NVML tells nothing of this GPU"
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + 4
    while time.perf_counter() < end:
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()
    busy = watch.take()
    time.sleep(4)
    idle = watch.take()
    print(f"idle of 4 s at work: {busy:.2f}, at rest: {idle:.2f}; samples every {SAMPLE_S} s")
    assert busy < idle
    short = []
    for _ in range(50):
        time.sleep(SAMPLE_S / 10)
        short.append(watch.take())
    assert min(short) > SAMPLE_S / 20, "what is too short to look at is as idle as the time before it"


def test_the_peak_of_this_gpu_is_known() -> None:
    name = torch.cuda.get_device_name(0)
    assert published_peak(name, "bfloat16") is not None, name
