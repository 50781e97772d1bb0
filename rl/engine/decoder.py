"""The device's side of decoding: one token for every row, by a CUDA graph on a GPU.

A step of a small model is hundreds of short launches, so on a GPU its time is that of launching them, unless a graph replays
them all at once. Therefore everything that a step reads and writes has a fixed address, and rows are padded to one of a few
sizes. Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.host_device import pinned
from kernels.limits import takes_kernels
from kernels.linear import product
from kernels.race import race
from kernels.ragged import Ragged, tile_queries
from kernels.vocab_loss import token_logprobs
from rl.engine.kv_cache import PagedAttention, PagedCache
from rl.engine.sampler import Drawn, Sampling, sample
from trainer.model.transformer import LanguageModel


@dataclass(frozen=True)
class RowState:
    """Where a sequence stands: its last token is not in the cache yet, `length` tokens are."""

    last_token: int
    uid: int
    length: int
    generated: int  # response tokens so far


class Step:
    """What a step sampled, perhaps still on its way from the device."""

    def __init__(self, drawn: Drawn) -> None:
        self._ready, self._drawn = None, drawn
        if drawn.tokens_B.is_cuda:
            self._drawn = drawn.map(
                lambda x_B: torch.empty(x_B.shape, dtype=x_B.dtype, pin_memory=True).copy_(x_B, non_blocking=True)
            )
            self._ready = torch.cuda.Event()
            self._ready.record()

    def result(self) -> tuple[list[int], list[float], list[float] | None]:
        """What `Drawn` has, of the rows, waiting for it if need be."""
        if self._ready is not None:
            self._ready.synchronize()
        tokens_B, logprobs_B, whole_B = self._drawn
        return tokens_B.tolist(), logprobs_B.tolist(), None if whole_B is None else whole_B.tolist()


class Decoder:
    """Decodes up to `slots` rows together."""

    def __init__(self, model: LanguageModel, cache: PagedCache, sampling: Sampling, slots: int, max_pages: int) -> None:
        self._model, self._cache, self._sampling = model, cache, sampling
        self._device = model.bias_LE.device
        self._state = torch.zeros(4, slots, dtype=torch.int64, device=self._device)  # the fields of RowState
        self._host_table = torch.zeros(slots, max_pages, dtype=torch.int32)
        self._table = self._host_table.to(self._device, copy=True)
        logprobs_B = torch.zeros(slots, dtype=torch.float32, device=self._device)
        whole_B = None if sampling.whole else logprobs_B.clone()
        self._drawn = Drawn(torch.zeros(slots, dtype=torch.int64, device=self._device), logprobs_B, whole_B)
        self._slots, self._max_pages = slots, max_pages
        # The references, which float32 takes, ask the device how many rows each expert has; a graph cannot.
        self._replays = takes_kernels(model.experts.gate_up_LECD)
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._longest = 0

    def set_rows(self, rows: Sequence[RowState], pages: Sequence[Sequence[int]]) -> None:
        """The rows of the next steps; what pads them has length 0 and writes to page 0."""
        values = torch.zeros(4, self._slots, dtype=torch.int64)
        if rows:
            values[:, : len(rows)] = torch.tensor([[r.last_token, r.uid, r.length, r.generated] for r in rows]).T
        self._state.copy_(pinned(values, self._device), non_blocking=True)
        self._longest = max((row.length for row in rows), default=0)
        self._host_table.zero_()
        for row, own in enumerate(pages):
            self.set_pages(row, own)
        self.send_pages()

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """The pages of a row, in order; `send_pages` brings those of all rows to the device."""
        self._host_table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def send_pages(self) -> None:
        self._table.copy_(pinned(self._host_table, self._device), non_blocking=True)

    def step(self, count: int) -> Step:
        """Decodes a token of the first `count` rows."""
        size = min(padded(count), self._slots) if self._replays else count
        if not self._replays or size not in self._graphs:
            self._decode(size)  # the first time of a size also compiles its kernels, which a graph cannot do
            self._graphs[size] = None
        else:
            graph = self._graphs[size]
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._decode(size)
                self._graphs[size] = graph
            graph.replay()
        self._longest += 1
        return Step(self._drawn.map(lambda x_B: x_B[:count].clone()))

    def _decode(self, count: int) -> None:
        last_B, uids_B, lengths_B, generated_B = self._state[:, :count]
        table, page = self._table[:count], self._cache.page_tokens
        # A row that is done may run on for a step or two, beyond its pages: what it writes and samples there nobody reads.
        page_B1 = (lengths_B // page).clamp(max=self._max_pages - 1)[:, None]
        places_B = table.gather(1, page_B1).squeeze(1) * page + lengths_B % page
        rows_B = torch.arange(count + 1, dtype=torch.int32, device=self._device)
        config = self._model.config
        spans = Ragged(
            first_N=rows_B,
            length_N=(lengths_B + 1).clamp(max=self._max_pages * page).int(),
            tile_sequence=rows_B[:-1],
            tile_first=torch.zeros_like(rows_B[:-1]),
            tile_queries=tile_queries(config.num_heads // config.num_kv_heads, self._device),
            longest=self._longest + 1,
            table_NP=table,
        )
        places_B = places_B.long()
        output = self._model.forward(
            last_B[None],
            lengths_B[None],
            torch.ones(1, count, dtype=torch.bool, device=self._device),
            PagedAttention(self._cache, spans, places_B),
        )
        if self._cache.experts_PLK is not None:
            # What stands beyond the last page goes to page 0: a row that is done still has its record to give.
            self._cache.record(places_B.where(lengths_B < self._max_pages * page, 0), output.experts_LTK)
        drawn = self._sample(output.hidden_BSD[0], uids_B, generated_B)
        for place_B, x_B in zip(self._drawn, drawn, strict=True):
            if place_B is not None and x_B is not None:
                place_B[:count] = x_B
        last_B.copy_(drawn.tokens_B)
        lengths_B += 1
        generated_B += 1

    def _sample(self, hidden_BD: Tensor, uids_B: Tensor, generated_B: Tensor) -> Drawn:
        head_VD, sampling = self._model.dense.head_VD, self._sampling
        logits_BV = product(hidden_BD, head_VD, torch.float32)
        if not hidden_BD.is_cuda:
            return sample(logits_BV, uids_B, generated_B, sampling)
        # What the trainer says too is by its kernel, whose sum over the vocabulary has an order of its own.
        if sampling.whole:
            tokens_B = race(logits_BV, uids_B, generated_B, sampling.seed, sampling.temperature)
            return Drawn(tokens_B, token_logprobs(hidden_BD, head_VD, tokens_B, temperature=sampling.temperature)[0], None)
        drawn = sample(logits_BV, uids_B, generated_B, sampling)
        whole_B, _ = token_logprobs(hidden_BD, head_VD, drawn.tokens_B, temperature=sampling.temperature)
        return drawn._replace(whole_logprobs_B=whole_B)


def padded(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..: at most a third of the rows is padding, and there are few graphs."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power
