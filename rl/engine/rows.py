"""Samples in slots, and the chunks in which their prefixes enter the cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rl.engine.decoder import RowState
from rl.engine.kv_cache import PageTable
from rl.trajectory import Sample, Status


@dataclass(eq=False)
class Row:
    """A sample in a slot."""

    sample: Sample
    ids: list[int]  # prompt and response
    pages: list[int]
    cached: int  # tokens of `ids` whose keys are in the pages, or on their way there
    tail: bytes  # of the turn's text, where a stop string may have begun
    tokens: list[int] = field(default_factory=list)  # generated since it was submitted
    logprobs: list[float] = field(default_factory=list)
    whole_logprobs: list[float] = field(default_factory=list)  # none where nothing is left out of the distribution
    status: Status = "partial"
    returned: bool = False  # done, and the caller has it

    @property
    def generated(self) -> int:
        return self.sample.length + len(self.tokens)

    @property
    def state(self) -> RowState:
        return RowState(self.ids[-1], self.sample.uid, len(self.ids) - 1, self.generated)

    @property
    def to_fill(self) -> int:
        """Tokens of the prefix that are not in the cache; the first decoding step takes the last token."""
        return max(0, len(self.ids) - 1 - self.cached)


@dataclass(frozen=True)
class Chunk:
    """What one forward pass of prefill takes: the next tokens of some rows' prefixes. T tokens, N rows."""

    tokens: list[int]  # T
    positions: list[int]  # T
    places: list[int]  # T; page * page_tokens + place in it
    counts: list[int]  # N; tokens of each row in this pass
    lengths: list[int]  # N; and with those in the cache before
    table_NP: Tensor  # int32; the pages of each row, filled up with page 0


def next_chunk(rows: Iterable[Row], pages: PageTable, room: int) -> Chunk | None:
    """At most `room` tokens, in the order of the rows, which have them `cached` from here on; None if all have all."""
    chunk: list[tuple[Row, int]] = []
    for row in rows:
        count = min(room, row.to_fill)
        if count:
            chunk.append((row, count))
            room -= count
        if not room:
            break
    if not chunk:
        return None
    tokens, positions, places = list[int](), list[int](), list[int]()
    page = pages.page_tokens
    for row, count in chunk:
        span = range(row.cached, row.cached + count)
        tokens += row.ids[row.cached : row.cached + count]
        positions += span
        places += [row.pages[place // page] * page + place % page for place in span]
        row.cached += count
    lengths = [row.cached for row, _ in chunk]
    table_NP = torch.zeros(len(chunk), pages.pages_for(max(lengths)), dtype=torch.int32)
    for index, (row, _) in enumerate(chunk):
        own = row.pages[: table_NP.shape[1]]
        table_NP[index, : len(own)] = torch.tensor(own, dtype=torch.int32)
    return Chunk(tokens, positions, places, [count for _, count in chunk], lengths, table_NP)
