"""OpenAI's completions protocol as vLLM and SGLang implement it, on the client's side: requests, and answers to expect.

Token ids go in as the prompt, so nothing is ever tokenised twice. With `return_token_ids` and `logprobs` both servers send, in
every event of the stream, `choices[0].token_ids` and `choices[0].logprobs.token_logprobs` of the new tokens. Pure: no network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kernels.errors import UserError
from rl.engine.settings import EngineSettings
from rl.trajectory import Sample, Segment, Status
from trainer.json_text import first_problem

IMPOSSIBLE = -9999.0  # what vLLM writes for the logarithm of zero
ROUNDING = 1e-3  # by which the logarithm of a probability may exceed zero
SEEDS = (1 << 31) - 1


class _Record(BaseModel):
    """Of an answer: unknown fields are ignored, the known ones have their type, and no number is infinite."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class Logprobs(_Record):
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = None


class Choice(_Record):
    index: int
    token_ids: list[int]
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = None


class Event(_Record):
    """One event of a stream; `choices` is empty where it only counts usage, `error` is whatever the server says."""

    choices: list[Choice] = []
    error: Any = None


class BadReply(UserError):
    """The server answered what it must not, so nothing of the answer can be trusted."""


class BrokenOff(BadReply):
    """It says that it failed in the middle of an answer. What came before is good, and another request may go on from it."""


def may_pass(status: object) -> bool:
    """Whether a status of HTTP is of a server that has too much to do or failed by itself: later it may answer."""
    return isinstance(status, int) and (status == 429 or status >= 500)


def retry_after(header: str | None, now: datetime) -> float:
    """Seconds that an answer's Retry-After asks to be left alone, given as a number or as a date of HTTP (RFC 9110, 10.2.3);
    0 where it asks for nothing that can be read."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\d+(\.\d+)?", header, re.ASCII):
        return float(header)
    try:
        until = datetime.strptime(header, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)
    except ValueError:
        return 0.0
    return max(0.0, (until - now).total_seconds())


def parse(data: bytes) -> Event:
    try:
        event = Event.model_validate_json(data)
    except ValidationError as error:
        raise BadReply(
            f"the completion server's answer cannot be read: {first_problem(error)}; it should be vLLM or SGLang of a version "
            f"that knows return_token_ids. It sent {data[:200]!r}"
        ) from None
    if event.error is not None:
        code = event.error.get("code") if isinstance(event.error, dict) else None
        kind = BrokenOff if may_pass(code) else BadReply
        raise kind(f"the completion server reports an error: {str(event.error)[:500]}")
    if not event.choices and b'"usage"' not in data:
        raise BadReply(f"the completion server's answer has neither choices nor usage: {data[:200]!r}")
    return event


@dataclass(eq=False)
class Completion:
    """A sample on its way at a server, over as many requests as it takes."""

    sample: Sample
    settings: EngineSettings
    vocab_size: int
    tokens: list[int] = field(default_factory=list)  # new ones
    logprobs: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)  # as the prompt of the last request
    status: Status = "partial"
    tail: bytes = field(init=False)  # of the turn's text, up to the token `read`
    read: int = 0
    told: bool = False  # the server has said why it ended

    def __post_init__(self) -> None:
        stops = self.settings.stops
        self.tail = b"" if stops is None else stops.tail(self.sample.turn_so_far)

    @property
    def missing(self) -> int:
        """Tokens that it may still get."""
        return self.settings.max_new_tokens - self.sample.length - len(self.tokens)

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it that the server does not know of."""
        return self.status == "finished" and not self.told

    def request(self, model: str) -> dict[str, Any]:
        """The body of the next request. All that shapes the distribution is said: servers have defaults of their own."""
        sampling, stops, sample = self.settings.sampling, self.settings.stops, self.sample
        self.told = False
        self.sent = [*sample.prompt_ids, *sample.response_ids, *self.tokens]
        return {
            "model": model,
            "prompt": self.sent,
            "max_tokens": self.missing,
            "temperature": sampling.temperature,
            "top_k": -1 if sampling.top_k is None else sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": hash((sampling.seed, sample.uid, sample.length + len(self.tokens))) % SEEDS,
            "stop_token_ids": [self.settings.eos_id, *sorted(self.settings.stop_ids)],
            **({"stop": [string.decode() for string in stops.strings]} if stops else {}),
            "logprobs": 0,  # of the sampled tokens alone
            "return_token_ids": True,
            "stream": True,
        }

    def take(self, data: bytes) -> None:
        """One event of the answer. Raises BadReply where it cannot be true."""
        for choice in parse(data).choices:
            if choice.index != 0:
                raise self._wrong(f"has choice {choice.index}, but one was asked for")
            if self.status != "partial" and choice.token_ids:
                raise self._wrong("goes on after its end")
            if choice.prompt_token_ids is not None and choice.prompt_token_ids != self.sent:
                raise self._wrong("is for another prompt than was sent")
            self.tokens += choice.token_ids
            self.logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
            self._check(choice)
            self._look_for_stop()
            if choice.finish_reason is not None:
                self.told = True
                self._finish(choice.finish_reason)

    def settle(self) -> None:
        """After an answer that stopped anywhere: keeps the tokens whose log-probabilities came too."""
        if self.status == "partial":
            count = min(len(self.tokens), len(self.logprobs))
            del self.tokens[count:], self.logprobs[count:]
            if self.tokens and self.settings.ends(self.tokens[-1]):
                self.status = "finished"
            elif self.missing <= 0:
                self.status = "truncated"

    def result(self, version: int) -> Sample:
        """The sample with what it got from weights of `version`."""
        if self.tokens:
            return self.sample.extended(Segment(tuple(self.tokens), tuple(self.logprobs), version), self.status)
        return self.sample if self.status == "partial" else replace(self.sample, status=self.status)

    def _look_for_stop(self) -> None:
        """Ends the sample with the token that completes a stop string, once its log-probability is there.

        The server looks for them too, to stop, but sees the text of one request only, and may send what it decoded further.
        """
        while self.settings.stops and self.read < len(self.logprobs) and self.status == "partial":
            self.tail, complete = self.settings.stops.after(self.tail, self.tokens[self.read])
            self.read += 1
            if complete:
                del self.tokens[self.read :], self.logprobs[self.read :]
                self.status = "finished"

    def _check(self, choice: Choice) -> None:
        if len(self.logprobs) > len(self.tokens):
            raise self._wrong(f"has {len(self.tokens)} tokens, but {len(self.logprobs)} log-probabilities")
        if self.missing < 0:
            raise self._wrong(f"has {-self.missing} tokens more than were asked for")
        for token in choice.token_ids:
            if not 0 <= token < self.vocab_size:
                raise self._wrong(f"has token {token}, but the vocabulary has {self.vocab_size}; does it serve another model?")
        for value in choice.logprobs.token_logprobs if choice.logprobs else []:
            if not IMPOSSIBLE < value <= ROUNDING:
                raise self._wrong(f"has {value} as the log-probability of a token that it drew")
        before = self.tokens[max(0, len(self.tokens) - len(choice.token_ids) - 1) : -1]
        if any(map(self.settings.ends, before)):
            raise self._wrong("goes on after <eos> or a stop token; start the server so that it stops there")

    def _finish(self, reason: str) -> None:
        if reason == "abort" or self.status == "finished":
            return  # interrupted: what came is good, and another request goes on from it; or a stop string ended it already
        if len(self.tokens) != len(self.logprobs):
            raise self._wrong(f"has {len(self.tokens)} tokens, but {len(self.logprobs)} log-probabilities")
        last = self.tokens[-1] if self.tokens else None
        if reason in ("stop", "length") and last is not None and self.settings.ends(last):
            self.status = "finished"
        elif reason == "length" and self.missing == 0:
            self.status = "truncated"
        elif reason == "length":
            raise self._wrong(
                f"ends {self.missing} tokens before rollout.max_new_tokens = {self.settings.max_new_tokens}: the server's "
                f"context is shorter than loop.sequence_length = {self.settings.max_length}; start it with a longer one"
            )
        else:
            raise self._wrong(
                f'ends with "{reason}" at token {last} instead of <eos>, which is {self.settings.eos_id}; does the server have '
                "stops of its own (rollout.stop_tokens names them), or another tokenizer?"
            )

    def _wrong(self, what: str) -> BadReply:
        return BadReply(f"the completion server's answer for sample {self.sample.uid} {what}")
