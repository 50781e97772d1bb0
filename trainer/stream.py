"""Token arrays and the rows that training reads from them.

`TokenStream` cuts rows out of an endless shuffled sequence of documents. A row depends only on the seed and its index, so the
position of a run in its data is one integer, and any number of ranks sees the same rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.errors import UserError
from trainer.batch import TrainBatch

KEPT_EPOCHS = 2  # orders of documents held in memory; a batch may span two epochs


@dataclass(frozen=True, eq=False)
class TokenArray:
    """The documents of one side of the split: document i is tokens[offsets[i]:offsets[i + 1]], without special tokens."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]  # read-only, mapped from disk
    offsets: NDArray[np.int64]  # (documents + 1,)
    name: str = "text"  # for messages

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])


@dataclass(frozen=True, eq=False)
class _Epoch:
    """One order of documents and of rows. `ends` are the documents' ends in the concatenation, special tokens counted."""

    order: NDArray[np.int64]
    ends: NDArray[np.int64]
    rows: NDArray[np.int64]  # the i-th row of the epoch is cut at rows[i] * sequence_length


@dataclass(frozen=True, eq=False)
class TokenStream:
    """An endless sequence of training rows; a pure function of (seed, row index).

    Epoch e has its own permutation of the documents. Every document becomes <bos> tokens <eos>; the concatenation is cut into
    rows of S inputs, and a row's last target is the first input of the next cut. Rows come in an order of their own, so that a
    long document does not fill whole batches. The tail that fills no row is left out until the next epoch. Raises UserError if
    one epoch has less than one row.
    """

    array: TokenArray
    sequence_length: int  # S
    seed: int
    bos: int
    eos: int
    _epochs: dict[int, _Epoch] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_rows_per_epoch < 1:
            available = self.tokens_per_epoch
            raise UserError(
                f"the {self.array.name} side has {available:,} tokens with <bos> and <eos>, but one row of sequence_length="
                f"{self.sequence_length:,} needs {self.sequence_length + 1:,}; lower sequence_length to at most "
                f"{available - 1:,} or prepare more text (data.paths, data.max_mib, data.validation_share)"
            )

    @functools.cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.diff(self.array.offsets) + 2  # <bos> and <eos>

    @property
    def tokens_per_epoch(self) -> int:
        return self.array.num_tokens + 2 * self.array.num_documents

    @property
    def num_rows_per_epoch(self) -> int:
        return (self.tokens_per_epoch - 1) // self.sequence_length

    def rows(self, first: int, count: int) -> TrainBatch:
        """Rows first..first+count-1 of the endless sequence, on the CPU: (count, S) each.

        documents_BS counts from 0 in every row. Weights are 1, and 0 where the target is the <bos> of another document.
        """
        assert first >= 0 and count > 0, f"rows({first}, {count})"
        parts: list[tuple[NDArray[np.int64], ...]] = []
        while count:
            epoch, row = divmod(first, self.num_rows_per_epoch)
            taken = min(count, self.num_rows_per_epoch - row)
            parts.append(self._cut(epoch, row, taken))
            first, count = first + taken, count - taken
        tokens, targets, documents_BS, weights = (
            torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)
        )
        return TrainBatch(tokens, targets, documents_BS.to(torch.int32), weights.to(torch.float32))

    def _cut(self, number: int, row: int, count: int) -> tuple[NDArray[np.int64], ...]:
        """(tokens, targets, documents, weights) of rows within one epoch, all int64 (count, S)."""
        epoch = self._epoch(number)
        starts = epoch.rows[row : row + count, None] * self.sequence_length
        positions = starts + np.arange(self.sequence_length + 1)  # (count, S + 1)
        nth = np.searchsorted(epoch.ends, positions, side="right")  # which document of this epoch holds a position
        document = epoch.order[nth]
        place = positions - epoch.ends[nth] + self._lengths[document]  # within <bos> tokens <eos>
        ids = np.where(place == 0, self.bos, self.eos)
        inside = (place > 0) & (place < self._lengths[document] - 1)
        ids[inside] = self.array.tokens[self.array.offsets[document[inside]] + place[inside] - 1]
        same_document = (nth[:, :-1] == nth[:, 1:]).astype(np.int64)
        return ids[:, :-1], ids[:, 1:], nth[:, :-1] - nth[:, :1], same_document

    def _epoch(self, number: int) -> _Epoch:
        """The order of an epoch; the last ones asked for are kept."""
        if number not in self._epochs:
            if len(self._epochs) == KEPT_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
            # Raw Philox numbers never change between NumPy versions, which `Generator.permutation` does not promise.
            raw = np.random.Philox(np.random.SeedSequence([self.seed, number])).random_raw
            order = np.argsort(raw(self.array.num_documents), kind="stable")
            rows = np.argsort(raw(self.num_rows_per_epoch), kind="stable")
            self._epochs[number] = _Epoch(order, np.cumsum(self._lengths[order]), rows)
        return self._epochs[number]
