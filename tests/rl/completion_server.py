"""A completion server on loopback in the protocol of vLLM and SGLang; our engine is behind it, and it can misbehave."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from aiohttp import web

from rl.april import complete
from rl.engine.engine import Engine
from rl.engine.sampler import Sampling, kept
from rl.engine.settings import EngineSettings
from rl.trajectory import Sample
from trainer.model.attention import BatchInvariantAttention, positions_of
from trainer.model.hf import load_pretrained
from trainer.model.transformer import LanguageModel, Transformer

DROP = object()  # in place of an event: the connection breaks
HOLD = object()  # the server waits until it is let go on
Events = list[Any]  # dict: an event's JSON; bytes: as they are; DROP, HOLD
Mutate = Callable[[int, Events], Events]  # (number of the request, its events) -> what is sent instead


class CompletionServer:
    """`with CompletionServer(...) as server: server.url`. `raw`: log-probabilities are the model's, before temperature."""

    def __init__(self, model: LanguageModel, eos_id: int, *, mutate: Mutate = lambda number, events: events, raw: bool = False):
        self.model, self.eos_id, self.mutate, self.raw = batch_invariant(model), eos_id, mutate, raw
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = self.aborted = 0
        self.loaded: list[Path] = []
        self.headers: list[dict[str, str]] = []
        self.held = threading.Event()  # a request waits
        self.status = 200
        self.retry_after: str | None = None  # beside a status that is not 200
        self.busy = 0  # as often other requests than those for completions are refused
        self.asked: list[float] = []  # when completions were

    def __enter__(self) -> CompletionServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def go_on(self) -> None:
        self._loop.call_soon_threadsafe(self._free.set)

    async def _open(self) -> None:
        self._free = asyncio.Event()
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/update_weights_from_disk", self._load)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.root = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self.url = f"{self.root}/v1"

    async def _models(self, request: web.Request) -> web.Response:
        self.headers.append(dict(request.headers))
        if self._refuses():
            return web.json_response({}, status=503)
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def _refuses(self) -> bool:
        self.busy -= 1
        return self.busy >= 0

    async def _load(self, request: web.Request) -> web.Response:
        folder = Path((await request.json())["model_path"])
        if self._refuses():
            return web.json_response({}, status=429, headers={"Retry-After": "0.1"})
        if not folder.is_dir():
            return web.json_response({"success": False, "message": f"there is no {folder}"})
        self.model = batch_invariant(load_pretrained(folder, torch.float32))
        self.loaded.append(folder)
        return web.json_response({"success": True, "message": "loaded"})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.asked.append(time.monotonic())
        if self.status != 200:
            headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
            return web.json_response({"error": {"message": "there is something wrong"}}, status=self.status, headers=headers)
        if not body["stream"]:
            return web.json_response({"choices": [self._likeliest(body)]})
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._stream(request, self.mutate(number, events_of(self._generate(body), body)))
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, events: Events) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            if event is DROP:
                assert request.transport is not None
                request.transport.close()
                return response
            if event is HOLD:
                self.held.set()
                await self._free.wait()
                continue
            await response.write(event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0)
        await response.write(b"data: [DONE]\n\n")
        return response

    def _generate(self, body: dict[str, Any]) -> Sample:
        top_k = None if body["top_k"] == -1 else body["top_k"]
        sampling = Sampling(body["temperature"], 0, top_k, body["top_p"], body["min_p"])
        length = len(body["prompt"]) + body["max_tokens"]
        engine = Engine(
            self.model.config,
            EngineSettings(1, length, body["max_tokens"], None, sampling, self.eos_id, frozenset(body["stop_token_ids"])),
            torch.device("cpu"),
            torch.float32,
        )
        engine.load_weights(self.model.state(), 0)
        return complete(engine, [Sample(body["seed"], 0, tuple(body["prompt"]))], 100)[0]

    @torch.no_grad()
    def _likeliest(self, body: dict[str, Any]) -> dict[str, Any]:
        """The first token's choice of a reply that is not a stream, with the likeliest in `top_logprobs`."""
        tokens = torch.tensor([body["prompt"]])
        documents = torch.zeros(tokens.shape, dtype=torch.int32)
        attend = BatchInvariantAttention(documents, self.model.config, documents.device)
        logits = self.model.logits(tokens, positions_of(documents), documents >= 0, attend)[:, -1]
        sampling = Sampling(
            body["temperature"], 0, None if body["top_k"] == -1 else body["top_k"], body["top_p"], body["min_p"]
        )
        shown = logits if self.raw else kept(logits / sampling.temperature, sampling)
        top = shown.log_softmax(-1)[0].topk(min(body["logprobs"], int(shown.isfinite().sum())))
        token, best = int(top.indices[0]), float(top.values[0])
        listed = {str(index): value for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
        logprobs = {"token_logprobs": [best], "tokens": ["x"], "top_logprobs": [listed], "text_offset": [0]}
        return {"index": 0, "text": "x", "token_ids": [token], "logprobs": logprobs, "finish_reason": "length"}


def batch_invariant(model: LanguageModel) -> LanguageModel:
    """The same model whose products are those of an engine."""
    dense = Transformer(model.config, batch_invariant=True)
    dense.load_state_dict(model.dense.state_dict())
    return LanguageModel(model.config, dense, model.experts, model.bias_LE)


def events_of(sample: Sample, body: dict[str, Any]) -> Events:
    """One event a token, the last one with the reason, then one of usage."""
    reason = "stop" if sample.status == "finished" else "length"
    events: Events = []
    for token, logprob in zip(sample.response_ids, sample.logprobs, strict=True):
        logprobs = {"tokens": ["x"], "token_logprobs": [logprob], "top_logprobs": [{"x": logprob}], "text_offset": [0]}
        choice = {"index": 0, "text": "x", "token_ids": [token], "logprobs": logprobs, "finish_reason": None}
        events.append({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny", "choices": [choice]})
    events[0]["choices"][0]["prompt_token_ids"] = body["prompt"]
    events[-1]["choices"][0]["finish_reason"] = reason
    return [*events, {"id": "cmpl-1", "choices": [], "usage": {"completion_tokens": sample.length}}]
