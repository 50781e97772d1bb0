"""The keys and values of the sequences that an engine decodes, in pages, and the attention that writes and reads them.

A page holds the keys and values of some adjacent tokens of a sequence in every layer (Kwon et al., arXiv 2309.06180). So memory
is used for tokens that exist, not for the longest possible sequence, and sequences with the same beginning, the samples of a
group, share its pages. Page 0 belongs to nobody: rows that pad a batch write there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import attend_pages, put_pages
from kernels.ragged import PAGE_TOKENS, Ragged
from kernels.replay import record_dtype
from trainer.config.model import ModelConfig


class PagedCache:
    """Keys and values by layer, page, place in the page, and head; experts by place P, MoE layer L and choice K."""

    def __init__(
        self, config: ModelConfig, pages: int, device: torch.device, dtype: torch.dtype, record_routing: bool = False
    ) -> None:
        self.page_tokens = PAGE_TOKENS[device.type]
        shape = (pages, self.page_tokens, config.num_kv_heads, config.head_dim)
        # Zeros, not uninitialised memory: masked positions get weight 0, and 0 * NaN would still be NaN.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        # The experts of every token lie beside its keys: what is shared, interrupted or filled in again is so with both.
        routed = (pages * self.page_tokens, config.num_moe_layers, config.top_k)
        self.experts_PLK = (
            torch.zeros(routed, device=device, dtype=record_dtype(config.num_experts)) if record_routing else None
        )

    def record(self, places_T: Tensor, experts_LTK: Sequence[Tensor]) -> None:
        """Keeps the experts of tokens at their places, page * page_tokens + place in it, if it was asked to."""
        if self.experts_PLK is not None:
            self.experts_PLK.index_copy_(0, places_T, torch.stack(tuple(experts_LTK), dim=1).to(self.experts_PLK.dtype))


@dataclass(frozen=True)
class PagedAttention:
    """An `Attend` for one row of ragged queries: their keys go to `places_T` first, page * page_tokens + place in it."""

    cache: PagedCache
    spans: Ragged
    places_T: Tensor

    def __call__(self, layer: int, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        q_THd, k_TGd, v_TGd = (x[0].transpose(0, 1) for x in (q_BHSd, k_BGSd, v_BGSd))
        put_pages(k_TGd, v_TGd, self.places_T, keys, values)
        return attend_pages(q_THd, keys, values, self.spans).transpose(0, 1)[None]


class PageTable:
    """Which pages are free, how many sequences hold each, and which tokens the full ones hold."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.total = pages - 1  # page 0 is nobody's
        self._free = list(range(self.total, 0, -1))
        self._holders = [0] * pages
        # A full page is found by the page before it and its tokens: who holds it holds that one too, so its number stays its.
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def shared(self, ids: Sequence[int]) -> list[int]:
        """The pages that hold the beginning of `ids` already, as many as there are. They are not held by asking."""
        pages: list[int] = []
        for end in range(self.page_tokens, len(ids) + 1, self.page_tokens):
            key = (pages[-1] if pages else 0, tuple(ids[end - self.page_tokens : end]))
            if key not in self._known:
                break
            pages.append(self._known[key])
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._holders[page] += 1

    def take(self, count: int) -> list[int]:
        """`count` pages that were free; there must be that many."""
        assert count <= len(self._free), (count, len(self._free))
        pages = [self._free.pop() for _ in range(count)]
        self.hold(pages)
        return pages

    def publish(self, pages: Sequence[int], ids: Sequence[int]) -> None:
        """From now on `shared` finds the pages of `ids` that are full; what fills them must be on its way to the device."""
        before = 0
        for place, page in enumerate(pages[: len(ids) // self.page_tokens]):
            key = (before, tuple(ids[place * self.page_tokens : (place + 1) * self.page_tokens]))
            if key not in self._known:
                self._known[key] = page
                self._key_of[page] = key
            before = page

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
                if page in self._key_of:
                    del self._known[self._key_of.pop(page)]
