"""Several engines as one, and how samples are distributed over them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from rl.april import EnginePool, OverlappingPool
from rl.trajectory import Sample
from trainer.config.rl import SyncConfig

if TYPE_CHECKING:
    from trainer.cluster import Processes  # of Ray, which policies without engines do without


class SyncedPool(OverlappingPool, Protocol):
    """What generates with the weights of the ranks."""

    busy_s: float  # in which it was generating, ever

    @property
    def engines(self) -> Sequence[int]:
        """The numbers of ours that take part."""

    @property
    def places(self) -> int:
        """How many places ours have, those that are starting too."""

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """What our engines that are there answer."""

    def load_weights(self, ranks: Processes, version: int, config: SyncConfig) -> dict[str, float]:
        """Brings the ranks' weights to all engines; metrics, with the version that the engines have now."""

    def counts(self) -> dict[str, float]:
        """Metrics of what was lost since they were last asked for."""


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

    def going_on(self, tokens: int, samples: int) -> AbstractContextManager[list[Sample]]:
        return advancing(self, tokens, samples)

    def learning(self) -> AbstractContextManager[None]:
        return nullcontext()  # whoever learns brings them new weights when that is done


@contextmanager
def advancing(pool: EnginePool, tokens: int, samples: int) -> Iterator[list[Sample]]:
    """Advances a pool in a thread while the block runs, until its `samples` are done; the list has them when the block ends.

    An error of the pool is raised at the end of the block.
    """
    done, errors, stop = list[Sample](), list[BaseException](), threading.Event()

    def advance() -> None:
        try:
            while not stop.is_set() and len(done) < samples:
                done.extend(pool.advance(tokens))
        except BaseException as error:  # raised below, in the thread that can do something about it
            errors.append(error)

    thread = threading.Thread(target=advance, name="engines", daemon=True)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
