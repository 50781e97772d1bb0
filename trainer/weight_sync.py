"""The sender's side of weight sync: what was sent last, and what has to be sent now.

A delta builds on the version before it. Every `anchor_every`-th update is an anchor, the whole weights; a receiver that has
just started takes the last anchor and the deltas since.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config.rl import SyncConfig
from trainer.weight_delta import WeightDelta, difference
from trainer.weights import PackedTensors, digests, unpack


@dataclass(frozen=True)
class WeightUpdate:
    """Weights of `version`: all of them, or what changed. `digests`: of all tensors, where engines are to check theirs."""

    version: int
    weights: PackedTensors | WeightDelta
    digests: Mapping[str, str] | None
    hashing_s: float

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes


class WeightSource:
    """Rank 0's memory of the weights sent last: as much host memory as the weights take, kept only where deltas are wanted."""

    def __init__(self) -> None:
        self._sent: PackedTensors | None = None
        self._version = 0  # of what was sent
        self._deltas = 0  # since the last anchor

    def update(self, weights: PackedTensors, version: int, config: SyncConfig) -> WeightUpdate:
        """What brings engines with the last version to these weights: a delta if it is wanted, possible and smaller."""
        started = time.perf_counter()
        found = digests(unpack(weights)) if config.check else None
        hashing_s = time.perf_counter() - started if config.check else 0.0
        content: PackedTensors | WeightDelta = weights
        if self._sent is not None and self._deltas + 1 < config.anchor_every:
            delta = difference(self._sent, weights, self._version)
            content = delta if delta.nbytes < weights.nbytes else weights
        self._deltas = self._deltas + 1 if isinstance(content, WeightDelta) else 0
        self._sent = weights if config.anchor_every > 1 else None
        self._version = version
        return WeightUpdate(version, content, found, hashing_s)
