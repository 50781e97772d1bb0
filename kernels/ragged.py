"""Sequences of different lengths side by side: which queries are whose, and where their keys lie.

Shape letters: N sequences, P pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.host_device import to_device

CPU_ROWS = 16  # query rows that the reference multiplies at once
PAGE_TOKENS = {"cpu": 16, "cuda": 64}  # of a page of keys; also the block that a query takes at once


@dataclass(frozen=True)
class Ragged:
    """Which queries belong together, and how many keys each sequence has, those of its queries included.

    Queries of a sequence are adjacent, and its last ones: query i of n has position length - n + i. All int32, on the device of
    the queries; the tiles cover every query once, at most `tile_queries` of one sequence each.
    """

    first_N: Tensor  # (N + 1,): queries first[n] .. first[n + 1] - 1 are those of sequence n
    length_N: Tensor  # keys of sequence n
    tile_sequence: Tensor  # (tiles,): the sequence of a tile
    tile_first: Tensor  # (tiles,): its first query, counted from the sequence's first query
    tile_queries: int
    longest: int  # at least the largest length
    table_NP: Tensor | None  # the pages of a sequence in order; None: keys lie where the queries do, none before them


def ragged(
    counts: list[int], lengths: list[int], table_NP: Tensor | None, heads_per_group: int, device: torch.device
) -> Ragged:
    """From the number of queries and of keys of each sequence, known to the host."""
    tile = tile_queries(heads_per_group, device)
    first, sequence_of, first_of = [0], list[int](), list[int]()
    for index, count in enumerate(counts):
        first.append(first[-1] + count)
        sequence_of += [index] * -(-count // tile)
        first_of += range(0, count, tile)
    numbers = [np.array(part, dtype=np.int32) for part in (first, lengths, sequence_of, first_of)]
    first_N, length_N, tile_sequence, tile_first = to_device(numbers, device)
    return Ragged(first_N, length_N, tile_sequence, tile_first, tile, max(lengths, default=0), table_NP)


def tile_queries(heads_per_group: int, device: torch.device) -> int:
    """Queries of a tile: with the heads that share a key they fill the rows of one product."""
    rows = 64 if device.type == "cuda" else CPU_ROWS
    return max(1, rows // heads_per_group)
