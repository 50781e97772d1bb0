"""Rounds whose engines go on while the ranks learn."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from launch.cli import load
from rl.april import RoundResult, rollout_round, submitted_groups
from rl.engine.engine import Engine
from rl.engine.pool import LocalPool, advancing
from rl.trajectory import Group, RolloutBuffer, Sample
from tests.rl.test_april import ScriptedPool, configs, each, final_length, play, prompts, rollout_config, score, token
from tests.rl.test_engine import CONFIG, MAX_NEW, engine_for, trainer_logprobs
from tests.rl.test_server import wait_until
from trainer.config.rl import RLConfig, RolloutConfig
from trainer.model.transformer import LanguageModel

LONGEST = 64


def overlapped(buffer: RolloutBuffer, config: RolloutConfig, rounds: range, ahead: int) -> list[RoundResult]:
    """Rounds with learning that lets the engines get `ahead` looks further."""
    results = []
    for version in rounds:
        pool, learned = ScriptedPool(version, LONGEST, config.max_new_tokens, slots=7), list[Sequence[Group]]()
        pool.ahead = ahead
        result = rollout_round(pool, buffer, prompts, config, version, score, learned.append)
        assert learned == [result.groups], "the round's groups, once"
        assert not pool.queue, "the engines are empty for the new weights"
        assert result.metrics["rollout/new_tokens"] == pool.generated
        results.append(result)
    return results


@settings(max_examples=100, deadline=None, derandomize=True)
@given(configs, st.sampled_from([0, 1, 2, 5, 100]))
def test_no_prompt_is_lost_or_used_twice_and_nothing_runs_away(config: RolloutConfig, ahead: int) -> None:
    buffer, used = RolloutBuffer(), list[int]()
    for version in range(7):
        result = overlapped(buffer, config, range(version, version + 1), ahead)[0]
        used += [group.id for group in (*result.groups, *result.dropped)]
        waiting = [group.id for group in (*buffer.recycled, *buffer.surplus)]
        assert sorted(used + waiting) == list(range(buffer.next_group))
        assert len(waiting) == submitted_groups(config.groups, config), "as many as the engines are to have, finished ones too"
        for sample in (sample for group in result.groups for sample in group.samples):
            length = min(final_length(sample.uid, LONGEST), config.max_new_tokens)
            assert sample.response_ids == tuple(token(sample.uid, place) for place in range(length))
            assert list(sample.versions) == sorted(sample.versions)
            assert version - config.max_staleness <= sample.versions[0] and sample.versions[-1] <= version


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configs)
def test_engines_that_get_nowhere_meanwhile_make_it_a_plain_round(config: RolloutConfig) -> None:
    plain, ahead = RolloutBuffer(), RolloutBuffer()
    for expected, found in zip(play(plain, config, range(6)), overlapped(ahead, config, range(6), 0), strict=True):
        assert found.groups == expected.groups


def test_what_was_generated_meanwhile_is_one_version_older_in_the_next_round() -> None:
    config = rollout_config(over_provision=1.0, max_staleness=1)
    results = overlapped(RolloutBuffer(), config, range(4), 100)
    assert [result.metrics["rollout/stale_token_share"] for result in results] == [0, 1, 1, 1]
    assert [result.metrics["rollout/staleness_max"] for result in results] == [0, 1, 1, 1]
    assert [[group.id for group in result.groups] for result in results] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def every_third(sample: Sample) -> float:
    """One prompt of three has different rewards."""
    return float(sample.group % 3 == 0 and sample.uid % 2)


def test_refills_go_with_it() -> None:
    config = rollout_config(refills=20, groups=2)
    buffer, used = RolloutBuffer(), []
    for version in range(5):
        pool = ScriptedPool(version, LONGEST, 40, slots=7)
        pool.ahead = 3
        result = rollout_round(pool, buffer, prompts, config, version, each(every_third), lambda groups: None)
        assert result.metrics["reward/zero_std_share"] == 0
        used += [group.id for group in result.groups]
    assert len(set(used)) == len(used) == 10 and all(index % 3 == 0 for index in used)


# ---------------------------------------------------------------- the thread


def test_engines_advance_until_the_block_ends_or_all_is_done() -> None:
    samples = [Sample(uid, uid, (1,)) for uid in range(9)]
    pool = ScriptedPool(0, LONGEST, 40)
    pool.submit(samples)
    with advancing(pool, 3, len(samples)) as done:
        wait_until(lambda: len(done) == len(samples))
    assert sorted(sample.uid for sample in done) == list(range(9)) and not pool.queue
    with advancing(pool, 3, 0) as done:
        pass
    assert done == []


class Broken(ScriptedPool):
    def advance(self, tokens: int) -> list[Sample]:
        raise UserError("engine/1 is lost")


def test_an_engine_that_dies_meanwhile_is_an_error_when_the_ranks_have_learned() -> None:
    learned = []
    with pytest.raises(UserError, match="engine/1 is lost"), advancing(Broken(0, 9, 9), 3, 1):
        learned.append(1)
    assert learned == [1]
    with pytest.raises(ZeroDivisionError), advancing(Broken(0, 9, 9), 3, 1):
        learned.append(1 // 0)


class Counting(LocalPool):
    """Of an engine whose looks can be waited for."""

    looks = 0

    def advance(self, tokens: int) -> list[Sample]:
        self.looks += 1
        return super().advance(tokens)


def test_an_engine_that_goes_on_samples_exactly_under_the_weights_that_it_has() -> None:
    models = [LanguageModel.initialize(CONFIG, seed=seed, batch_invariant=True) for seed in range(3)]
    config = rollout_config(groups=2, samples_per_group=3, advance_tokens=2, max_new_tokens=MAX_NEW, overlap=True)
    engine: Engine = engine_for(models[0], slots=16)
    buffer, samples = RolloutBuffer(), list[Sample]()
    for version, model in enumerate(models):
        engine.load_weights(model.state(), version)
        pool = Counting([engine])

        def learn(groups: Sequence[Group], pool: Counting = pool) -> None:
            before = pool.looks
            wait_until(lambda: pool.looks >= before + 3)

        result = rollout_round(pool, buffer, lambda index: (2 + index % 9, 5), config, version, score, learn)
        samples += [sample for group in result.groups for sample in group.samples]
    samples += [sample for group in buffer.recycled for sample in group.samples if sample.length]
    assert max(len(sample.segments) for sample in samples) > 1
    for version, model in enumerate(models):
        for sample, expected in zip(samples, trainer_logprobs(model, samples), strict=True):
            places = [place for place, sampled_at in enumerate(sample.versions) if sampled_at == version]
            assert [sample.logprobs[place] for place in places] == [expected[place] for place in places]


def test_without_staleness_it_would_be_for_nothing() -> None:
    with pytest.raises(
        UserError, match=r"rollout.max_staleness \(0\) throws all of them away; raise it, or choose rollout=april"
    ):
        load(RLConfig, "rl", ["checkpoint=a", "rollout=async", "rollout.max_staleness=0"])
