"""Stop strings: in bytes as in text, over tokens, interruptions, turns and completion servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from launch.cli import load
from rl.april import complete
from rl.engine.settings import EngineSettings
from rl.engine.stops import Stops
from rl.loop import Reinforcement
from rl.rewards.calculator import Calculator
from rl.token_task import TokenTask
from rl.trajectory import Sample, Segment
from rl.turns import TurnPool, with_reply
from tests.rl.completion_server import CompletionServer, Events
from tests.rl.test_engine import AHEAD, CONFIG, EOS, MAX_NEW, assert_like_the_trainer, engine_for, interrupted, requests
from tests.rl.test_server import pool_at
from tests.rl.test_turns import in_tokens, tokenizer  # noqa: F401 - fixtures
from trainer.config.rl import RLConfig
from trainer.model.transformer import LanguageModel
from trainer.tokenizer import Tokenizer

# Tokens 2..19 of the tiny model: some spell half a character, one spells a whole stop string and more, one nothing.
PIECES = [b"", b"", b"a", b"b", b"c", b"ab", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"##", b"#\n#", b"", b"x", b"y", b"z"]
SPELLED = (*PIECES, b"b\xc3", b"end", b"en", b"d")
STOPS = Stops(tuple(s.encode() for s in ("é", "ca", "###", "end", "€b")), SPELLED, included=False)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.initialize(CONFIG, seed=0, batch_invariant=True)


def first_stop(tokens: Sequence[int], strings: Sequence[bytes]) -> int | None:
    """How many tokens it takes until a string is there, by looking at the whole text after each."""
    counts = range(1, len(tokens) + 1)
    return next((count for count in counts if any(string in spelled(tokens[:count]) for string in strings)), None)


def spelled(tokens: Sequence[int]) -> bytes:
    return b"".join(SPELLED[token] for token in tokens if token < len(SPELLED))


Texts = st.lists(st.sampled_from(["a", "b", "ab", "ba", "é", "aé", "€", "###", "#"]), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 22), max_size=24), Texts, st.integers(0, 24), st.booleans())
def test_a_text_ends_where_the_first_string_is_complete_however_it_is_cut(
    tokens: list[int], strings: list[str], interrupted: int, included: bool
) -> None:
    stops = Stops(tuple(s.encode() for s in strings), SPELLED, included)
    wanted, tail = first_stop(tokens, stops.strings), b""
    for place, token in enumerate(tokens):
        if place == interrupted:
            tail = stops.tail(tokens[:place])
        tail, complete = stops.after(tail, token)
        assert complete == (place + 1 == wanted)
        if complete:
            text = spelled(tokens[: place + 1])
            ends = {text.find(s) + len(s): s for s in sorted(stops.strings, key=len) if s in text}
            end, string = min(ends.items())
            assert stops.text(tokens[: place + 1]) == text[: end - (0 if included else len(string))].decode(errors="replace")
            return
    assert wanted is None and stops.text(tokens) == spelled(tokens).decode(errors="replace")


# ---------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def stopped(model: LanguageModel) -> list[Sample]:
    return complete(engine_for(model, stops=STOPS), requests(40), advance_tokens=5)


def test_a_response_is_the_unstopped_one_up_to_the_token_that_completes_a_string(
    model: LanguageModel, stopped: list[Sample]
) -> None:
    free, spanning, ends = complete(engine_for(model), requests(40), advance_tokens=5), 0, 0
    for found, whole in zip(stopped, free, strict=True):
        count = first_stop(whole.response_ids, STOPS.strings)
        assert found.response_ids == whole.response_ids[:count] and found.logprobs == whole.logprobs[:count]
        assert found.status == ("finished" if count is not None else whole.status)
        if count is not None:
            ends += 1
            spanning += not any(s in SPELLED[found.response_ids[-1]] for s in STOPS.strings)
            assert not any(s.decode() in STOPS.text(found.response_ids) for s in STOPS.strings)
            assert replace(STOPS, included=True).text(found.response_ids).endswith(tuple(s.decode() for s in STOPS.strings))
    assert ends > 8 and spanning > 4, "the fixture shows both"
    assert_like_the_trainer(model, stopped)


@AHEAD
@pytest.mark.parametrize("advance", [1, 2, 3])
def test_strings_that_span_interruptions_end_the_same_responses(
    model: LanguageModel, stopped: list[Sample], advance: int, ahead: bool
) -> None:
    engine, waiting, done = engine_for(model, slots=6, stops=STOPS, ahead=ahead), requests(40), list[Sample]()
    while waiting:
        ended, waiting = interrupted(engine, waiting, advance)
        done += ended
    done.sort(key=lambda item: item.uid)
    assert [(s.response_ids, s.logprobs, s.status) for s in done] == [(s.response_ids, s.logprobs, s.status) for s in stopped]
    assert any(len(s.segments[-1].token_ids) == 1 and s.response_ids[-1] in (6, 7, 9, 19) for s in done), "a string was cut"


def replied(samples: Sequence[Sample]) -> list[Sample]:
    """Replies twice, with what spells the beginning of a stop string and a whole one."""
    return [with_reply(s, (17, 4, 18), MAX_NEW) if len(s.turns) < 5 else s for s in samples]


@AHEAD
@pytest.mark.parametrize("advance", [1, 100])
def test_each_turn_ends_at_its_own_string_and_replies_end_nothing(model: LanguageModel, advance: int, ahead: bool) -> None:
    engine = engine_for(model, slots=40, stops=STOPS, ahead=ahead)
    pool, waiting, done = TurnPool(engine, replied), requests(40), list[Sample]()
    while waiting:
        ended, waiting = interrupted(pool, waiting, advance)
        done += ended
    by_string = 0
    for sample in done:
        for number, turn in enumerate(sample.turns):
            if number % 2 == 0 and (number < len(sample.turns) - 1 or sample.status == "finished"):
                count = first_stop(turn, STOPS.strings)
                assert count == len(turn) if count is not None else turn[-1] == EOS
                by_string += count is not None
            elif number % 2:
                assert turn == (17, 4, 18)
    assert by_string > 10 and max(len(sample.turns) for sample in done) == 5
    done.sort(key=lambda item: item.uid)
    whole = complete(TurnPool(engine_for(model, stops=STOPS), replied), requests(40), advance_tokens=5)
    assert [(s.turns, s.logprobs, s.status) for s in done] == [(s.turns, s.logprobs, s.status) for s in whole]


STOP_IDS = frozenset({5, 12})  # the second spells nothing, as special tokens do


@pytest.fixture(scope="module")
def ended(model: LanguageModel) -> list[Sample]:
    return complete(engine_for(model, stop_ids=STOP_IDS), requests(40), advance_tokens=5)


def test_a_stop_token_ends_a_response_as_eos_does(model: LanguageModel, ended: list[Sample]) -> None:
    free, by_token = complete(engine_for(model), requests(40), advance_tokens=5), 0
    for found, whole in zip(ended, free, strict=True):
        count = next((n for n, token in enumerate(whole.response_ids, start=1) if token in (EOS, *STOP_IDS)), None)
        assert found.response_ids == whole.response_ids[:count] and found.logprobs == whole.logprobs[:count]
        assert found.status == ("truncated" if count is None else "finished")
        by_token += found.response_ids[-1] in STOP_IDS
    assert by_token > 8
    assert_like_the_trainer(model, ended)


# ---------------------------------------------------------------- completion servers


def test_completions_end_at_a_stop_token_and_one_that_goes_on_is_an_error(model: LanguageModel) -> None:
    with CompletionServer(model, EOS) as server, pool_at(server, slots=3, stop_ids=STOP_IDS) as pool:
        done = complete(pool, requests(40), advance_tokens=5)
        assert all(body["stop_token_ids"] == [EOS, *sorted(STOP_IDS)] for body in server.bodies)
    assert sum(sample.response_ids[-1] in STOP_IDS for sample in done) > 8
    for sample in done:
        assert not {EOS, *STOP_IDS} & set(sample.response_ids[:-1])
        assert (sample.status == "finished") == (sample.response_ids[-1] in (EOS, *STOP_IDS))
    assert_like_the_trainer(model, done)

    def deaf(number: int, events: Events) -> Events:
        events[0]["choices"][0]["token_ids"] = [12]
        return events

    with CompletionServer(model, EOS, mutate=deaf) as server, pool_at(server, stop_ids=STOP_IDS) as pool:
        pool.submit(requests(1))
        with pytest.raises(UserError, match="goes on after <eos> or a stop token"):
            pool.advance(1)


@pytest.mark.parametrize("together", [1, 3, 100], ids=["a-token-an-event", "three", "all-at-once"])
def test_completions_end_at_the_string_whatever_the_server_sends_beyond(
    model: LanguageModel, stopped: list[Sample], together: int
) -> None:
    """The server of this test never looks for the strings, as one does whose request holds only the end of one."""

    def merged(number: int, events: Events) -> Events:
        *tokens, usage = events
        return [_merged(tokens[first : first + together]) for first in range(0, len(tokens), together)] + [usage]

    with CompletionServer(model, EOS, mutate=merged) as server, pool_at(server, slots=3, stops=STOPS) as pool:
        done = complete(pool, requests(40), advance_tokens=5)
        assert all(body["stop"] == ["é", "ca", "###", "end", "€b"] for body in server.bodies)
    ended = [sample for sample in done if first_stop(sample.response_ids, STOPS.strings) is not None]
    assert len(ended) > 8
    for sample in done:
        count = first_stop(sample.response_ids, STOPS.strings)
        assert count == sample.length if count is not None else sample.length == MAX_NEW or sample.response_ids[-1] == EOS
        assert sample.status == ("truncated" if count is None and sample.response_ids[-1] != EOS else "finished")
    assert_like_the_trainer(model, done)


def _merged(events: Events) -> dict[str, Any]:
    choices = [event["choices"][0] for event in events]
    logprobs = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    tokens = [token for choice in choices for token in choice["token_ids"]]
    last = {**choices[-1], "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}
    return {**events[-1], "choices": [last]}


def test_a_string_that_spans_two_requests_ends_the_sample(model: LanguageModel) -> None:
    begun = Sample(7, 0, (3, 4)).extended(Segment((2, 6), (-1.0, -1.0), 0), "partial")  # "a" and half of an "é"
    other = Sample(8, 0, (3, 4)).extended(Segment((2, 2), (-1.0, -1.0), 0), "partial")

    def script(number: int, events: Events) -> Events:
        events[0]["choices"][0]["token_ids"] = [7]  # the other half
        return events

    with CompletionServer(model, EOS, mutate=script) as server, pool_at(server, stops=STOPS) as pool:
        ended, going_on = complete(pool, [begun, other], 1)
    assert ended.response_ids == (2, 6, 7) and ended.status == "finished" and STOPS.text(ended.response_ids) == "a"
    assert going_on.response_ids[:3] == (2, 2, 7) and going_on.length > 3


# ---------------------------------------------------------------- what the task sees


def engine_settings(task: TokenTask) -> EngineSettings:
    """Of a run with this task."""
    others: dict[str, Any] = dict.fromkeys(("model", "start_from", "ranks", "dtype", "run", "tracker", "stop", "memory"))
    return Reinforcement(config=task.config, task=task, **others).engine_settings


@pytest.mark.parametrize(("included", "seen"), [(False, " calc 1"), (True, " calc 1 +")])
def test_the_task_sees_the_models_turns_up_to_the_string(
    in_tokens: Any,  # noqa: F811
    tokenizer: Tokenizer,  # noqa: F811
    included: bool,
    seen: str,
) -> None:
    task: TokenTask = in_tokens(
        Calculator(seed=0), "task=calculator", "rollout.stop=[' +',nothing]", f"rollout.include_stop={included}"
    )
    turn, reply = tuple(tokenizer.encode(" calc 1 + 2")), tuple(tokenizer.encode(" 3 + 4"))
    said = Segment(turn, (0.0,) * len(turn), 0)
    sample = Sample(0, 0, (1,)).extended(said, "finished").replied(reply)
    sample = sample.extended(replace(said, token_ids=(*turn[:-1], tokenizer.eos)), "finished")
    assert task.response(sample).turns == (seen, " 3 + 4", seen)
    assert engine_settings(task).stops == task.stops and task.stops is not None
    assert task.stops.strings == (b" +", b"nothing")
    assert engine_settings(in_tokens(Calculator(seed=0), "task=calculator")).stops is None


def test_the_task_sees_the_text_before_a_stop_token(in_tokens: Any, tokenizer: Tokenizer) -> None:  # noqa: F811
    task: TokenTask = in_tokens(Calculator(seed=0), "task=calculator", "rollout.stop_tokens=['<|bos|>',c]")
    letter = tokenizer.id_of("c")
    found = engine_settings(task)
    assert found.stop_ids == {tokenizer.bos, letter} and found.ends(tokenizer.eos)
    turn = tuple(tokenizer.encode(" 1 + 2"))
    for end in (tokenizer.bos, letter, tokenizer.eos):
        said = Segment((*turn, end), (0.0,) * (len(turn) + 1), 0)
        assert task.response(Sample(0, 0, (1,)).extended(said, "finished")).turns == (" 1 + 2",)
    with pytest.raises(UserError, match=r"has no token '<\|im_end\|>'; its added tokens are: <\|bos\|>, <\|eos\|>, <\|pad\|>"):
        engine_settings(in_tokens(Calculator(seed=0), "task=calculator", "rollout.stop_tokens=['<|im_end|>']"))


def test_bytes_of_tokens_are_the_text_that_the_tokenizer_makes_of_them(tokenizer: Tokenizer) -> None:  # noqa: F811
    stops = Stops((b"\x00never\x00",), tokenizer.spelled(), included=False)
    alphabet = {token: text for token, text in enumerate(tokenizer.spelled()) if len(text) == 1}
    assert sorted(alphabet.values()) == [bytes([byte]) for byte in range(256)]

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30), st.text(max_size=12))
    def check(ids: list[int], text: str) -> None:
        assert stops.text(ids) == tokenizer.decode(ids)
        assert stops.text(tokenizer.encode(text)) == text

    check()


def test_an_empty_string_is_refused() -> None:
    assert load(RLConfig, "rl", ["checkpoint=a", "rollout.stop=['###',' end']"]).rollout.stop == ("###", " end")
    with pytest.raises(UserError, match=r"rollout\.stop"):
        load(RLConfig, "rl", ["checkpoint=a", "rollout.stop=['']"])
