"""A pool that generates at a completion server: exact tokens and log-probabilities, an error for what cannot be true."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from kernels.errors import UserError
from launch.cli import load
from rl.april import complete, rollout_round
from rl.engine.completions import BadReply, Completion, parse, retry_after
from rl.engine.sampler import Sampling
from rl.engine.server import UNKNOWN, ServerPool
from rl.trajectory import RolloutBuffer, Sample, Segment
from tests.rl.completion_server import DROP, HOLD, CompletionServer, Events, Mutate, events_of
from tests.rl.test_april import rollout_config
from tests.rl.test_engine import CONFIG, EOS, MAX_NEW, assert_like_the_trainer, requests, settings, trainer_logprobs
from trainer.config.rl import RLConfig, SyncConfig
from trainer.model.hf import save_pretrained
from trainer.model.transformer import LanguageModel
from trainer.tokenizer import Tokenizer

FULL = SyncConfig(transport="store", anchor_every=1, check=False)
VOCABULARY = CONFIG.vocab_size or 0
TOKENIZER: Any = None  # the ranks of these tests write none
ENDS = 3  # the request whose completion ends with <eos> before the limit


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.initialize(CONFIG, seed=0, batch_invariant=True)


@contextmanager
def pool_at(
    server: CompletionServer,
    *,
    url: str | None = None,
    retries: int = 2,
    timeout_s: float = 20.0,
    folder: Path = Path(),
    **changes: Any,
) -> Iterator[ServerPool]:
    config = rollout_config(server=url or server.url, server_retries=retries, server_timeout_s=timeout_s)
    config = config.model_copy(update={key: changes.pop(key) for key in ("server_reload",) if key in changes})
    with ServerPool(config, settings(**changes), VOCABULARY, folder, TOKENIZER) as pool:
        yield pool


def test_completions_are_whole_exact_and_labelled(model: LanguageModel) -> None:
    with CompletionServer(model, EOS) as server, pool_at(server, slots=3) as pool:
        done = complete(pool, requests(20), advance_tokens=5)
        assert pool.drain() == [] and pool.advance(5) == []
    assert [item.uid for item in done] == [item.uid for item in requests(20)]
    assert {item.status for item in done} == {"finished", "truncated"}
    assert {version for item in done for version in item.versions} == {UNKNOWN}
    for item in done:
        assert item.length == MAX_NEW or item.response_ids[-1] == EOS
    assert_like_the_trainer(model, done)
    assert 1 < server.most_running <= 3, "no more at once than there are slots"


def test_a_request_says_all_that_shapes_the_distribution(model: LanguageModel) -> None:
    sampling = Sampling(0.7, 3, top_k=5, top_p=0.9, min_p=0.02)
    with CompletionServer(model, EOS) as server, pool_at(server, sampling=sampling) as pool:
        complete(pool, requests(2), 1)
    for body, item in zip(server.bodies, requests(2), strict=True):
        assert body["prompt"] == list(item.prompt_ids) and body["max_tokens"] == MAX_NEW and body["model"] == "tiny"
        assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"]) == (0.7, 5, 0.9, 0.02)
        assert (
            "stop" not in body
            and body["stop_token_ids"] == [EOS]
            and body["return_token_ids"] is True
            and body["stream"] is True
        )
        assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1, 0, 0)
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == 2 and all(0 <= seed < 2**31 for seed in seeds)


def test_an_abort_in_the_middle_keeps_what_came_and_stops_the_server(model: LanguageModel) -> None:
    def hold(number: int, events: Events) -> Events:
        return [*events[:4], HOLD, *events[4:]]

    with CompletionServer(model, EOS, mutate=hold) as server, pool_at(server, slots=2) as pool:
        pool.submit(requests(5))
        wait_until(lambda: sum(len(work.tokens) for work in pool._works.values()) == 8)
        unfinished = sorted(pool.drain(), key=lambda item: item.uid)
        wait_until(lambda: server.aborted == 2)
        assert [item.length for item in unfinished] == [4, 4, 0, 0, 0]
        assert [item.status for item in unfinished] == ["partial"] * 2 + ["pending"] * 3
        server.go_on()
        pool._version = 3  # as if it had been given new weights
        done = complete(pool, unfinished, 1)
    for item, before in zip(done, unfinished, strict=True):
        assert item.segments[: len(before.segments)] == before.segments
        assert item.versions == (UNKNOWN,) * before.length + (3,) * (item.length - before.length)
    assert server.bodies[2]["prompt"] == [*unfinished[0].prompt_ids, *unfinished[0].response_ids], "token ids, never text"
    assert_like_the_trainer(model, done)


def test_what_ended_before_the_abort_is_not_lost(model: LanguageModel) -> None:
    with CompletionServer(model, EOS) as server, pool_at(server) as pool:
        pool.submit(requests(6))
        wait_until(lambda: pool._ended.qsize() == 6)
        assert {item.status for item in pool.drain()} <= {"finished", "truncated"}
        assert pool.drain() == []


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in 30 s"
        time.sleep(0.005)


def test_a_server_that_breaks_off_is_asked_again_for_the_rest(model: LanguageModel) -> None:
    def fragile(number: int, events: Events) -> Events:
        if number % 3 == 0 and len(events) > 4:
            return [*events[:3], b'data: {"choices": [{"ind', DROP]
        if number % 3 == 1 and len(events) > 4:
            aborted = copy.deepcopy(events[:2])
            aborted[-1]["choices"][0]["finish_reason"] = "abort"
            return aborted
        return events

    with CompletionServer(model, EOS, mutate=fragile) as server, pool_at(server) as pool:
        done = complete(pool, requests(6), 1)
    assert len(server.bodies) > 6 and all(len(item.segments) == 1 for item in done)
    assert_like_the_trainer(model, done)


def test_a_server_that_reports_a_failure_of_its_own_within_a_stream_is_asked_again_for_the_rest(model: LanguageModel) -> None:
    """As for a status: vLLM and SGLang write an event with its code where the answer has begun."""
    failure = b'data: {"error": {"message": "engine restarts", "type": "InternalServerError", "param": null, "code": 500}}\n\n'

    def failing(number: int, events: Events) -> Events:
        return [*events[:3], failure] if number == 0 else events

    with CompletionServer(model, EOS, mutate=failing) as server, pool_at(server) as pool:
        done = complete(pool, requests(1), 1)
        assert [len(body["prompt"]) - len(done[0].prompt_ids) for body in server.bodies] == [0, 3]
    assert_like_the_trainer(model, done)
    refused = failure.replace(b"500", b"400")
    with CompletionServer(model, EOS, mutate=lambda number, events: [refused]) as server, pool_at(server) as pool:
        pool.submit(requests(1))
        with pytest.raises(BadReply, match="engine restarts"):
            pool.advance(1)


def test_a_server_that_falls_silent_is_asked_again_for_the_rest(model: LanguageModel) -> None:
    def silent(number: int, events: Events) -> Events:
        return [*events[:3], HOLD, *events[3:]] if number == 0 else events

    with CompletionServer(model, EOS, mutate=silent) as server, pool_at(server, timeout_s=2.0) as pool:
        done = complete(pool, requests(1), 1)
        assert [len(body["prompt"]) - len(done[0].prompt_ids) for body in server.bodies] == [0, 3]
        server.go_on()
    assert_like_the_trainer(model, done)


def test_a_server_that_is_gone_is_an_error_that_says_what_to_do(model: LanguageModel) -> None:
    with CompletionServer(model, EOS, mutate=lambda number, events: [events[0], HOLD]) as server:
        with pool_at(server, retries=0) as pool:
            pool.submit(requests(1))
            server.held.wait(30)
            server.__exit__(None, None, None)
            with pytest.raises(UserError, match=r"makes no progress with sample 1000 in 1 tries: .* resume=auto"):
                pool.advance(1)
        gone = server.url
        server.__enter__()
    with (
        pytest.raises(UserError, match=r"no completion server answers at .*/models .* rollout.server=null"),
        pool_at(server, url=gone),
    ):
        pass


@pytest.mark.parametrize(
    ("status", "message"), [(503, r"in 1 tries: status 503: .*something wrong"), (400, r"answers 400: .*wrong")]
)
def test_refused_requests_are_errors_with_the_servers_words(model: LanguageModel, status: int, message: str) -> None:
    with CompletionServer(model, EOS) as server, pool_at(server, retries=0) as pool:
        server.status = status
        pool.submit(requests(1))
        with pytest.raises(UserError, match=message):
            pool.advance(1)
        pool.drain()
        pool.submit(requests(1))
        wait_until(lambda: pool._ended.qsize() == 1)
        with pytest.raises(UserError, match=message):
            pool.drain()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(model: LanguageModel, status: int) -> None:
    with CompletionServer(model, EOS) as server, pool_at(server, retries=1) as pool:
        server.status, server.retry_after = status, "2"
        pool.submit(requests(1))
        wait_until(lambda: len(server.asked) == 1)
        server.status = 200
        done = pool.advance(1)
        first, second = server.asked
        assert 2 <= second - first < 30 and len(done) == 1
    assert_like_the_trainer(model, done)


def test_a_server_that_wants_to_be_left_alone_for_too_long_is_an_error(model: LanguageModel) -> None:
    wrong = r"wants to be asked again in 3600 s, .* rollout\.server_timeout_s=20: status 429: .*something wrong.* resume=auto"
    with CompletionServer(model, EOS) as server, pool_at(server, retries=1) as pool:
        server.status, server.retry_after = 429, "3600"
        pool.submit(requests(1))
        with pytest.raises(UserError, match=wrong):
            pool.advance(1)
        assert len(server.asked) == 1


NOW = datetime(2026, 8, 1, 14, 30, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0), ("0", 0), ("30", 30), ("1.5", 1.5), ("9" * 400, float("inf")),
        ("Sat, 01 Aug 2026 14:31:00 GMT", 48), ("Sat, 01 Aug 2026 14:30:00 GMT", 0),  # which has passed
        ("-3", 0), ("nan", 0), ("\uff13", 0), ("soon", 0), ("Sat, 41 Aug 2026 14:31:00 GMT", 0), ("", 0),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_of_seconds_or_a_date(header: str | None, seconds: float) -> None:
    assert retry_after(header, NOW) == seconds


@given(st.text())
def test_no_retry_after_is_an_error(header: str) -> None:
    assert retry_after(header, NOW) >= 0


# ---------------------------------------------------------------- answers that cannot be true


def altered(**changes: Any) -> Mutate:
    """The second event with other values in its choice."""

    def mutate(number: int, events: Events) -> Events:
        events = copy.deepcopy(events)
        events[1]["choices"][0] |= changes
        return events

    return mutate


def without(field: str) -> Mutate:
    def mutate(number: int, events: Events) -> Events:
        events = copy.deepcopy(events)
        del events[1]["choices"][0][field]
        return events

    return mutate


def logprob(value: Any) -> dict[str, Any]:
    return {"token_logprobs": [value]}


def as_bytes(data: bytes) -> Mutate:
    return lambda number, events: [events[0], data]


WRONG: list[tuple[Mutate, str]] = [
    (as_bytes(b"data: {nonsense\n\n"), r"cannot be read: Invalid JSON.*It sent b'\{nonsense'"),
    (as_bytes(b"data: [1, 2]\n\n"), r"cannot be read"),
    (as_bytes(b"data: {}\n\n"), r"neither choices nor usage"),
    (as_bytes(b"<html>hello</html>\n"), r"does not answer with a stream of events: b'<html>"),
    (as_bytes(b'data: {"error": {"message": "out of memory"}}\n\n'), r"reports an error: .*out of memory"),
    (as_bytes(b'data: {"choices": [{"index": 0, "token_ids": [3], "logprobs": {"token_logprobs": [NaN]}}]}\n\n'), r"cannot be"),
    (altered(token_ids=["3"]), r"choices.0.token_ids.0: Input should be a valid integer"),
    (altered(token_ids=[3.5]), r"choices.0.token_ids.0: Input should be a valid integer"),
    (altered(token_ids=[True]), r"choices.0.token_ids.0: Input should be a valid integer"),
    (altered(token_ids=None), r"choices.0.token_ids: Input should be a valid array"),
    (without("token_ids"), r"choices.0.token_ids: Field required.*return_token_ids"),
    (altered(token_ids=[VOCABULARY]), r"has token 20, but the vocabulary has 20"),
    (altered(token_ids=[-1]), r"has token -1"),
    (altered(token_ids=[EOS]), r"goes on after <eos>"),
    (altered(token_ids=[3, 3]), r"tokens, but \d+ log-probabilities"),
    (without("logprobs"), r"has (\d+) tokens, but \d+ log-probabilities"),
    (altered(logprobs={"token_logprobs": [-1.0, -1.0]}), r"has 2 tokens, but 3 log-probabilities"),
    (altered(logprobs=logprob(None)), r"choices.0.logprobs.token_logprobs.0: Input should be a valid number"),
    (altered(logprobs=logprob(-9999.0)), r"has -9999.0 as the log-probability of a token that it drew"),
    (altered(logprobs=logprob(0.5)), r"has 0.5 as the log-probability"),
    (altered(finish_reason="length"), r"ends 22 tokens before rollout.max_new_tokens = 24.*context is shorter"),
    (altered(finish_reason="stop", token_ids=[3]), r'ends with "stop" at token 3 instead of <eos>'),
    (altered(finish_reason="content_filter"), r'ends with "content_filter"'),
    (altered(index=1), r"has choice 1, but one was asked for"),
    (altered(prompt_token_ids=[9, 9, 9]), r"is for another prompt than was sent"),
    (altered(token_ids=[3] * 30), r"has \d+ tokens more than were asked for"),
]


@pytest.mark.parametrize(("mutate", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_an_answer_that_cannot_be_true_is_an_error_and_never_a_sample(
    model: LanguageModel, mutate: Mutate, message: str
) -> None:
    with CompletionServer(model, EOS, mutate=mutate) as server, pool_at(server) as pool:
        pool.submit(requests(ENDS + 1)[ENDS:])
        with pytest.raises(BadReply, match=message):
            pool.advance(1)
    assert len(server.bodies) == 1, "it is not asked again"


# ---------------------------------------------------------------- the protocol, without a network


def reply(length: int, finished: bool, random: Random) -> Sample:
    tokens = (*(random.randrange(2, VOCABULARY) for _ in range(length - 1)), EOS if finished else 2)
    segment = Segment(tokens, tuple(-random.random() for _ in tokens), 0)
    return Sample(7, 0, (3, 4)).extended(segment, "finished" if finished else "truncated")


@settings_of_hypothesis(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, MAX_NEW), st.integers(0, 10**6), st.integers(0, 3 * MAX_NEW))
def test_an_answer_in_any_pieces_and_cut_off_anywhere_is_a_part_of_the_answer(length: int, seed: int, cut: int) -> None:
    random = Random(seed)
    sample = reply(length, finished=length < MAX_NEW, random=random)
    merged = merge(events_of(sample, {"prompt": [3, 4]}), random)
    work = Completion(Sample(7, 0, (3, 4)), settings(), VOCABULARY)
    work.request("tiny")
    for event in merged[:cut]:
        work.take(json.dumps(event).encode())
    work.settle()
    found = work.result(0)
    assert found.response_ids == sample.response_ids[: found.length] and found.logprobs == sample.logprobs[: found.length]
    if cut >= len(merged):
        assert found == sample
    assert found.done == (found.length == sample.length)


def merge(events: Events, random: Random) -> Events:
    """Several tokens an event; log-probabilities may come later than their tokens."""
    tokens = [e["choices"][0]["token_ids"][0] for e in events[:-1]]
    logprobs = [e["choices"][0]["logprobs"]["token_logprobs"][0] for e in events[:-1]]
    merged: Events = []
    while tokens or logprobs:
        count = random.randint(0, 3)
        behind = min(len(logprobs), max(0, random.randint(0, 3) if tokens[count:] else len(logprobs)))
        behind = min(behind, len(logprobs) - len(tokens[count:]))
        choice: dict[str, Any] = {"index": 0, "token_ids": tokens[:count], "finish_reason": None}
        choice["logprobs"] = {"token_logprobs": logprobs[:behind]} if behind else None
        del tokens[:count], logprobs[:behind]
        if not tokens and not logprobs:
            choice["finish_reason"] = events[-2]["choices"][0]["finish_reason"]
        merged.append({"choices": [choice]})
    return merged


@settings_of_hypothesis(max_examples=300, deadline=None, derandomize=True)
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["choices", "index", "token_ids", "logprobs", "token_logprobs", "finish_reason", "error", "usage"]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    ).map(lambda x: json.dumps(x).encode())
)
def test_hostile_json_is_a_bad_reply_and_nothing_else(data: bytes) -> None:
    work = Completion(Sample(7, 0, (3, 4)), settings(), VOCABULARY)
    work.request("tiny")
    try:
        work.take(data)
    except BadReply as error:
        assert "completion server" in str(error)
        return
    event = parse(data)
    assert all(isinstance(token, int) and 0 <= token < VOCABULARY for choice in event.choices for token in choice.token_ids)
    assert len(work.tokens) <= MAX_NEW and all(value <= 1e-3 for value in work.logprobs)


# ---------------------------------------------------------------- distributions, weights, rounds


@pytest.mark.parametrize(
    ("sampling", "option"),
    [
        (Sampling(0.8, 0), "rollout.temperature"),
        (Sampling(1.0, 0, top_k=4), "rollout.top_k"),
        (Sampling(1.0, 0, top_p=0.9), "rollout.top_p"),
        (Sampling(1.0, 0, min_p=0.1), "rollout.min_p"),
    ],
)
def test_raw_logprobs_are_found_out_where_they_would_be_wrong(
    model: LanguageModel, sampling: Sampling, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CompletionServer(model, EOS, raw=True) as server:
        with (
            pool_at(server, sampling=sampling) as pool,
            pytest.raises(UserError, match=rf"do not know of {option},.*processed"),
        ):
            pool.require_exact_distribution([(2, 3)])
        with pool_at(server, sampling=Sampling(1.0, 0)) as pool:
            pool.require_exact_distribution([(2, 3)])
    with CompletionServer(model, EOS) as server, pool_at(server, sampling=sampling) as pool:
        pool.require_exact_distribution([(2, 3)])
        monkeypatch.setattr("rl.engine.server.CERTAIN", -100.0)
        with pytest.raises(UserError, match=r"so sure of the next token after 1 prompts .* set them to 1.0, null, 1.0 and 0.0"):
            pool.require_exact_distribution([(2, 3)])


class ScriptedRanks:
    """Ranks that write this model."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def call(self, method: str, folder: Path, tokenizer: Tokenizer) -> list[None]:
        assert method == "export"
        save_pretrained(self.model, folder, None)
        return [None]


def test_new_weights_go_to_the_server_and_samples_say_which_ones_it_had(model: LanguageModel, tmp_path: Path) -> None:
    other = LanguageModel.initialize(CONFIG, seed=1, batch_invariant=True)
    with CompletionServer(model, EOS) as server:
        with pool_at(server, folder=tmp_path, server_reload=f"{server.root}/update_weights_from_disk") as pool:
            for version, weights in ((4, model), (5, other)):
                ranks: Any = ScriptedRanks(weights)
                assert pool.load_weights(ranks, version, FULL) == {"sync/version": version}
                done = complete(pool, requests(4), 1)
                assert {v for item in done for v in item.versions} == {version}
                for item, expected in zip(done, trainer_logprobs(weights, done), strict=True):
                    assert list(item.logprobs) == expected
        assert [folder.name for folder in server.loaded] == ["version_000004", "version_000005"]
        assert [folder.name for folder in tmp_path.iterdir()] == ["version_000005"], "the folder before is not needed any more"


def test_a_server_that_is_busy_at_the_start_and_with_new_weights_is_asked_again(model: LanguageModel, tmp_path: Path) -> None:
    ranks: Any = ScriptedRanks(model)
    with CompletionServer(model, EOS) as server:
        server.busy = 2
        with pool_at(server, folder=tmp_path, server_reload=f"{server.root}/update_weights_from_disk") as pool:
            assert len(server.headers) == 3, "it said which model it has when asked the third time"
            server.busy = 1
            assert pool.load_weights(ranks, 4, FULL) == {"sync/version": 4}
            assert len(server.loaded) == 1
            server.busy = 99
            message = r"no progress with POST \S+update_weights_from_disk in \d tries: status 429"
            with pytest.raises(UserError, match=message):
                pool.load_weights(ranks, 5, FULL)


def test_without_a_way_to_give_it_weights_the_server_has_unknown_ones(model: LanguageModel) -> None:
    ranks: Any = ScriptedRanks(model)
    with CompletionServer(model, EOS) as server, pool_at(server) as pool:
        assert pool.load_weights(ranks, 7, FULL) == {"sync/version": UNKNOWN}
        assert complete(pool, requests(1), 1)[0].versions[0] == UNKNOWN
        config = rollout_config(groups=2, samples_per_group=2, max_new_tokens=MAX_NEW)
        result = rollout_round(
            pool, RolloutBuffer(), lambda index: (2 + index % 9,), config, 7, lambda samples: [1.0] * len(samples)
        )
    assert result.metrics["rollout/staleness_max"] == 8 and result.metrics["rollout/stale_token_share"] == 1
    assert len(result.groups) == 2


def test_a_server_that_does_not_load_the_weights_ends_the_run(model: LanguageModel, tmp_path: Path) -> None:
    class Forgetful(ScriptedRanks):
        def call(self, method: str, folder: Path, tokenizer: Tokenizer) -> list[None]:
            folder.parent.mkdir(exist_ok=True)
            return [None]

    ranks: Any = Forgetful(model)
    wrong = {"update_weights_from_disk": r"did not load .*version_000001: .*there is no", "nothing": r"/nothing answers 404"}
    with CompletionServer(model, EOS) as server:
        for name, message in wrong.items():
            pool_there = pool_at(server, folder=tmp_path, server_reload=f"{server.root}/{name}")
            with pool_there as pool, pytest.raises(UserError, match=message):
                pool.load_weights(ranks, 1, FULL)


def test_a_key_of_the_environment_is_sent(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_SERVER_KEY", "hush")
    with CompletionServer(model, EOS) as server, pool_at(server):
        assert server.headers[-1]["Authorization"] == "Bearer hush"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm.off_policy=recompute"], r"algorithm.off_policy=recompute takes .* choose algorithm.off_policy=decoupled"),
        (["algorithm.off_policy=mask"], r"algorithm.off_policy=mask takes"),
        (["rollout.top_p=0.9"], r"bypass clips .* a completion server tells .* choose algorithm.off_policy=decoupled, or set"),
        (["sync=delta"], r"set sync=full"),
        (["rollout.over_provision=1.5"], r"long samples would never end; set rollout=sync, or name rollout.server_reload"),
        (["rollout.overlap=true"], r"set rollout=sync, or name rollout.server_reload"),
        (["rollout.server=localhost:8000"], r"rollout.server.*should begin with http"),
        (["rollout.server=http://me:hush@127.0.0.1/v1"], r"rollout.server.*has a name or password in it"),
        (["rollout.server_reload=http://me@127.0.0.1/v1"], r"rollout.server_reload.*give a key in TESSERA_SERVER_KEY"),
        (["rollout.placement=separate"], r"separate gives GPUs to our engines, and rollout.server is another"),
    ],
)
def test_options_that_do_not_go_with_a_server_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(RLConfig, "rl", ["checkpoint=a", "rollout=sync", "rollout.server=http://127.0.0.1:8000/v1", *arguments])
    with pytest.raises(UserError, match=r"there is none; set rollout.server"):
        load(RLConfig, "rl", ["checkpoint=a", "rollout.server_reload=http://127.0.0.1:8000/reload"])
