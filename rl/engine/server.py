"""An `EnginePool` that generates with a completion server, vLLM or SGLang, instead of our engines.

Such a server computes with other kernels, so its log-probabilities are not the trainer's; the off-policy mode must correct for
that. It decodes on its own: `advance` waits until a sample is done, however many tokens that takes, so rounds depend on timing.

The server gets new weights as a folder in the Hugging Face layout that both machines see, and a request to load it. Without an
endpoint for that it keeps the weights that it was started with; its tokens then have version UNKNOWN, older than all others.
"""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

from kernels.errors import UserError
from rl.engine.completions import BadReply, BrokenOff, Completion, may_pass, parse, retry_after
from rl.engine.settings import EngineSettings
from rl.trajectory import Sample
from trainer.cluster import Processes
from trainer.config.rl import RolloutConfig, SyncConfig
from trainer.json_text import parsed
from trainer.tokenizer import Tokenizer

UNKNOWN = -1  # the version of weights that were not sent by this run
LINE_BYTES = 1 << 24  # an event may hold a long prompt's token ids
LONGEST_PAUSE_S = 10.0
CERTAIN = -0.05  # a log-probability above it leaves too little to others
KEY_VARIABLE = "TESSERA_SERVER_KEY"
T = TypeVar("T")


class ServerPool:
    """Requests on their way in a thread of their own. `folder` is where weights for the server are written."""

    def __init__(
        self, config: RolloutConfig, settings: EngineSettings, vocab_size: int, folder: Path, tokenizer: Tokenizer
    ) -> None:
        assert config.server is not None
        self._url, self._config, self._settings, self._vocab_size = config.server, config, settings, vocab_size
        self._folder, self._tokenizer = folder, tokenizer
        self._version = UNKNOWN
        self.busy_s = 0.0
        self._works: dict[int, Completion] = {}
        self._tasks: list[asyncio.Task[Completion]] = []
        self._ended: queue.Queue[asyncio.Task[Completion]] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="completion server", daemon=True)

    def __enter__(self) -> ServerPool:
        self._thread.start()
        try:
            self._model = self._wait(self._open())
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ------------------------------------------------------------ what a round calls

    def submit(self, samples: Sequence[Sample]) -> None:
        self._settings.check(samples)
        works = [Completion(sample, self._settings, self._vocab_size) for sample in samples]
        assert not self._works.keys() & {sample.uid for sample in samples}, "a sample is under way already"
        self._works |= {work.sample.uid: work for work in works}
        self._wait(self._start(works))

    def advance(self, tokens: int) -> list[Sample]:
        """Waits until a sample is done; returns all that are. `tokens` bounds nothing here."""
        if not self._works:
            return []
        started = time.perf_counter()
        ended = [self._ended.get()]
        self.busy_s += time.perf_counter() - started
        while not self._ended.empty():
            ended.append(self._ended.get())
        return [self._works.pop(task.result().sample.uid).result(self._version) for task in ended]

    @contextmanager
    def going_on(self, tokens: int, samples: int) -> Iterator[list[Sample]]:
        """The requests are on their way by themselves; what ends is there at the next `advance` or `drain`."""
        started = time.perf_counter()
        yield []
        self.busy_s += time.perf_counter() - started

    def learning(self) -> AbstractContextManager[None]:
        return nullcontext()  # the server reads weights from files

    def drain(self) -> list[Sample]:
        """Closes all requests, so that the server stops; some samples may have ended since the last `advance`."""
        self._wait(self._stop())
        while not self._ended.empty():
            self._ended.get().result()  # an error is one also now
        works = list(self._works.values())
        self._works.clear()
        for work in works:
            work.settle()
        return [work.result(self._version) for work in works]

    def load_weights(self, ranks: Processes, version: int, config: SyncConfig) -> dict[str, float]:
        """Writes the ranks' weights and has the server load them, if it can; the engines must be empty."""
        assert not self._works, "the server still generates"
        if self._config.server_reload is not None:
            folder = self._folder / f"version_{version:06}"
            ranks.call("export", folder, self._tokenizer)
            self._wait(self._reload(folder))
            self._version = version
            for earlier in set(self._folder.iterdir()) - {folder}:
                shutil.rmtree(earlier)
        return {"sync/version": self._version}

    @property
    def engines(self) -> Sequence[int]:
        return ()  # of ours

    @property
    def places(self) -> int:
        return 0

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Nobody: what a server is made of is its own."""
        return []

    def counts(self) -> dict[str, float]:
        """Nothing: a server that is lost ends the run."""
        return {}

    def require_exact_distribution(self, prompts: Sequence[Sequence[int]]) -> None:
        """Asks for one token in ways that tell whether log-probabilities are those of the distribution that is sampled from.

        Servers may report them as the model gives them, before temperature, top-k, top-p and min-p. Where those are used, that
        would be another distribution, and no later number would show it. It takes one of `prompts` whose next token is open.
        """
        sampling = self._settings.sampling
        if sampling.whole and sampling.temperature == 1:
            return
        found = ((prompt, self._top_logprobs(prompt)) for prompt in prompts)
        prompt, plain = next(((prompt, top) for prompt, top in found if top[0] < CERTAIN), (None, None))
        if prompt is None or plain is None:
            raise UserError(
                f"{self._url} is so sure of the next token after {len(prompts)} prompts that its log-probabilities do not tell "
                "whether they know of temperature, top-k, top-p and min-p; set them to 1.0, null, 1.0 and 0.0"
            )
        one_left: dict[str, float] = {"top_k": 1} if sampling.top_k is not None else {}
        one_left |= {"top_p": 1e-6} if sampling.top_p < 1 else {}
        one_left |= {"min_p": 1.0} if sampling.min_p > 0 else {}
        for option, value in one_left.items():  # each leaves one token, of probability 1
            if self._top_logprobs(prompt, **{option: value})[0] < -1e-3:
                raise _raw_logprobs(f"rollout.{option}", self._url)
        if sampling.temperature != 1:  # a quarter of it makes differences four times as large
            sharp = self._top_logprobs(prompt, temperature=0.25)
            if sharp[0] - sharp[-1] < 2 * (plain[0] - plain[-1]):
                raise _raw_logprobs("rollout.temperature", self._url)

    def _top_logprobs(self, prompt_ids: Sequence[int], **options: float) -> list[float]:
        """The highest log-probabilities of the next token, highest first, without what shapes them, or with `options`."""
        plain = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "max_tokens": 1, "logprobs": 5, "stream": False}
        sample = Sample(0, 0, tuple(prompt_ids))
        request = Completion(sample, self._settings, self._vocab_size).request(self._model)
        return self._wait(self._ask_once({**request, **plain, **options}))

    # ------------------------------------------------------------ in the thread of the requests

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> str:
        """Connects; returns the name of the model that the server serves."""
        key = os.environ.get(KEY_VARIABLE)
        self._slots = asyncio.Semaphore(self._settings.slots)
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(
                total=None, connect=self._config.server_timeout_s, sock_read=self._config.server_timeout_s
            ),
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=LINE_BYTES,
        )
        reply = await self._json("GET", f"{self._url}/models", None)
        try:
            return str(reply["data"][0]["id"])
        except (LookupError, TypeError):
            raise BadReply(f"{self._url}/models names no model: {str(reply)[:200]}") from None

    async def _close(self) -> None:
        await self._stop()
        await self._session.close()

    async def _start(self, works: Sequence[Completion]) -> None:
        for work in works:
            task = self._loop.create_task(self._generate(work))
            task.add_done_callback(lambda ended: None if ended.cancelled() else self._ended.put(ended))
            self._tasks.append(task)

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks.clear()

    async def _generate(self, work: Completion) -> Completion:
        """A sample to its end. An answer that breaks off is continued from the tokens that came."""
        failures = 0
        async with self._slots:
            work.settle()
            while work.status == "partial":
                before = len(work.tokens)
                reason, asked_s = await self._request(work)
                work.settle()
                failures = 0 if len(work.tokens) > before else failures + 1
                if failures and work.status == "partial":
                    await self._pause(f"sample {work.sample.uid}", failures, reason, asked_s)
        return work

    async def _pause(self, what: str, failures: int, reason: str, asked_s: float) -> None:
        """Before the next try: as long as the server asks, and longer each time. UserError after too many, and for too long."""
        if failures > self._config.server_retries:
            raise UserError(
                f"the completion server {self._url} makes no progress with {what} in {failures} tries: {reason}. Look at its "
                "log, start it again, and this run with resume=auto"
            )
        if asked_s > self._config.server_timeout_s:
            raise UserError(
                f"the completion server {self._url} wants to be asked again in {asked_s:.0f} s, which is more than "
                f"rollout.server_timeout_s={self._config.server_timeout_s:g}: {reason}. Raise that, or go on later with "
                "resume=auto"
            )
        await asyncio.sleep(max(asked_s, min(0.25 * 2**failures, LONGEST_PAUSE_S)))

    async def _request(self, work: Completion) -> tuple[str, float]:
        """One request; returns why it broke off, where it did, and for how many seconds the server asks to be left alone.
        Raises BadReply for an answer that must not be."""
        try:
            async with self._session.post(f"{self._url}/completions", json=work.request(self._model)) as response:
                if response.status != 200:
                    refusal = await _read(response)
                    return refusal.reason, refusal.asked_s
                async for data in _events(response):
                    work.take(data)
                    if work.stopped:
                        break  # closes the connection, at which the server stops
        except BrokenOff as error:
            return str(error), 0.0
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return f"{type(error).__name__} {error}".strip(), 0.0
        return "the answer stopped before the sample ended", 0.0

    async def _ask_once(self, body: dict[str, Any]) -> list[float]:
        data = await self._ask("POST", f"{self._url}/completions", body)
        choices = parse(data).choices
        found = choices[0].logprobs if choices else None
        if found is None or not found.top_logprobs or not found.top_logprobs[0]:
            raise BadReply(f"{self._url}/completions gives no top_logprobs for logprobs=5: {data[:200]!r}")
        return sorted(found.top_logprobs[0].values(), reverse=True)

    async def _reload(self, folder: Path) -> None:
        assert self._config.server_reload is not None
        reply = await self._json("POST", self._config.server_reload, {"model_path": str(folder)})
        if isinstance(reply, dict) and reply.get("success") is False:
            raise UserError(f"{self._config.server_reload} did not load {folder}: {str(reply)[:500]}")

    async def _json(self, method: str, url: str, body: dict[str, Any] | None) -> Any:
        text = (await self._ask(method, url, body)).decode(errors="replace")
        try:
            return parsed(text) if text.strip() else None
        except ValueError as error:
            raise BadReply(f"{url} does not answer with JSON ({error}): {text[:200]}") from None

    async def _ask(self, method: str, url: str, body: dict[str, Any] | None) -> bytes:
        """The body of the answer, asked for again while the server is too busy."""
        failures = 0
        while True:
            try:
                async with self._session.request(method, url, json=body) as response:
                    answer = await _read(response)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise UserError(
                    f"no completion server answers at {url} ({type(error).__name__} {error}). Start one, correct the URL, or "
                    "generate with our engines: rollout.server=null"
                ) from None
            if answer.status == 200:
                return answer.body
            failures += 1
            await self._pause(f"{method} {url}", failures, answer.reason, answer.asked_s)


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    asked_s: float  # for which the server asks to be left alone

    @property
    def reason(self) -> str:
        return f"status {self.status}: {self.body[:200].decode(errors='replace')}"


async def _read(response: aiohttp.ClientResponse) -> Answer:
    """Raises BadReply for a status that another request would get, too."""
    status, body = response.status, await _whole(response)
    if status != 200 and not may_pass(status):
        raise BadReply(f"{response.url} answers {status}: {body[:500].decode(errors='replace')}")
    return Answer(status, body, retry_after(response.headers.get("Retry-After"), datetime.now(UTC)))


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer. Raises BadReply where it is longer than any should be."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > LINE_BYTES:
            raise BadReply(f"{response.url} sends more than {LINE_BYTES} bytes: {bytes(body[:200])!r}")
    return bytes(body)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of a stream of server-sent events, each in one line, as these servers write them."""
    while True:
        try:
            line = await response.content.readline()
        except ValueError as error:
            raise BadReply(f"{response.url} sends a line of more than {LINE_BYTES} bytes: {error}") from None
        if line.startswith(b"data:") and line.endswith(b"\n"):  # else it broke off in the middle
            data = line[5:].strip()
            if data != b"[DONE]":
                yield data
        elif not line:
            return
        elif not line.startswith((b"data:", b":", b"event:", b"id:", b"retry:", b"\n", b"\r\n")):
            raise BadReply(f"{response.url} does not answer with a stream of events: {line[:200]!r}")


def _raw_logprobs(option: str, url: str) -> UserError:
    return UserError(
        f"{url} reports log-probabilities that do not know of {option}, so they are not of the distribution sampled from. "
        f"Start vLLM with --logprobs-mode processed_logprobs, or leave {option} at the value that changes nothing"
    )
