"""Tensors as one block of bytes, for the transfer from the trainer to the engines, and a hash that proves that they arrived.

Ray moves a NumPy array through shared memory without a copy, while it would serialise each tensor of a dictionary by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGEST_BYTES = 1 << 24  # hashed as a piece; the pieces are spread over the threads
ALIGNMENT = 16  # bytes; every tensor starts at a multiple, so that it can be viewed in its dtype


@dataclass(frozen=True)
class PackedTensors:
    """`layout` says for each name where its bytes begin, its dtype ("bfloat16") and its shape."""

    data: NDArray[np.uint8]
    layout: Mapping[str, tuple[int, str, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def pack(tensors: Mapping[str, Tensor]) -> PackedTensors:
    """Copies tensors of any device into one block on the CPU."""
    layout, end = {}, 0
    for name, tensor in tensors.items():
        layout[name] = (end, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    data = torch.zeros(end, dtype=torch.uint8)
    for (start, _, _), tensor in zip(layout.values(), tensors.values(), strict=True):
        data[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8).cpu()
    return PackedTensors(data.numpy(), layout)


def unpack(packed: PackedTensors) -> dict[str, Tensor]:
    """The tensors, as views of the block; it may be read-only, so they are for reading."""
    block = torch.frombuffer(packed.data.data, dtype=torch.uint8) if packed.data.size else torch.empty(0)
    tensors = {}
    for name, (start, dtype_name, shape) in packed.layout.items():
        dtype = getattr(torch, dtype_name)
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        tensors[name] = block[start : start + size].view(dtype).view(shape)
    return tensors


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A content hash of every tensor, of any device: SHA-256 of dtype, shape and the SHA-256 of each piece of its bytes.

    The standard library's, because processors have instructions for it and it runs on all of torch's threads at once: nearly
    2 GB/s a core.
    """
    names, pieces = list[str](), list[Tensor]()
    for name, tensor in tensors.items():
        parts = tensor.detach().contiguous().view(-1).view(torch.uint8).split(DIGEST_BYTES)
        names += [name] * len(parts)
        pieces += parts
    wholes = {n: hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode()) for n, t in tensors.items()}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, digest in zip(names, pool.map(_digest, pieces), strict=True):
            wholes[name].update(digest)
    return {name: whole.hexdigest() for name, whole in wholes.items()}


def _digest(piece: Tensor) -> bytes:
    return hashlib.sha256(piece.cpu().numpy().data).digest()
