"""A thousand random schedules of a run that is interrupted anywhere: aborted rounds, dead engines, checkpoints at any moment,
with engines that go on while the ranks learn and without.

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

from rl.april import rollout_round
from rl.engine.pool import LocalPool
from rl.trajectory import Group, RolloutBuffer, Sample, Segment
from tests.rl.test_april import ScriptedPool, configs, prompts, reward_of, rollout_config, score, token
from trainer.config.rl import RolloutConfig

ROUNDS, LONGEST = 5, 64
EPOCH = 7  # prompts of the task


def final_length(uid: int) -> int:
    """About one sample in four is long."""
    mixed = hash((uid, 1))
    return 1 + (mixed >> 8) % (LONGEST if mixed % 4 == 0 else LONGEST // 8)


class EngineDied(Exception):
    pass


def logprob(uid: int, place: int, version: int) -> float:
    return -1 / (2 + uid % 97 + 1000 * place + 10**6 * version)


class MortalEngine(ScriptedPool):
    """Dies in one of its calls, now and then."""

    def __init__(self, version: int, limit: int, slots: int, random: Random, danger: float) -> None:
        super().__init__(version, LONGEST, limit, slots)
        self.random, self.danger = random, danger

    def final(self, sample: Sample) -> int:
        return final_length(sample.uid)

    def advance(self, tokens: int) -> list[Sample]:
        self._live()
        return super().advance(tokens)

    def drain(self) -> list[Sample]:
        self._live()
        return super().drain()

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
        self.buffer, self.trained = RolloutBuffer(), list[tuple[int, Group]]()  # with the version that was trained
        self.deaths, self.rounds_begun = 0, 0
        self._save()

    def _save(self) -> None:
        """Also in the middle of a round: what is in flight counts as not started then, and nothing of the round was trained."""
        self.saved = json.dumps(self.buffer.to_state()), list(self.trained)

    def _restore(self) -> None:
        state, self.trained = self.saved[0], list(self.saved[1])
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
            if self.random.random() < 0.4:
                self._save()

    def _learn(self, groups: Sequence[Group]) -> None:
        """While the engines go on; a checkpoint may fall into it."""
        assert len(groups) == self.config.groups
        if self.random.random() < 0.3:
            self._save()

    def _pool(self, engines: list[MortalEngine]) -> LocalPool:
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

        return Saving(engines)


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
    assert sorted(ids + waiting) == list(range(run.buffer.next_group)), "trained or waiting, once, and none is missing"
    assert set(Counter((i // EPOCH, i % EPOCH) for i in ids).values()) <= {1}, "once an epoch"
    for version, group in run.trained:
        assert len(group.samples) == config.samples_per_group
        for sample in group.samples:
            assert sample.length == min(final_length(sample.uid), config.max_new_tokens)
            assert sample.prompt_ids == prompts(group.id) and sample.reward == reward_of(sample)
            assert list(sample.versions) == sorted(sample.versions)
            assert version - config.max_staleness <= sample.versions[0] and sample.versions[-1] <= version
            for place, (found, value, sampled_at) in enumerate(
                zip(sample.response_ids, sample.logprobs, sample.versions, strict=True)
            ):
                assert found == token(sample.uid, place) and value == logprob(sample.uid, place, sampled_at)


def test_the_schedules_have_deaths_and_samples_of_several_versions() -> None:
    """Else the property above would say little."""
    config = rollout_config(max_new_tokens=64)
    runs = [Run(config, Random(seed)) for seed in range(40)]
    for run in runs:
        run.play()
    assert sum(run.deaths > 0 for run in runs) > 10
    segments = [len(sample.segments) for run in runs for _, group in run.trained for sample in group.samples]
    assert max(segments) >= 3 and sum(count > 1 for count in segments) > len(segments) / 20
