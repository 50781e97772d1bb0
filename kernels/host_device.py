"""Numbers between host and device, with no more waiting than necessary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED = 16  # bytes, at a multiple of which numbers begin that came together: kernels are compiled for that


def to_host(numbers: Tensor) -> Callable[[], Tensor]:
    """Sets out for the host; what is returned waits for what was started until here, and for nothing after it."""
    if not numbers.is_cuda:
        return lambda: numbers
    arrived = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    there = torch.cuda.current_stream().record_event()

    def wait() -> Tensor:
        there.synchronize()
        return arrived

    return wait


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Flat arrays of one type in one transfer, for which the host does not wait."""
    each = ALIGNED // arrays[0].itemsize
    starts = np.cumsum([0, *(-(-len(array) // each) * each for array in arrays)]).tolist()
    together = pinned(torch.from_numpy(np.zeros(starts[-1], dtype=arrays[0].dtype)), device)
    for start, array in zip(starts, arrays, strict=False):
        together[start : start + len(array)] = torch.from_numpy(array)
    there = together.to(device, non_blocking=True)
    return [there[start : start + len(array)] for start, array in zip(starts, arrays, strict=False)]


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Pinned memory, so that a copy to a GPU does not wait for what it still has to do."""
    return values.pin_memory() if device.type == "cuda" else values
