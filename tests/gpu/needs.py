"""What tests on GPUs need of the machine: marks that skip where it is missing, and say what.

Ranks that a test spawns import this too, some before they say which GPU they see, so the driver is asked and not CUDA, which
would then have chosen. It counts GPUs as the machine does, whatever CUDA_VISIBLE_DEVICES says; those of one machine are alike.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from parallel.peer_memory import nvlinks

GPUS = torch.cuda.device_count()
RANKS = 1 << max(GPUS.bit_length() - 1, 0)  # the most whose number is a power of two: experts and rows divide by it
HOPPER = (9, 0)  # the compute capability that kernels/hopper is for


def gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(count > GPUS, reason=f"needs {count} CUDA devices, there are {GPUS}")


def hopper() -> pytest.MarkDecorator:
    """Of tests that compute in bfloat16, as runs on GPUs do if nothing else is asked for."""
    capability = _capability() if GPUS else None
    return pytest.mark.skipif(capability != HOPPER, reason=f"needs a Hopper GPU, compute capability 9.0, not {capability}")


def linked(count: int) -> pytest.MarkDecorator:
    """Of tests whose ranks read each other's memory, on the first GPUs."""
    missing = count > GPUS or not _linked(count)
    return pytest.mark.skipif(missing, reason=f"needs NVLink between {count} CUDA devices, the first of {GPUS}")


@cache
def _capability() -> tuple[int, int]:
    import pynvml

    pynvml.nvmlInit()
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0))
    pynvml.nvmlShutdown()
    return major, minor


@cache
def _linked(count: int) -> bool:
    import pynvml

    pynvml.nvmlInit()
    names = [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    pynvml.nvmlShutdown()
    return all(found for own in names for name, found in nvlinks(own, names).items() if name != own)
