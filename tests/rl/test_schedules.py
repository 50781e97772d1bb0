"""A thousand random schedules of a run that is interrupted anywhere: aborted rounds, dead engines, checkpoints at any moment,
with engines that go on while the ranks learn and without, with conversations and without.

No models: a token and its log-probability are functions of the sample, the place, and the weight version it is sampled under,
so whatever is trained can be checked token by token.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from rl.april import OverlappingPool, rollout_round
from rl.engine.pool import LocalPool
from rl.trajectory import Group, RolloutBuffer, Sample, Segment
from rl.turns import TurnPool, with_reply
from tests.rl.test_april import ScriptedPool, configs, prompts, reward_of, rollout_config, score, token
from trainer.config.rl import RolloutConfig

ROUNDS, LONGEST = 5, 64
EPOCH = 7  # prompts of the task


def final_length(uid: int, turn: int) -> int:
    """Of a turn of the model's; about one in four is long."""
    mixed = hash((uid, 1 + turn))
    return 1 + (mixed >> 8) % (LONGEST if mixed % 4 == 0 else LONGEST // 8)


def reply(uid: int, turn: int) -> tuple[int, ...]:
    """What the environment says behind a turn; nothing ends the conversation."""
    mixed = hash((uid, -1 - turn))
    return tuple(1000 + (mixed + place) % 1000 for place in range(mixed % 4)) if turn < 2 else ()


def whole_response(uid: int, limit: int, talks: bool) -> list[tuple[int, bool]]:
    """(token, whether the model said it), however it was interrupted."""
    said = list[tuple[int, bool]]()
    for turn in range(3):
        said += [(token(uid, place), True) for place in range(len(said), len(said) + final_length(uid, turn))]
        answer = reply(uid, turn) if talks else ()
        if not answer or len(said) + len(answer) >= limit:
            break
        said += [(word, False) for word in answer]
    return said[:limit]


class EngineDied(Exception):
    pass


def logprob(uid: int, place: int, version: int) -> float:
    return -1 / (2 + uid % 97 + 1000 * place + 10**6 * version)


class MortalEngine(ScriptedPool):
    """Dies in one of its calls, now and then; or is replaced, and its samples are where they were when they were submitted. As
    with a completion server, some samples may end between the last `advance` and `drain`."""

    def __init__(self, version: int, limit: int, slots: int, random: Random, danger: float) -> None:
        super().__init__(version, LONGEST, limit, slots)
        self.random, self.danger = random, danger
        self.finals: dict[int, int] = {}  # by uid

    def submit(self, samples: Sequence[Sample]) -> None:
        super().submit(samples)
        for sample in samples:
            before = sample.length - len(sample.turn_so_far)
            self.finals[sample.uid] = before + final_length(sample.uid, len(sample.turns) // 2)

    def final(self, sample: Sample) -> int:
        return self.finals[sample.uid]

    def advance(self, tokens: int) -> list[Sample]:
        self._live()
        if self.random.random() < self.danger:
            self.queue = [(sample, 0) for sample, _ in self.queue]
        return super().advance(tokens)

    def drain(self) -> list[Sample]:
        self._live()
        late = super().advance(3) if self.random.random() < 0.3 else []
        return [*super().drain(), *late]

    def _live(self) -> None:
        if self.random.random() < self.danger:
            raise EngineDied

    def _segment(self, sample: Sample, count: int) -> Segment:
        places = range(sample.length, sample.length + count)
        tokens = tuple(token(sample.uid, place) for place in places)
        return Segment(tokens, tuple(logprob(sample.uid, place, self.version) for place in places), self.version)


class Run:
    """What a driver does: rounds, checkpoints, and another attempt from the last checkpoint when an engine dies."""

    def __init__(self, config: RolloutConfig, random: Random) -> None:
        self.config, self.random = config, random
        self.talks = random.random() < 0.5
        self.buffer, self.trained = RolloutBuffer(), list[tuple[int, Group]]()  # with the version that was trained
        self.dropped = list[int]()
        self.deaths, self.rounds_begun = 0, 0
        self._save()

    def _save(self) -> None:
        """Also in the middle of a round: what is in flight counts as not started then, and nothing of the round was trained."""
        self.saved = json.dumps(self.buffer.to_state()), list(self.trained), list(self.dropped)

    def _restore(self) -> None:
        state, self.trained, self.dropped = self.saved[0], list(self.saved[1]), list(self.saved[2])
        self.buffer = RolloutBuffer.from_state(json.loads(state))

    def play(self) -> None:
        danger = self.random.choice([0.0, 0.02, 0.1])
        while (version := len(self.trained) // self.config.groups) < ROUNDS:
            self.rounds_begun += 1
            assert self.rounds_begun < 1000
            engines = [
                MortalEngine(version, self.config.max_new_tokens, self.random.randint(1, 9), self.random, danger)
                for _ in range(self.random.randint(1, 3))
            ]
            learn = self._learn if self.random.random() < 0.5 else None
            try:
                result = rollout_round(self._pool(engines), self.buffer, prompts, self.config, version, score, learn)
            except EngineDied:
                self.deaths += 1
                danger = 0.0 if self.deaths > 20 else danger
                self._restore()
                continue
            self.trained += [(version, group) for group in result.groups]
            self.dropped += [group.id for group in result.dropped]
            if self.random.random() < 0.4:
                self._save()

    def _learn(self, groups: Sequence[Group]) -> None:
        """While the engines go on; a checkpoint may fall into it."""
        assert len(groups) == self.config.groups
        if self.random.random() < 0.3:
            self._save()

    def _replied(self, samples: Sequence[Sample]) -> list[Sample]:
        limit = self.config.max_new_tokens
        return [with_reply(sample, reply(sample.uid, len(sample.turns) // 2), limit) for sample in samples]

    def _pool(self, engines: list[MortalEngine]) -> OverlappingPool:
        run = self

        class Saving(LocalPool):
            def advance(self, tokens: int) -> list[Sample]:
                if run.random.random() < 0.1:
                    run._save()
                return super().advance(tokens)

            @contextmanager
            def going_on(self, tokens: int, samples: int) -> Iterator[list[Sample]]:
                done: list[Sample] = []
                yield done
                for _ in range(run.random.choice([0, 1, 3, 30])):
                    if len(done) < samples:
                        done += LocalPool.advance(self, tokens)

        return TurnPool(Saving(engines), self._replied) if self.talks else Saving(engines)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(configs, st.integers(0, 2**32))
def test_every_prompt_is_trained_once_an_epoch_and_every_token_is_what_it_was_when_it_was_sampled(
    config: RolloutConfig, seed: int
) -> None:
    run = Run(config, Random(seed))
    run.play()
    ids = [group.id for _, group in run.trained]
    assert len(ids) == ROUNDS * config.groups
    waiting = [group.id for group in (*run.buffer.recycled, *run.buffer.surplus)]
    assert not run.dropped or config.stale == "drop"
    assert sorted(ids + waiting + run.dropped) == list(range(run.buffer.next_group)), "in one place, and none is missing"
    assert set(Counter((i // EPOCH, i % EPOCH) for i in ids).values()) <= {1}, "once an epoch"
    for version, group in run.trained:
        assert len(group.samples) == config.samples_per_group
        for sample in group.samples:
            expected = whole_response(sample.uid, config.max_new_tokens, run.talks)
            assert list(zip(sample.response_ids, sample.sampled, strict=True)) == expected
            assert sample.prompt_ids == prompts(group.id) and sample.reward == reward_of(sample)
            assert list(sample.versions) == sorted(sample.versions)
            assert version - config.max_staleness <= sample.versions[0] and sample.versions[-1] <= version
            assert list(sample.logprobs) == [
                logprob(sample.uid, place, version) if sampled else 0.0
                for place, (version, sampled) in enumerate(zip(sample.versions, sample.sampled, strict=True))
            ]


def test_the_schedules_have_deaths_conversations_and_samples_of_several_versions() -> None:
    """Else the property above would say little."""
    config = rollout_config(max_new_tokens=64)
    runs = [Run(config, Random(seed)) for seed in range(40)]
    for run in runs:
        run.play()
    assert sum(run.deaths > 0 for run in runs) > 10
    assert 10 < sum(run.talks for run in runs) < 30
    turns = [len(s.turns) for run in runs if run.talks for _, group in run.trained for s in group.samples]
    assert set(turns) == {1, 3, 5}
    segments = [len(s.segments) for run in runs if not run.talks for _, group in run.trained for s in group.samples]
    assert max(segments) >= 3 and sum(count > 1 for count in segments) > len(segments) / 20
