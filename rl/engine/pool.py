"""Several engines as one, and how samples are dealt out to them."""

from __future__ import annotations

from collections.abc import Sequence

from rl.april import EnginePool
from rl.trajectory import Sample


def deal(samples: Sequence[Sample], hands: int) -> list[list[Sample]]:
    """Splits samples over `hands` engines like cards, so that continued and fresh samples, and each group, spread evenly."""
    return [list(samples[hand::hands]) for hand in range(hands)]


class LocalPool:
    """An `EnginePool` of engines in this process, one after the other."""

    def __init__(self, engines: Sequence[EnginePool]) -> None:
        assert engines, "a pool needs an engine"
        self._engines = tuple(engines)

    def submit(self, samples: Sequence[Sample]) -> None:
        for engine, share in zip(self._engines, deal(samples, len(self._engines)), strict=True):
            engine.submit(share)

    def advance(self, tokens: int) -> list[Sample]:
        return [sample for engine in self._engines for sample in engine.advance(tokens)]

    def drain(self) -> list[Sample]:
        return [sample for engine in self._engines for sample in engine.drain()]
