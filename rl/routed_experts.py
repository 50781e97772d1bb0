"""The experts that a model chose for adjacent tokens, in a compact form that can be compared, like the rest of a trajectory."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {1: torch.uint8, 2: torch.int16}  # by bytes of a number; kernels/replay.py


@dataclass(frozen=True)
class RoutedExperts:
    """`shape`: tokens, MoE layers, experts of a token. `data`: one or two bytes an expert, in this order."""

    shape: tuple[int, int, int]
    data: bytes

    @classmethod
    def of(cls, experts_TLK: Tensor) -> RoutedExperts:
        tokens, layers, top_k = experts_TLK.shape
        assert experts_TLK.dtype in DTYPES.values(), experts_TLK.dtype
        return cls((tokens, layers, top_k), experts_TLK.cpu().contiguous().numpy().tobytes())

    @classmethod
    def joined(cls, parts: Sequence[RoutedExperts]) -> RoutedExperts:
        """Of the tokens of all parts, one or more."""
        _, layers, top_k = parts[0].shape
        return cls((sum(part.tokens for part in parts), layers, top_k), b"".join(part.data for part in parts))

    @property
    def tokens(self) -> int:
        return self.shape[0]

    def tensor(self) -> Tensor:
        """(T, L, K) uint8 or int16."""
        tokens, layers, top_k = self.shape
        dtype = DTYPES[len(self.data) // (tokens * layers * top_k)]
        return torch.frombuffer(bytearray(self.data), dtype=dtype).view(self.shape)

    def to_state(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "data": base64.b64encode(self.data).decode()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RoutedExperts:
        tokens, layers, top_k = state["shape"]
        return cls((tokens, layers, top_k), base64.b64decode(state["data"]))
