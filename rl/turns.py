"""Conversations: the task's environment may reply to a finished turn, and then its sample goes on.

The reply's tokens are a segment that nobody sampled, between the turns of one sample. So partial rollouts, the buffer and its
checkpoint treat a conversation like any other sample, and an engine continues it like an interrupted sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from rl.april import OverlappingPool
from rl.engine.pool import advancing
from rl.trajectory import Sample

# The samples after their environment had its say: partial with a reply, or done. They come finished.
Replied = Callable[[Sequence[Sample]], Sequence[Sample]]


@dataclass(frozen=True)
class TurnPool:
    """A pool that returns a sample as done when its conversation is over, and generates on until then."""

    pool: OverlappingPool
    replied: Replied

    def submit(self, samples: Sequence[Sample]) -> None:
        self.pool.submit(samples)

    def advance(self, tokens: int) -> list[Sample]:
        ended = self.pool.advance(tokens)
        replied = self.replied([sample for sample in ended if sample.status == "finished"])
        going_on = [sample for sample in replied if not sample.done]
        if going_on:
            self.pool.submit(going_on)
        return [sample for sample in ended if sample.status != "finished"] + [sample for sample in replied if sample.done]

    def drain(self) -> list[Sample]:
        stopped = self.pool.drain()
        replied = self.replied([sample for sample in stopped if sample.status == "finished"])  # since the last `advance`
        return [sample for sample in stopped if sample.status != "finished"] + list(replied)

    @contextmanager
    def going_on(self, tokens: int, samples: int) -> Iterator[list[Sample]]:
        with self.learning(), advancing(self, tokens, samples) as done:
            yield done

    def learning(self) -> AbstractContextManager[None]:
        return self.pool.learning()


def with_reply(sample: Sample, reply: Sequence[int], max_new_tokens: int) -> Sample:
    """A finished sample with the environment's reply; truncated without it if no token would be left to generate."""
    if sample.length + len(reply) >= max_new_tokens:
        return replace(sample, status="truncated")
    return sample.replied(reply) if reply else sample
