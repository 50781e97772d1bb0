"""Whether training sees shorter responses than were asked for.

What finishes first is trained first, and it is short. Partial rollouts train the long ones later, so over many rounds nothing
is lost; how far a run is from that is measured here, over the last rounds: mean length of the trained samples over mean length
of the samples whose prompts were drawn. Below 1 means that short ones were preferred. Drawn samples that wait count with what
they have so far, so the true ratio is this or lower, and a little above 1 is what a run without bias shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WINDOW = 8  # rounds


class GroupLength(NamedTuple):
    id: int
    samples: int
    tokens: int  # of all responses


@dataclass(frozen=True)
class RoundLengths:
    """Of one round."""

    first: int  # the id of the first group that it drew, or would have drawn
    trained: tuple[GroupLength, ...]
    replaced: tuple[GroupLength, ...]  # finished and thrown away


class LengthWindow:
    """The last rounds; part of a checkpoint."""

    def __init__(self, rounds: Iterable[RoundLengths] = ()) -> None:
        self._rounds = deque(rounds, maxlen=WINDOW)

    def close_round(self, lengths: RoundLengths) -> None:
        self._rounds.append(lengths)

    def bias(self, waiting: Iterable[GroupLength]) -> float:
        """After a round; `waiting` are the groups in the buffer, finished or not."""
        trained = [group for lengths in self._rounds for group in lengths.trained]
        ended = trained + [group for lengths in self._rounds for group in lengths.replaced]
        drawn = [group for group in (*ended, *waiting) if group.id >= self._rounds[0].first]
        submitted = _mean(drawn or trained)  # nothing drawn: surplus filled every round
        return _mean(trained) / submitted if submitted else 1.0

    def to_state(self) -> list[dict[str, Any]]:
        return [{"first": r.first, "trained": r.trained, "replaced": r.replaced} for r in self._rounds]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> LengthWindow:
        return cls(RoundLengths(r["first"], _lengths(r["trained"]), _lengths(r["replaced"])) for r in state)


def _lengths(state: Iterable[Iterable[int]]) -> tuple[GroupLength, ...]:
    return tuple(GroupLength(*group) for group in state)


def _mean(groups: Sequence[GroupLength]) -> float:
    return sum(group.tokens for group in groups) / sum(group.samples for group in groups)
