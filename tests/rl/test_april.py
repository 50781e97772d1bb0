"""Rollout rounds against a pool whose samples finish at lengths known beforehand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from rl.april import RoundResult, Score, complete, rollout_round, submitted_groups
from rl.packing import documents_of
from rl.trajectory import UIDS_PER_GROUP, Group, RolloutBuffer, Sample, Segment
from tests.rl.algorithm import algorithm_config
from trainer.config.rl import RolloutConfig


def rollout_config(**changes: Any) -> RolloutConfig:
    options: dict[str, Any] = dict(
        groups=3,
        samples_per_group=2,
        over_provision=2.0,
        refills=0,
        max_new_tokens=40,
        max_turns=8,
        max_staleness=3,
        stale="regenerate",
        temperature=1.0,
        engines=1,
        min_engines=None,
        engine_slots=4,
        advance_tokens=4,
        top_k=None,
        top_p=1.0,
        min_p=0.0,
        stop=(),
        stop_tokens=(),
        include_stop=False,
        replay_routing=False,
        cache_tokens=None,
        overlap=False,
        metrics_port=0,
        server=None,
        server_reload=None,
        server_timeout_s=300.0,
        server_retries=4,
        placement="colocated",
    )
    return RolloutConfig(**(options | changes))


def final_length(uid: int, longest: int) -> int:
    """Fixed by the uid alone, like a sample whose noise is a function of its uid; about one in four is long."""
    mixed = (uid * 2654435761 + 12345) % 2**32
    return 1 + mixed % longest if mixed % 4 == 0 else 1 + mixed % max(1, longest // 8)


def token(uid: int, place: int) -> int:
    return (uid * 31 + place * 7) % 1000


class ScriptedPool:
    """Continues every sample up to `final_length`; those longer than `limit` are truncated there."""

    ahead = 0

    def __init__(self, version: int, longest: int, limit: int, slots: int = 10**9) -> None:
        self.version, self.longest, self.limit, self.slots = version, longest, limit, slots
        self.queue: list[tuple[Sample, int]] = []  # with the tokens generated since submission
        self.generated = 0
        self.submitted: list[Sample] = []

    def submit(self, samples: Sequence[Sample]) -> None:
        assert not any(sample.done for sample in samples)
        self.submitted += samples
        self.queue += [(sample, 0) for sample in samples]

    def advance(self, tokens: int) -> list[Sample]:
        done, kept = [], []
        for place, (sample, fresh) in enumerate(self.queue):
            target = min(self.final(sample), self.limit)
            step = min(tokens, target - sample.length - fresh) if place < self.slots else 0
            self.generated += step
            if sample.length + fresh + step == target:
                status = "truncated" if target < self.final(sample) else "finished"
                done.append(sample.extended(self._segment(sample, fresh + step), status))  # type: ignore[arg-type]
            else:
                kept.append((sample, fresh + step))
        self.queue = kept
        return done[::-1]  # the order must not matter

    def final(self, sample: Sample) -> int:
        return final_length(sample.uid, self.longest)

    @contextmanager
    def going_on(self, tokens: int, samples: int) -> Iterator[list[Sample]]:
        """`ahead` times as far as one `advance`, when the block ends; by the clock no test could tell."""
        done: list[Sample] = []
        yield done
        for _ in range(self.ahead):
            if len(done) < samples:
                done += self.advance(tokens)

    def learning(self) -> AbstractContextManager[None]:
        return nullcontext()

    def drain(self) -> list[Sample]:
        unfinished = [s.extended(self._segment(s, fresh), "partial") if fresh else s for s, fresh in self.queue]
        self.queue = []
        return unfinished[::-1]

    def _segment(self, sample: Sample, count: int) -> Segment:
        tokens = tuple(token(sample.uid, sample.length + place) for place in range(count))
        return Segment(tokens, tuple(-0.1 * t for t in tokens), self.version)


def prompts(index: int) -> tuple[int, ...]:
    return (1, index)


def reward_of(sample: Sample) -> float:
    return (sample.length % 5) / 4


def each(reward: Callable[[Sample], float | None]) -> Score:
    return lambda samples: [reward(sample) for sample in samples]


score = each(reward_of)


def play(buffer: RolloutBuffer, config: RolloutConfig, rounds: range, longest: int = 64) -> list[RoundResult]:
    pools = [ScriptedPool(version, longest, config.max_new_tokens, slots=7) for version in rounds]
    return [rollout_round(pool, buffer, prompts, config, pool.version, score) for pool in pools]


configs = st.builds(
    rollout_config,
    groups=st.integers(1, 5),
    samples_per_group=st.integers(2, 4),
    over_provision=st.sampled_from([1.0, 1.25, 1.5, 2.0, 3.0]),
    max_new_tokens=st.integers(4, 64),
    max_staleness=st.integers(0, 3),
    stale=st.sampled_from(["regenerate", "drop"]),
    advance_tokens=st.integers(1, 9),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configs)
def test_every_round_returns_exactly_n_whole_groups_and_loses_no_prompt(config: RolloutConfig) -> None:
    buffer, used = RolloutBuffer(), list[int]()
    for version in range(6):
        result = play(buffer, config, range(version, version + 1))[0]
        assert len(result.groups) == config.groups
        assert all(group.done and len(group.samples) == config.samples_per_group for group in result.groups)
        ids = [group.id for group in result.groups]
        assert ids == sorted(ids)
        used += [*ids, *(group.id for group in result.dropped)]
        assert not result.dropped or config.stale == "drop"
        waiting = [group.id for group in (*buffer.recycled, *buffer.surplus)]
        assert sorted(used + waiting) == list(range(buffer.next_group)), "each prompt is used once, dropped or still waits"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configs)
def test_samples_are_continued_token_by_token_and_carry_the_versions_they_got(config: RolloutConfig) -> None:
    buffer = RolloutBuffer()
    for result in play(buffer, config, range(6)):
        for sample in (sample for group in result.groups for sample in group.samples):
            length = min(final_length(sample.uid, 64), config.max_new_tokens)
            assert sample.response_ids == tuple(token(sample.uid, place) for place in range(length))
            assert list(sample.versions) == sorted(sample.versions)
            assert sample.reward == reward_of(sample)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configs)
def test_no_token_is_older_than_max_staleness(config: RolloutConfig) -> None:
    buffer = RolloutBuffer()
    for version, result in enumerate(play(buffer, config, range(8))):
        ages = [version - v for group in result.groups for sample in group.samples for v in sample.versions]
        assert max(ages) <= config.max_staleness
        assert result.metrics["rollout/staleness_max"] == max(ages)
        assert result.metrics["rollout/staleness_mean"] == pytest.approx(sum(ages) / len(ages))
        assert result.metrics["rollout/stale_token_share"] == pytest.approx(sum(age > 0 for age in ages) / len(ages))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configs, st.integers(1, 5))
def test_a_buffer_restored_between_rounds_has_the_same_future(config: RolloutConfig, rounds: int) -> None:
    buffer = RolloutBuffer()
    play(buffer, config, range(rounds))
    again = RolloutBuffer.from_state(json.loads(json.dumps(buffer.to_state())))
    assert play(again, config, range(rounds, rounds + 3)) == play(buffer, config, range(rounds, rounds + 3))


class SavingPool(ScriptedPool):
    """Saves the buffer while a round is under way, as a run that is about to die would have it."""

    buffer: RolloutBuffer
    saved: str | None = None

    def advance(self, tokens: int) -> list[Sample]:
        self.saved = json.dumps(self.buffer.to_state())
        return super().advance(tokens)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configs)
def test_a_buffer_saved_within_a_round_repeats_that_round(config: RolloutConfig) -> None:
    buffer = RolloutBuffer()
    play(buffer, config, range(3))
    pool = SavingPool(3, 64, config.max_new_tokens, slots=7)
    pool.buffer = buffer
    result = rollout_round(pool, buffer, prompts, config, 3, score)
    if pool.saved is not None:  # else the surplus was a whole round
        repeated = play(RolloutBuffer.from_state(json.loads(pool.saved)), config, range(3, 4))[0]
        assert repeated.groups == result.groups
        assert repeated.metrics | {"rollout/stale_groups": 0} == result.metrics | {"rollout/stale_groups": 0}


class LosingPool(ScriptedPool):
    """Some of its samples are at times where they were when they were submitted: their engine was lost."""

    moments: random.Random

    def advance(self, tokens: int) -> list[Sample]:
        if self.moments.random() < 0.4:
            self.queue = [(sample, self.moments.choice([0, fresh])) for sample, fresh in self.queue]
            self.moments.shuffle(self.queue)
        return super().advance(tokens)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configs, st.integers(0, 1000))
def test_lost_engines_lose_no_prompt_and_no_token(config: RolloutConfig, seed: int) -> None:
    buffer, plain, used, moments = RolloutBuffer(), RolloutBuffer(), list[int](), random.Random(seed)
    for version in range(6):
        pool = LosingPool(version, 64, config.max_new_tokens, slots=7)
        pool.moments = moments
        result = rollout_round(pool, buffer, prompts, config, version, score)
        used += [group.id for group in (*result.groups, *result.dropped)]
        waiting = [group.id for group in (*buffer.recycled, *buffer.surplus)]
        assert sorted(used + waiting) == list(range(buffer.next_group)), "each prompt is used once, dropped or still waits"
        for sample in (sample for group in result.groups for sample in group.samples):
            length = min(final_length(sample.uid, 64), config.max_new_tokens)
            assert sample.response_ids == tuple(token(sample.uid, place) for place in range(length))
        if config.over_provision == 1:
            expected = play(plain, config, range(version, version + 1))[0]
            assert result.groups == expected.groups, "a round that waits for all learns the same"
            steps = {"rollout/decode_steps": result.metrics["rollout/decode_steps"]}  # those of lost engines are made again
            assert result.metrics == {**expected.metrics, **steps}


def test_finished_siblings_of_an_unfinished_group_are_not_generated_again() -> None:
    config = rollout_config(groups=2, samples_per_group=4)
    buffer = RolloutBuffer()
    play(buffer, config, range(1))
    waiting = [sample for group in buffer.recycled for sample in group.samples]
    kept = {sample.uid: sample for sample in waiting if sample.done}
    assert kept, "the scripted lengths leave a finished sibling behind"
    pool = ScriptedPool(1, 64, config.max_new_tokens)
    result = rollout_round(pool, buffer, prompts, config, 1, score)
    assert not kept.keys() & {sample.uid for sample in pool.submitted}
    for sample in (sample for group in (*result.groups, *buffer.recycled) for sample in group.samples):
        if sample.uid in kept:
            assert sample.segments == kept[sample.uid].segments


def test_work_that_waits_goes_first() -> None:
    config = rollout_config(groups=2, samples_per_group=4)
    buffer = RolloutBuffer()
    play(buffer, config, range(1))
    waiting = [sample.uid for group in buffer.recycled for sample in group.samples if not sample.done]
    pool = ScriptedPool(1, 64, config.max_new_tokens)
    result = rollout_round(pool, buffer, prompts, config, 1, score)
    assert [sample.uid for sample in pool.submitted][: len(waiting)] == waiting
    resumed = sum(sample.status == "partial" for sample in pool.submitted)
    assert result.metrics["rollout/resumed_samples"] == resumed > 0
    had = [len(sample.prompt_ids) + sample.length for sample in pool.submitted if sample.status == "partial"]
    assert result.metrics["rollout/resumed_tokens"] == sum(had)


def test_without_over_provision_nothing_waits_and_nothing_is_stale() -> None:
    config = rollout_config(over_provision=1.0)
    buffer = RolloutBuffer()
    for version, result in enumerate(play(buffer, config, range(4))):
        assert [group.id for group in result.groups] == list(range(version * 3, version * 3 + 3))
        assert result.metrics["rollout/stale_token_share"] == 0
        assert result.metrics["rollout/recycled_samples"] == 0
    assert not buffer.recycled and not buffer.surplus


def test_new_tokens_counts_what_the_pool_generated() -> None:
    config = rollout_config(advance_tokens=3)
    buffer = RolloutBuffer()
    for version in range(4):
        pool = ScriptedPool(version, 64, config.max_new_tokens)
        result = rollout_round(pool, buffer, prompts, config, version, score)
        assert result.metrics["rollout/new_tokens"] == pool.generated


@pytest.mark.parametrize("stale", ["regenerate", "drop"])
def test_a_stale_group_starts_anew_or_makes_room_for_another_and_is_counted(stale: str) -> None:
    config = rollout_config(max_staleness=1, stale=stale, groups=1, over_provision=1.0)
    old = Segment((5,), (-1.0,), 0)
    samples = tuple(Sample(uid, 0, prompts(0)) for uid in range(2))
    group = Group(0, (samples[0].extended(old, "finished"), samples[1].extended(old, "partial")))
    buffer = RolloutBuffer([group], next_group=1)
    result = rollout_round(ScriptedPool(2, 64, 40), buffer, prompts, config, weight_version=2, score=score)
    assert result.metrics["rollout/stale_groups"] == 1
    assert result.groups[0].id == (1 if stale == "drop" else 0) and buffer.next_group == result.groups[0].id + 1
    assert result.dropped == ((group,) if stale == "drop" else ())
    assert {version for sample in result.groups[0].samples for version in sample.versions} == {2}


@pytest.mark.parametrize("stale", ["regenerate", "drop"])
def test_where_old_tokens_are_masked_every_group_of_a_round_has_new_ones(stale: str) -> None:
    """A kept surplus group has none: a round of such groups alone had nothing to learn, and the run ended."""
    config = rollout_config(groups=2, over_provision=4.0, stale=stale)
    buffer, algorithm, used, expired = RolloutBuffer(), algorithm_config(off_policy="mask"), list[int](), 0.0
    for version in range(12):
        pool = ScriptedPool(version, 64, config.max_new_tokens)
        result = rollout_round(pool, buffer, prompts, config, version, score, newest_only=True)
        assert all(version in group.versions for group in result.groups)
        assert documents_of(result.groups, algorithm, version, config.max_new_tokens)
        used += [group.id for group in (*result.groups, *result.dropped)]
        waiting = [group.id for group in (*buffer.recycled, *buffer.surplus)]
        assert sorted(used + waiting) == list(range(buffer.next_group)), "each prompt is used once, dropped or still waits"
        expired += result.metrics["rollout/stale_groups"]
    assert expired


def test_metrics_have_their_keys_and_a_missing_reward_stays_missing() -> None:
    config = rollout_config(over_provision=1.0)

    def shy(sample: Sample) -> float | None:
        return None if sample.uid % UIDS_PER_GROUP == 0 else float(sample.group == 1)

    result = rollout_round(ScriptedPool(0, 64, 40), RolloutBuffer(), prompts, config, 0, each(shy))
    assert [group.samples[0].reward for group in result.groups] == [None, None, None]
    assert result.metrics["reward/missing"] == 3
    assert result.metrics["reward/mean"] == pytest.approx(1 / 3)
    assert result.metrics["reward/zero_std_share"] == 1
    names = "length_mean length_max finished_groups recycled_samples resumed_samples resumed_tokens stale_token_share"
    names += " staleness_mean staleness_max truncated_share new_tokens decode_steps stale_groups replaced_groups length_bias"
    expected = {f"rollout/{name}" for name in names.split()} | {
        f"reward/{n}" for n in ("mean", "std", "zero_std_share", "missing")
    }
    assert set(result.metrics) == expected


def test_a_round_that_nobody_could_judge_is_an_error_with_numbers() -> None:
    with pytest.raises(UserError, match="none of the 6 samples"):
        rollout_round(ScriptedPool(0, 64, 40), RolloutBuffer(), prompts, rollout_config(), 0, each(lambda sample: None))


def flat_often(sample: Sample) -> float | None:
    """Two of three prompts have one reward for all their samples."""
    return reward_of(sample) if sample.group % 3 == 2 and sample.uid % UIDS_PER_GROUP else float(sample.group % 3 == 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configs, st.integers(0, 6), st.integers(1, 60))
def test_refills_replace_groups_without_signal_and_lose_no_other(config: RolloutConfig, refills: int, longest: int) -> None:
    config = config.model_copy(update={"refills": refills})
    buffer, used, replaced = RolloutBuffer(), list[int](), 0
    for version in range(5):
        pool = ScriptedPool(version, longest, config.max_new_tokens, slots=7)
        result = rollout_round(pool, buffer, prompts, config, version, each(flat_often))
        assert len(result.groups) == config.groups and all(group.done for group in result.groups)
        assert not pool.queue, "the engines are empty"
        assert result.metrics["rollout/new_tokens"] == pool.generated
        flat = round(result.metrics["reward/zero_std_share"] * config.groups)
        if refills and flat:
            assert not buffer.surplus, "useful groups go before those without signal"
        if refills == 0:
            assert result.metrics["rollout/replaced_groups"] == 0
        replaced += int(result.metrics["rollout/replaced_groups"])
        used += [group.id for group in (*result.groups, *result.dropped)]
        waiting = [group.id for group in (*buffer.recycled, *buffer.surplus)]
        assert len(set(used + waiting)) == len(used + waiting) == buffer.next_group - replaced


def test_enough_refills_leave_no_group_without_signal_and_draw_no_more_than_they_need() -> None:
    config = rollout_config(refills=20, over_provision=1.0)

    def third(sample: Sample) -> float:
        return float(sample.group % 3 == 0 and sample.uid % UIDS_PER_GROUP)

    buffer = RolloutBuffer()
    result = rollout_round(ScriptedPool(0, 64, 40), buffer, prompts, config, 0, each(third))
    assert [group.id for group in result.groups] == [0, 3, 6]
    assert result.metrics["reward/zero_std_share"] == 0
    assert result.metrics["rollout/replaced_groups"] == buffer.next_group - 3 == 4, "0 1 2, then 3 4, then 5, then 6"


def test_a_task_without_signal_ends_a_round_when_the_refills_are_used_up() -> None:
    buffer = RolloutBuffer()
    config = rollout_config(refills=2, over_provision=1.0)
    result = rollout_round(ScriptedPool(0, 64, 40), buffer, prompts, config, 0, each(lambda sample: 0.0))
    assert result.metrics["reward/zero_std_share"] == 1
    assert result.metrics["rollout/finished_groups"] == buffer.next_group == 9
    assert result.metrics["rollout/replaced_groups"] == 6 and not buffer.recycled and not buffer.surplus


def test_submitted_groups_rounds_up_and_forgives_floating_point() -> None:
    assert submitted_groups(10, rollout_config(over_provision=1.1)) == 11
    assert submitted_groups(3, rollout_config(over_provision=1.5)) == 5
    assert submitted_groups(3, rollout_config(over_provision=1.0)) == 3


def test_complete_finishes_everything_in_uid_order() -> None:
    samples = [Sample(uid, uid, (1,)) for uid in (5, 3, 9)]
    done = complete(ScriptedPool(0, 64, 40, slots=1), samples, advance_tokens=4)
    assert [sample.uid for sample in done] == [3, 5, 9]
    assert all(sample.length == min(final_length(sample.uid, 64), 40) for sample in done)
