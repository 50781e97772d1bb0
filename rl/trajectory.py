"""The result of a rollout: segments, samples, groups, and the buffer that carries unfinished work to the next round.

A sample is a prompt and its segments so far. A segment holds the tokens sampled under one weight version, with
the log-probabilities they were sampled at, or what the environment of the task replied. A group is the n samples of one
prompt; advantages are relative to it, so it is used whole or not at all. Token ids are kept, never text: a sample
continues from exactly the tokens it stopped at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_args

from kernels.errors import UserError
from rl.length_bias import GroupLengths, LengthWindow
from rl.routed_experts import RoutedExperts
from trainer.json_text import parsed

# pending: nothing generated yet; partial: interrupted; finished: ended with <eos>, a stop token or a stop string;
# truncated: ran into max_new_tokens; abandoned: its environment failed to reply, so it cannot be judged
Status = Literal["pending", "partial", "finished", "truncated", "abandoned"]

# A sample's uid is group * UIDS_PER_GROUP + its place in the group, so it stays unique when samples_per_group changes.
UIDS_PER_GROUP = 1 << 16


@dataclass(frozen=True)
class Segment:
    """Tokens sampled under one weight version; `logprobs` has one number a token, at the rollout temperature.

    Where top-k, top-p or min-p left tokens out of the distribution sampled from, `whole_logprobs` are those of the whole one;
    None where both are the same, and of servers, which do not tell. Tokens of the environment were not `sampled`: they have no
    log-probability and are never learned. `trainer_logprobs` are those that the trainer gives all of them under the same
    weights, where somebody asked it (rl/staged.py). `experts`, where they were recorded, are those of the tokens that no
    earlier segment has them of, prompt and replies included, up to the last token but one: the last one is not computed before
    the next segment. So a token keeps the experts that chose what follows it, however often newer weights go over it again.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: int  # of a reply: that of the turn before it
    sampled: bool = True
    whole_logprobs: tuple[float, ...] | None = None
    trainer_logprobs: tuple[float, ...] | None = None
    experts: RoutedExperts | None = None

    def __post_init__(self) -> None:
        expected = len(self.token_ids) if self.sampled else 0
        assert len(self.logprobs) == expected, (len(self.logprobs), expected)
        assert self.whole_logprobs is None or len(self.whole_logprobs) == expected
        assert self.trainer_logprobs is None or len(self.trainer_logprobs) == len(self.token_ids)


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt, at any stage. What ended a finished sample, <eos>, a stop token or a stop string, ends its
    last token or stands in it.

    In a conversation the response has several turns, each of the model's with its end, and the environment's replies between.
    """

    uid: int
    group: int
    prompt_ids: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    status: Status = "pending"
    reward: float | None = None  # None: not judged (yet)

    @property
    def done(self) -> bool:
        return self.status in ("finished", "truncated", "abandoned")

    @property
    def response_ids(self) -> tuple[int, ...]:
        return tuple(token for segment in self.segments for token in segment.token_ids)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """One behaviour log-probability a response token; 0 for the environment's, which nobody may learn from."""
        return tuple(v for s in self.segments for v in (s.logprobs if s.sampled else (0.0,) * len(s.token_ids)))

    @property
    def whole_logprobs(self) -> tuple[float, ...] | None:
        """`logprobs` of the distributions that nothing is left out of; None where no segment has others."""
        if all(segment.whole_logprobs is None for segment in self.segments):
            return None
        said = (s.whole_logprobs or s.logprobs if s.sampled else (0.0,) * len(s.token_ids) for s in self.segments)
        return tuple(value for values in said for value in values)

    @property
    def sampled(self) -> tuple[bool, ...]:
        """Which response tokens are the model's."""
        return tuple(segment.sampled for segment in self.segments for _ in segment.token_ids)

    @property
    def turns(self) -> tuple[tuple[int, ...], ...]:
        """The response tokens of the model and of the environment, alternately; the first turn is the model's."""
        speakers = groupby(self.segments, key=lambda segment: segment.sampled)
        return tuple(tuple(token for segment in said for token in segment.token_ids) for _, said in speakers)

    @property
    def turn_so_far(self) -> tuple[int, ...]:
        """What the model has said since the prompt or the environment's last reply."""
        return self.turns[-1] if self.segments and self.segments[-1].sampled else ()

    @property
    def trainer_logprobs(self) -> tuple[float, ...]:
        """One a response token; every segment must have them."""
        found: list[float] = []
        for segment in self.segments:
            assert segment.trainer_logprobs is not None, f"the trainer was not asked about all tokens of sample {self.uid}"
            found += segment.trainer_logprobs
        return tuple(found)

    @property
    def recorded(self) -> int:
        """Of how many tokens, from the first of the prompt on, the experts are known."""
        return sum(segment.experts.tokens for segment in self.segments if segment.experts is not None)

    @property
    def experts(self) -> RoutedExperts | None:
        """Of the first `recorded` tokens."""
        parts = [segment.experts for segment in self.segments if segment.experts is not None]
        return RoutedExperts.joined(parts) if parts else None

    @property
    def versions(self) -> tuple[int, ...]:
        """The weight version that each response token was sampled under."""
        return tuple(segment.weight_version for segment in self.segments for _ in segment.token_ids)

    @property
    def length(self) -> int:
        """Response tokens so far."""
        return sum(len(segment.token_ids) for segment in self.segments)

    def extended(self, segment: Segment, status: Status) -> Sample:
        """This sample with one more segment and the status it has after it."""
        assert not self.done, f"sample {self.uid} is {self.status} already"
        return replace(self, segments=(*self.segments, segment), status=status)

    def replied(self, token_ids: Sequence[int]) -> Sample:
        """A finished sample that goes on after the environment's reply, which has a token or more."""
        assert self.status == "finished" and token_ids, (self.uid, self.status)
        reply = Segment(tuple(token_ids), (), self.segments[-1].weight_version, sampled=False)
        return replace(self, segments=(*self.segments, reply), status="partial")

    def restarted(self) -> Sample:
        """The same prompt and uid with nothing generated.

        The uid seeds the sampling noise, and it stays: with new noise a sample that was too long to finish in time would
        mostly come back shorter, and the batch would drift towards short responses.
        """
        return replace(self, segments=(), status="pending", reward=None)


@dataclass(frozen=True)
class Group:
    """The samples of one prompt. `id` is the index of the prompt in the task."""

    id: int
    samples: tuple[Sample, ...]

    @property
    def done(self) -> bool:
        return all(sample.done for sample in self.samples)

    @property
    def versions(self) -> set[int]:
        """Those that the model's tokens were sampled under."""
        return {segment.weight_version for sample in self.samples for segment in sample.segments if segment.sampled}

    def restarted(self) -> Group:
        return Group(self.id, tuple(sample.restarted() for sample in self.samples))


def fresh_group(group: int, prompt_ids: Sequence[int], samples: int) -> Group:
    """A group of `samples` pending samples."""
    assert 0 < samples < UIDS_PER_GROUP, samples
    uids = range(group * UIDS_PER_GROUP, group * UIDS_PER_GROUP + samples)
    return Group(group, tuple(Sample(uid=uid, group=group, prompt_ids=tuple(prompt_ids)) for uid in uids))


def lengths_of(groups: Iterable[Group]) -> tuple[GroupLengths, ...]:
    return tuple(GroupLengths(group.id, tuple(sample.length for sample in group.samples)) for group in groups)


class RolloutBuffer:
    """Groups between rounds, and the cursor of the next fresh prompt.

    `recycled` holds unfinished groups, oldest first; `surplus` holds groups that finished when their round was already full;
    `lengths` says how long the trained groups of the last rounds were, and those that were drawn.
    Groups handed out by `take` are in flight until `settle`; a state saved in between counts them as not yet started in this
    round, and those that were dropped as not dropped, so a run that dies in the middle of a round loses the work of that round
    and no prompt.
    """

    def __init__(
        self,
        recycled: Iterable[Group] = (),
        surplus: Iterable[Group] = (),
        next_group: int = 0,
        lengths: LengthWindow | None = None,
    ) -> None:
        self.lengths = lengths or LengthWindow()
        self._recycled = deque(recycled)
        self._surplus = deque(surplus)
        self._in_flight: tuple[Group, ...] = ()
        self._dropped: tuple[Group, ...] = ()  # in the round that is under way
        self._next_group = next_group

    @property
    def recycled(self) -> tuple[Group, ...]:
        return tuple(self._recycled)

    @property
    def surplus(self) -> tuple[Group, ...]:
        return tuple(self._surplus)

    @property
    def next_group(self) -> int:
        """How many prompts have been drawn so far."""
        return self._next_group

    @property
    def dropped(self) -> tuple[Group, ...]:
        """Those that the round under way has given up."""
        return self._dropped

    def expire(self, oldest: int, *, drop: bool, newest: int | None = None) -> list[Group]:
        """The groups that have a token from before `oldest`, and the finished ones that have none from `newest` on, as they
        were. They start again, or with `drop` are gone."""

        def is_stale(group: Group) -> bool:
            versions = group.versions
            useless = newest is not None and group.done and max(versions, default=newest) < newest
            return useless or min(versions, default=oldest) < oldest

        stale = [group for group in (*self._surplus, *self._recycled) if is_stale(group)]
        ids = {group.id for group in stale}
        self._surplus = deque(group for group in self._surplus if group.id not in ids)
        kept = [group for group in self._recycled if group.id not in ids]
        self._recycled = deque([*(() if drop else (group.restarted() for group in stale)), *kept])
        self._dropped = tuple(stale) if drop else ()
        return stale

    def take(self, finished: int, total: int, fresh: Callable[[int], Group]) -> list[Group]:
        """Groups for one round: surplus ones first, then recycled ones, then `fresh(index of the prompt)`.

        `finished` surplus groups are a whole round; then nothing else is taken. Otherwise the result has `total` groups.
        """
        assert not self._in_flight, "the last round was not settled"
        groups = [self._surplus.popleft() for _ in range(min(finished, len(self._surplus)))]
        if len(groups) < finished:
            groups += self._unfinished(total - len(groups), fresh)
        self._in_flight = tuple(groups)
        return groups

    def take_more(self, total: int, fresh: Callable[[int], Group]) -> list[Group]:
        """`total` more groups for the round that is under way: surplus, recycled, fresh."""
        groups = [self._surplus.popleft() for _ in range(min(total, len(self._surplus)))]
        groups += self._unfinished(total - len(groups), fresh)
        self._in_flight += tuple(groups)
        return groups

    def _unfinished(self, total: int, fresh: Callable[[int], Group]) -> list[Group]:
        groups = [self._recycled.popleft() for _ in range(min(total, len(self._recycled)))]
        for _ in range(total - len(groups)):
            groups.append(fresh(self._next_group))
            self._next_group += 1
        return groups

    def settle(self, recycled: Sequence[Group], surplus: Sequence[Group]) -> None:
        """Ends the round: takes back what is unfinished and what is finished but was not needed, each in FIFO order."""
        assert all(group.done for group in surplus) and not any(group.done for group in recycled)
        self._recycled.extend(recycled)
        self._surplus.extend(surplus)
        self._in_flight = self._dropped = ()

    def change(self, changed: Callable[[Group], Group]) -> None:
        """Replaces every group by `changed(group)`, between rounds."""
        assert not self._in_flight, "groups change between rounds"
        self._recycled = deque(map(changed, self._recycled))
        self._surplus = deque(map(changed, self._surplus))

    def to_state(self) -> dict[str, Any]:
        """A JSON-able dict; `from_state` makes an equal buffer from it, floats bit by bit (JSON writes them by repr)."""
        taken = (*self._dropped, *self._in_flight)
        surplus = [group for group in taken if group.done]
        unfinished = [group for group in taken if not group.done]
        return {
            "next_group": self._next_group,
            "lengths": self.lengths.to_state(),
            "surplus": [_group_state(group) for group in (*surplus, *self._surplus)],
            "recycled": [_group_state(group) for group in (*unfinished, *self._recycled)],
        }

    @classmethod
    def parse(cls, text: str, place: str) -> RolloutBuffer:
        """What `to_state` gave, out of JSON in the checkpoint at `place`. Raises UserError where it is something else."""
        try:
            return cls.from_state(parsed(text))
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise UserError(
                f"state.json of {place} holds no state of rollouts ({type(error).__name__}: {error}); remove it, and "
                "resume=auto goes on from the one before it"
            ) from error

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RolloutBuffer:
        return cls(
            recycled=[_group_from(item) for item in state["recycled"]],
            surplus=[_group_from(item) for item in state["surplus"]],
            next_group=state["next_group"],
            lengths=LengthWindow.from_state(state["lengths"]),
        )


def _group_state(group: Group) -> dict[str, Any]:
    return {"id": group.id, "samples": [_sample_state(sample) for sample in group.samples]}


def _group_from(state: dict[str, Any]) -> Group:
    return Group(state["id"], tuple(_sample_from(state["id"], item) for item in state["samples"]))


def _sample_state(sample: Sample) -> dict[str, Any]:
    return {
        "uid": sample.uid,
        "prompt_ids": list(sample.prompt_ids),
        "status": sample.status,
        "reward": sample.reward,
        "segments": [_segment_state(segment) for segment in sample.segments],
    }


def _segment_state(segment: Segment) -> dict[str, Any]:
    state = {
        "token_ids": list(segment.token_ids),
        "logprobs": list(segment.logprobs),
        "weight_version": segment.weight_version,
        "sampled": segment.sampled,
    }
    if segment.whole_logprobs is not None:
        state["whole_logprobs"] = list(segment.whole_logprobs)
    if segment.trainer_logprobs is not None:
        state["trainer_logprobs"] = list(segment.trainer_logprobs)
    if segment.experts is not None:
        state["experts"] = segment.experts.to_state()
    return state


def _segment_from(state: dict[str, Any]) -> Segment:
    whole = tuple(state["whole_logprobs"]) if "whole_logprobs" in state else None
    asked = tuple(state["trainer_logprobs"]) if "trainer_logprobs" in state else None
    experts = RoutedExperts.from_state(state["experts"]) if "experts" in state else None
    tokens, logprobs = tuple(state["token_ids"]), tuple(state["logprobs"])
    return Segment(tokens, logprobs, state["weight_version"], state["sampled"], whole, asked, experts)


def _sample_from(group: int, state: dict[str, Any]) -> Sample:
    assert state["status"] in get_args(Status), state["status"]
    return Sample(
        uid=state["uid"],
        group=group,
        prompt_ids=tuple(state["prompt_ids"]),
        segments=tuple(map(_segment_from, state["segments"])),
        status=state["status"],
        reward=state["reward"],
    )
