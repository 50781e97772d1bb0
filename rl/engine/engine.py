"""A generation engine: continuous batching over a paged cache, tokens in and tokens out.

Samples wait in a queue and take a slot when one is free. Their prefix, which is the prompt and what was generated before an
interruption, enters the cache in chunks (prefill), except for what pages of other samples hold already. Then every step decodes
one token of all rows together. When the pages run out, the youngest rows go back to the queue.

The forward pass is the trainer's, batch-invariant, so log-probabilities equal the trainer's bit for bit, whatever else was in
the batch and however often a sample was interrupted. They are float32 and those of the distribution sampled from; if top-k,
top-p or min-p exclude tokens, those of the whole distribution, the trainer's, are kept too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from kernels.errors import UserError
from kernels.host_device import pinned
from kernels.ragged import PAGE_TOKENS, ragged
from rl.engine.decoder import Decoder, Step
from rl.engine.kv_cache import PagedAttention, PagedCache, PageTable
from rl.engine.metrics import EngineState
from rl.engine.receipt import Receipt
from rl.engine.rows import Row, next_chunk
from rl.engine.settings import EngineSettings, check_generates
from rl.routed_experts import RoutedExperts
from rl.trajectory import Sample, Segment, Status
from trainer.config.model import ModelConfig
from trainer.model.transformer import LanguageModel
from trainer.weight_delta import WeightDelta, apply
from trainer.weight_links import Offer, Receiver, span_digests
from trainer.weight_sync import WeightUpdate
from trainer.weights import digests, unpack

PREFILL_TOKENS = 8192  # of one forward pass
IDLE_SHARE = 16  # one slot in this many may hold a row that is done, so that the rows change seldom


class Engine:
    """Generates for samples under one set of weights at a time. Not thread-safe."""

    def __init__(self, config: ModelConfig, settings: EngineSettings, device: torch.device, dtype: torch.dtype) -> None:
        check_generates(config)
        if settings.max_length > config.max_positions:
            raise UserError(
                f"the engine is asked for sequences of {settings.max_length} tokens, but model.max_positions is "
                f"{config.max_positions}; lower loop.sequence_length"
            )
        page = PAGE_TOKENS[device.type]
        max_pages = -(-settings.max_length // page)
        tokens = settings.cache_tokens or settings.slots * max_pages * page
        if tokens < settings.max_length:
            raise UserError(
                f"rollout.cache_tokens = {tokens} cannot hold one sequence of loop.sequence_length = {settings.max_length} "
                f"tokens; raise it to at least that"
            )
        self._settings, self._device = settings, device
        self._model = LanguageModel.unset(config, device, dtype, batch_invariant=True)
        self._weights = self._model.state()  # these very tensors for good: graphs read them, and receivers know them again
        pages = 1 + -(-tokens // page)
        self._cache = PagedCache(config, pages, device, dtype, settings.record_routing)
        self._pages = PageTable(pages, page)
        self._decoder = Decoder(self._model, self._cache, settings.sampling, settings.slots, max_pages)
        self._waiting: deque[Sample] = deque()
        self._filling: deque[Row] = deque()  # their prefix is not in the cache yet
        self._rows: list[Row] = []  # what the decoder decodes, in its order; some may be done
        # A GPU is given the next step before the last one is looked at, so it does not wait for the host.
        self._ahead = device.type == "cuda"
        self._running: Step | None = None  # of exactly these rows, not looked at yet
        self._done: list[Sample] = []  # not returned yet
        self._version: int | None = None
        self._generated = self._finished = self._interrupted = 0  # tokens, samples, samples

    # ------------------------------------------------------------ what a pool calls

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Copies the tensors of `LanguageModel.state()` in, whatever their dtype and device.

        Samples on their way go on under the new weights: what they have is a segment of the old ones, and its keys are
        computed again, so that their log-probabilities stay exact.
        """
        with self._between_versions(version):
            self._model.load_state(state)

    @contextmanager
    def _between_versions(self, version: int) -> Iterator[None]:
        samples = self._stop()
        yield
        self._version = version
        self._waiting.extend(samples)

    def receive(self, update: WeightUpdate) -> Receipt:
        """Takes new weights as `load_weights` does, whole or changed from the version it has.

        Raises RuntimeError when it has another version, and when the update comes with a hash and the weights that the engine
        then holds have another one.
        """
        if isinstance(update.weights, WeightDelta):
            if update.weights.base != self._version:
                raise RuntimeError(f"changes from version {update.weights.base}, but this engine has {self._version}")
            with self._between_versions(update.version):
                apply(update.weights, self._weights)
        else:
            self.load_weights(unpack(update.weights), update.version)
        share = update.weights.changed_share if isinstance(update.weights, WeightDelta) else None
        started = time.perf_counter()
        if update.digests is None:
            return Receipt(update.nbytes, share, None)
        self._check(update.version, update.digests, digests(self._weights))
        return Receipt(update.nbytes, share, update.hashing_s + time.perf_counter() - started)

    def take(self, offers: Sequence[Offer], receiver: Receiver) -> Receipt:
        """Takes what all ranks offer, which together is all weights, as `receive` does."""
        version, state = offers[0].version, self._weights
        with self._between_versions(version):
            receiver.take(offers, state)
        nbytes, started = sum(offer.nbytes for offer in offers), time.perf_counter()
        if offers[0].digests is None:
            return Receipt(nbytes, None, None)
        expected = {name: digest for offer in offers for name, digest in (offer.digests or {}).items()}
        self._check(version, expected, span_digests([(span, span.of(state)) for offer in offers for span in offer.spans]))
        hashing_s = max(offer.hashing_s for offer in offers)
        return Receipt(nbytes, None, hashing_s + time.perf_counter() - started)

    def _check(self, version: int, expected: Mapping[str, str], own: Mapping[str, str]) -> None:
        if wrong := [name for name, digest in expected.items() if own[name] != digest]:
            raise RuntimeError(
                f"weights of version {version} arrived wrong: {len(wrong)} of {len(own)} tensors differ from the "
                f"trainer's, {', '.join(wrong[:4])} among them. Nothing may be sampled from them; check the memory of this "
                "machine and the network, and start again with resume=auto"
            )

    def submit(self, samples: Sequence[Sample]) -> None:
        """Queues pending and partial samples. Raises UserError when one may grow beyond `max_length`."""
        self._settings.check(samples)
        self._waiting.extend(samples)

    @torch.inference_mode()
    def advance(self, tokens: int) -> list[Sample]:
        """Decodes up to `tokens` tokens for every active row; freed slots are refilled on the way. Returns the samples done.

        A GPU is left at the last step, which is looked at next time: what the caller does in between costs it nothing.
        """
        assert self._version is not None, "no weights are loaded"
        for _ in range(tokens):
            self._admit()
            self._prefill()
            if self._should_change_rows():
                self._change_rows()
            self._grow()
            if self._rows:
                self._look(then=self._step())
            elif not self._filling:
                break
        if not self._decoding:
            self._look(then=None)
        if self._running is None:
            self._remove_done()
        for row in self._rows:
            self._return(row)
        done, self._done = self._done, []
        self._finished += len(done)
        return done

    def _step(self) -> Step:
        """A token of every row, under way."""
        return self._decoder.step(len(self._rows))

    def drain(self) -> list[Sample]:
        """Stops, and returns every sample that `advance` has not returned; the slots and the queue are empty then.

        They have the tokens that they got, and those that got their last one in the step that was running are done.
        """
        samples = self._stop()
        done, self._done = self._done, []
        self._finished += len(done)
        self._interrupted += len(samples)
        return done + samples

    def state(self) -> EngineState:
        """What it is doing, for whoever asks, from any thread."""
        return EngineState(
            generated_tokens=self._generated,
            finished_samples=self._finished,
            interrupted_samples=self._interrupted,
            running_samples=self._decoding + len(self._filling),
            waiting_samples=len(self._waiting),
            pages=self._pages.total,
            pages_used=self._pages.total - self._pages.free,
            weight_version=self._version,
        )

    def _stop(self) -> list[Sample]:
        """Those that are not done; those that are, `advance` or `drain` returns."""
        self._look(then=None)
        self._remove_done()
        unfinished = [self._leave(row) for row in (*self._rows, *self._filling)]
        unfinished += self._waiting
        self._rows, self._filling = [], deque()
        self._waiting.clear()
        return unfinished

    # ------------------------------------------------------------ the rows

    @property
    def _decoding(self) -> int:
        """Rows that are not done."""
        return sum(row.status == "partial" for row in self._rows)

    def _should_change_rows(self) -> bool:
        """Whether rows that are done leave and rows whose prefix is in the cache enter; then the device waits for the host."""
        idle = len(self._rows) - self._decoding
        ready = bool(self._filling) and not self._filling[0].to_fill
        return ready or idle > len(self._rows) // IDLE_SHARE

    def _change_rows(self) -> None:
        self._look(then=None)
        self._remove_done()
        while self._filling and not self._filling[0].to_fill:
            self._rows.append(self._filling.popleft())
        self._set_rows()

    def _remove_done(self) -> None:
        """Takes the rows that are done out; nothing may be running."""
        done = [row for row in self._rows if row.status != "partial"]
        for row in done:
            self._return(row)
            self._pages.release(row.pages)
        if done:
            self._rows = [row for row in self._rows if row.status == "partial"]
            self._set_rows()

    def _return(self, row: Row) -> None:
        """Gives the sample of a row that is done to the caller, once. It keeps its slot and pages while a step is running."""
        if row.status != "partial" and not row.returned:
            self._done.append(self._sample(row))
            row.returned = True

    def _set_rows(self) -> None:
        self._decoder.set_rows([row.state for row in self._rows], [row.pages for row in self._rows])

    def _leave(self, row: Row) -> Sample:
        """The sample with what was generated; its pages are free."""
        sample = self._sample(row)
        self._pages.release(row.pages)
        return sample

    def _sample(self, row: Row) -> Sample:
        """The sample with what was generated."""
        if not row.tokens:
            return row.sample
        assert self._version is not None
        segment = Segment(
            tuple(row.tokens),
            tuple(row.logprobs),
            self._version,
            whole_logprobs=tuple(row.whole_logprobs) or None,
            experts=self._recorded(row),
        )
        return row.sample.extended(segment, row.status)

    def _recorded(self, row: Row) -> RoutedExperts | None:
        """The experts of the row's tokens that earlier segments have no record of; its last token has not been computed."""
        if self._cache.experts_PLK is None:
            return None
        page = self._pages.page_tokens
        places = [row.pages[p // page] * page + p % page for p in range(row.sample.recorded, len(row.ids) - 1)]
        return RoutedExperts.of(self._cache.experts_PLK[torch.tensor(places, device=self._device)])

    def _look(self, then: Step | None) -> None:
        """Takes the result of the running step in; `then` is running from now on, if it goes ahead of the host.

        A row that is done decodes a token in vain then.
        """
        looked = (self._running,) if self._ahead else (self._running, then)
        self._running = then if self._ahead else None
        for step in looked:
            if step is None:
                continue
            tokens, logprobs, whole_logprobs = step.result()
            for place, row in enumerate(self._rows):
                if row.status != "partial":
                    continue
                row.ids.append(tokens[place])
                row.tokens.append(tokens[place])
                row.logprobs.append(logprobs[place])
                if whole_logprobs is not None:
                    row.whole_logprobs.append(whole_logprobs[place])
                self._generated += 1
                row.status = self._status(row)

    def _status(self, row: Row) -> Status:
        """What its newest token makes of a row that is not done."""
        if self._settings.ends(row.ids[-1]) or self._completes_stop(row, row.ids[-1]):
            return "finished"
        return "truncated" if row.generated >= self._settings.max_new_tokens else "partial"

    def _completes_stop(self, row: Row, token: int) -> bool:
        stops = self._settings.stops
        if stops is None:
            return False
        row.tail, complete = stops.after(row.tail, token)
        return complete

    # ------------------------------------------------------------ pages

    def _grow(self) -> None:
        """Sees to it that every row has a page for the token it decodes next; the youngest rows make room if none is free."""
        ahead = 2 if self._ahead else 1  # with the step that is running
        needs = [self._missing(row, ahead) for row in self._rows]
        if sum(needs) > self._pages.free:
            self._look(then=None)
            self._remove_done()
            needs = [self._missing(row, 1) for row in self._rows]
            while sum(needs) > self._pages.free:
                if not self._filling:
                    needs.pop()
                youngest = self._filling.pop() if self._filling else self._rows.pop()
                self._waiting.appendleft(self._leave(youngest))
            self._set_rows()
        for index, (row, need) in enumerate(zip(self._rows, needs, strict=True)):
            if need:
                row.pages += self._pages.take(need)
                self._decoder.set_pages(index, row.pages)
        if any(needs):
            self._decoder.send_pages()

    def _missing(self, row: Row, ahead: int) -> int:
        if row.status != "partial":
            return 0
        return max(0, self._pages.pages_for(min(len(row.ids) - 1 + ahead, self._settings.max_length)) - len(row.pages))

    # ------------------------------------------------------------ filling slots

    def _admit(self) -> None:
        """Moves waiting samples into free slots; those that have no token left to generate are done."""
        slots = self._settings.slots
        free = slots - self._decoding - len(self._filling)
        # Prefilling for each freed slot at once would cost a small forward pass a token; a part of the slots may idle.
        if free < min(len(self._waiting), max(1, slots // IDLE_SHARE)):
            return
        while self._waiting and free > 0:
            sample = self._waiting[0]
            if sample.length >= self._settings.max_new_tokens:  # only after a resume with a smaller max_new_tokens
                self._done.append(replace(self._waiting.popleft(), status="truncated"))
                continue
            row = self._row(sample)
            if row is None:
                break
            self._waiting.popleft()
            self._filling.append(row)
            free -= 1

    def _row(self, sample: Sample) -> Row | None:
        """The sample with pages for its prefix and a first token, or None if there are too few; shared ones are only held."""
        ids = [*sample.prompt_ids, *sample.response_ids]
        prefix = ids[:-1]  # the first decoding step takes the last token, and yields what follows it
        shared = self._pages.shared(prefix)
        missing = self._pages.pages_for(len(ids)) - len(shared)
        if missing > self._pages.free:
            return None
        self._pages.hold(shared)
        pages = shared + self._pages.take(missing)
        # First come, first filled: who finds these pages comes later, or in the same pass, which writes before it reads.
        self._pages.publish(pages, prefix)
        stops = self._settings.stops
        tail = b"" if stops is None else stops.tail(sample.turn_so_far)
        return Row(sample, ids, pages, cached=len(shared) * self._pages.page_tokens, tail=tail)

    def _prefill(self) -> None:
        """One chunk: up to PREFILL_TOKENS tokens of the prefixes that are not in the cache, in the order of the queue."""
        chunk = next_chunk(self._filling, self._pages, PREFILL_TOKENS)
        if chunk is None:
            return
        config, device = self._model.config, self._device
        shared = config.num_heads // config.num_kv_heads
        # A step may be running, for which the host does not wait here.
        on_host = torch.tensor([chunk.tokens, chunk.positions, chunk.places]), chunk.table_NP
        inputs, table_NP = (pinned(numbers, device).to(device, non_blocking=True) for numbers in on_host)
        spans = ragged(chunk.counts, chunk.lengths, table_NP, shared, device)
        output = self._model.forward(
            inputs[:1],
            inputs[1:2],
            torch.ones(1, len(chunk.tokens), dtype=torch.bool, device=device),
            PagedAttention(self._cache, spans, inputs[2]),
        )
        self._cache.record(inputs[2], output.experts_LTK)
