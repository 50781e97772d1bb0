"""Conversations: a finished turn may be answered by the task's environment, and then its sample goes on.

The answer's tokens stand between the turns of one sample as a segment that nobody sampled, so partial rollouts, the buffer and
its checkpoint treat a conversation like any other sample, and an engine continues one like a sample that was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from rl.april import OverlappingPool
from rl.engine.pool import advancing
from rl.trajectory import Sample

# The samples after their environment had its say: partial with an answer, or done. They come finished.
Answers = Callable[[Sequence[Sample]], Sequence[Sample]]


@dataclass(frozen=True)
class TurnPool:
    """A pool that returns a sample as done when its conversation is over, and generates on until then."""

    pool: OverlappingPool
    answers: Answers

    def submit(self, samples: Sequence[Sample]) -> None:
        self.pool.submit(samples)

    def advance(self, tokens: int) -> list[Sample]:
        ended = self.pool.advance(tokens)
        answered = self.answers([sample for sample in ended if sample.status == "finished"])
        going_on = [sample for sample in answered if not sample.done]
        if going_on:
            self.pool.submit(going_on)
        return [sample for sample in ended if sample.status != "finished"] + [sample for sample in answered if sample.done]

    def drain(self) -> list[Sample]:
        stopped = self.pool.drain()
        answered = self.answers([sample for sample in stopped if sample.status == "finished"])  # since the last `advance`
        return [sample for sample in stopped if sample.status != "finished"] + list(answered)

    def going_on(self, tokens: int, samples: int) -> AbstractContextManager[list[Sample]]:
        return advancing(self, tokens, samples)


def with_answer(sample: Sample, answer: Sequence[int], max_new_tokens: int) -> Sample:
    """A finished sample with the environment's answer; truncated without it if no token would be left to generate."""
    if sample.length + len(answer) >= max_new_tokens:
        return replace(sample, status="truncated")
    return sample.answered(answer) if answer else sample
