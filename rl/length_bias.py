"""Whether training sees shorter responses than were asked for.

Samples that finish first are trained first, and they are short. Partial rollouts train the long ones later, so over many rounds
nothing is lost. How far a run is from that is measured here over the last rounds: mean length of the trained samples / mean
length of the samples whose prompts were drawn. Below 1 means that short ones were preferred. Drawn samples that wait count with
their length so far, so the true ratio is this or lower, and a run without bias shows a little more than 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WINDOW = 8  # rounds
BINS = 16  # of a histogram


class GroupLengths(NamedTuple):
    id: int
    tokens: tuple[int, ...]  # of the response of each sample


@dataclass(frozen=True)
class RoundLengths:
    """Of one round."""

    first: int  # the id of the first group that it drew, or would have drawn
    trained: tuple[GroupLengths, ...]
    replaced: tuple[GroupLengths, ...]  # thrown away, finished or not


class LengthWindow:
    """The last rounds; part of a checkpoint."""

    def __init__(self, rounds: Iterable[RoundLengths] = ()) -> None:
        self._rounds = deque(rounds, maxlen=WINDOW)

    def close_round(self, lengths: RoundLengths) -> None:
        self._rounds.append(lengths)

    def bias(self, waiting: Iterable[GroupLengths]) -> float:
        """After a round; `waiting` are the groups in the buffer, finished or not."""
        trained, drawn = self._trained_and_drawn(waiting)
        submitted = _mean(drawn)
        return _mean(trained) / submitted if submitted else 1.0

    def histogram(self, waiting: Iterable[GroupLengths], longest: int) -> list[list[float]]:
        """Shares of the lengths of trained samples and, below them, of drawn ones: (2, BINS), rows sum to one.

        The bins divide 1..longest evenly; the rounds are those of `bias`, and so are the samples.
        """
        return [_shares(groups, longest) for groups in self._trained_and_drawn(waiting)]

    def _trained_and_drawn(self, waiting: Iterable[GroupLengths]) -> tuple[list[GroupLengths], list[GroupLengths]]:
        trained = [group for lengths in self._rounds for group in lengths.trained]
        ended = trained + [group for lengths in self._rounds for group in lengths.replaced]
        drawn = [group for group in (*ended, *waiting) if group.id >= self._rounds[0].first]
        return trained, drawn or trained  # nothing drawn: surplus filled every round

    def to_state(self) -> list[dict[str, Any]]:
        return [{"first": r.first, "trained": r.trained, "replaced": r.replaced} for r in self._rounds]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> LengthWindow:
        return cls(RoundLengths(r["first"], _lengths(r["trained"]), _lengths(r["replaced"])) for r in state)


def _lengths(state: Iterable[tuple[int, list[int]]]) -> tuple[GroupLengths, ...]:
    return tuple(GroupLengths(id_, tuple(tokens)) for id_, tokens in state)


def _mean(groups: Sequence[GroupLengths]) -> float:
    return sum(sum(group.tokens) for group in groups) / sum(len(group.tokens) for group in groups)


def _shares(groups: Sequence[GroupLengths], longest: int) -> list[float]:
    counts = [0] * BINS
    for group in groups:
        for tokens in group.tokens:
            counts[min(BINS - 1, max(0, tokens - 1) * BINS // longest)] += 1
    return [round(count / sum(counts), 5) for count in counts]
