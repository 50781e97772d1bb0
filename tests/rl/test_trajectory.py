"""Samples, groups and the rollout buffer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.trajectory import Group, RolloutBuffer, Sample, Segment, Status, fresh_group

finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    tokens = draw(st.lists(st.integers(0, 2**31), min_size=1, max_size=4))
    sampled = draw(st.booleans())
    logprobs = draw(st.lists(finite, min_size=len(tokens), max_size=len(tokens))) if sampled else []
    others = st.one_of(st.none(), st.lists(finite, min_size=len(tokens), max_size=len(tokens)).map(tuple))
    whole, asked = draw(others) if sampled else None, draw(others)
    return Segment(tuple(tokens), tuple(logprobs), draw(st.integers(0, 9)), sampled, whole, asked)


@st.composite
def groups(draw: st.DrawFn, done: bool) -> Group:  # some samples are conversations
    group_id = draw(st.integers(0, 10**9))
    samples = []
    for sample in fresh_group(group_id, draw(st.lists(st.integers(0, 99), min_size=1, max_size=3)), 2).samples:
        parts = draw(st.lists(segments(), min_size=1, max_size=3))
        statuses: tuple[Status, ...] = ("finished", "truncated") if done or sample.uid % 2 else ("partial",)
        last: Status = draw(st.sampled_from(statuses))
        for index, part in enumerate(parts):
            reply = draw(st.lists(st.integers(0, 99), max_size=3)) if index else []
            sample = replace(sample, status="finished").replied(reply) if reply else sample
            sample = sample.extended(part, last if index == len(parts) - 1 else "partial")
        samples.append(sample)
    return Group(group_id, tuple(samples))


def fresh(index: int) -> Group:
    return fresh_group(index, (1, 2), 2)


def test_sample_properties_join_the_segments_in_order() -> None:
    sample = Sample(uid=3, group=0, prompt_ids=(9,))
    assert (sample.length, sample.versions, sample.done) == (0, (), False)
    sample = sample.extended(Segment((4, 5), (-0.5, -0.25), 2), "partial").extended(Segment((6,), (-1.0,), 4), "finished")
    assert sample.response_ids == (4, 5, 6)
    assert sample.logprobs == (-0.5, -0.25, -1.0)
    assert sample.versions == (2, 2, 4)
    assert (sample.length, sample.done) == (3, True)


def test_whole_logprobs_are_those_of_the_segments_that_have_others_and_a_reply_has_none() -> None:
    """Of a run that went on with top_p after a segment without it, and of a conversation."""
    sample = Sample(uid=3, group=0, prompt_ids=(9,)).extended(Segment((4, 5), (-0.5, -0.25), 2), "finished").replied((8,))
    assert sample.whole_logprobs is None
    sample = sample.extended(Segment((6,), (-0.5,), 4, whole_logprobs=(-0.75,)), "finished")
    assert sample.logprobs == (-0.5, -0.25, 0.0, -0.5) and sample.whole_logprobs == (-0.5, -0.25, 0.0, -0.75)
    with pytest.raises(AssertionError):
        Segment((1, 2), (-0.5, -0.5), 0, whole_logprobs=(-0.75,))


def test_a_done_sample_cannot_be_extended_and_lengths_of_a_segment_must_agree() -> None:
    done = Sample(uid=0, group=0, prompt_ids=(1,)).extended(Segment((4,), (-1.0,), 0), "truncated")
    with pytest.raises(AssertionError, match="truncated already"):
        done.extended(Segment((5,), (-1.0,), 0), "finished")
    with pytest.raises(AssertionError):
        Segment((1, 2), (-0.5,), 0)


def test_uids_are_unique_across_groups_of_different_sizes() -> None:
    uids = [sample.uid for index, size in enumerate((8, 2, 64, 1)) for sample in fresh_group(index, (1,), size).samples]
    assert len(set(uids)) == len(uids)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(groups(done=False), max_size=3), st.lists(groups(done=True), max_size=3), st.integers(0, 10**6))
def test_buffer_survives_json_bit_by_bit(recycled: list[Group], surplus: list[Group], cursor: int) -> None:
    buffer = RolloutBuffer(recycled, surplus, cursor)
    again = RolloutBuffer.from_state(json.loads(json.dumps(buffer.to_state())))
    assert again.recycled == tuple(recycled)
    assert again.surplus == tuple(surplus)
    assert again.next_group == cursor


def finished(index: int, version: int = 0) -> Group:
    part = Segment((7,), (-1.0,), version)
    return Group(index, tuple(sample.extended(part, "finished") for sample in fresh(index).samples))


def partial(index: int, version: int = 0) -> Group:
    first, second = finished(index, version).samples[0], fresh(index).samples[1]
    return Group(index, (first, second))


def test_take_gives_surplus_then_recycled_then_fresh_groups() -> None:
    buffer = RolloutBuffer(recycled=[partial(1), partial(2)], surplus=[finished(3)], next_group=4)
    assert [group.id for group in buffer.take(2, 5, fresh)] == [3, 1, 2, 4, 5]
    assert buffer.next_group == 6


def test_take_starts_nothing_when_the_surplus_is_a_whole_round() -> None:
    buffer = RolloutBuffer(recycled=[partial(1)], surplus=[finished(2), finished(3), finished(4)], next_group=5)
    assert [group.id for group in buffer.take(2, 4, fresh)] == [2, 3]
    buffer.settle([], [])
    assert [group.id for group in (*buffer.recycled, *buffer.surplus)] == [1, 4]
    assert buffer.next_group == 5


def test_state_saved_in_the_middle_of_a_round_holds_what_is_in_flight_and_takes_it_again() -> None:
    buffer = RolloutBuffer(recycled=[partial(1), partial(2)], surplus=[finished(0)], next_group=3)
    taken = buffer.take(2, 4, fresh)
    again = RolloutBuffer.from_state(buffer.to_state())
    assert again.take(2, 4, fresh) == taken
    assert again.next_group == buffer.next_group == 4
    with pytest.raises(AssertionError, match="not settled"):
        buffer.take(2, 4, fresh)


def test_what_expires_is_a_whole_group_that_starts_anew_with_its_uids_or_is_gone() -> None:
    old, kept = [finished(3, 4), partial(1, version=4)], [partial(2, version=6), finished(4, 5)]
    for drop in (False, True):
        buffer = RolloutBuffer(recycled=[old[1], kept[0]], surplus=[old[0], kept[1]])
        assert buffer.expire(5, drop=drop) == old
        assert buffer.surplus == (kept[1],)
        assert buffer.recycled == (*(() if drop else (fresh(3), fresh(1))), kept[0])
        assert buffer.expire(5, drop=drop) == []
        assert buffer.expire(5, drop=drop, newest=5) == [], "a group with a token of version 5 is of use, and an unfinished one"
        assert buffer.expire(5, drop=drop, newest=6) == [kept[1]]
