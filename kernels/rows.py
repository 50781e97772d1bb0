"""Rows of tokens to the places of their entries, and back: the two copies around a grouped product over sorted rows.

Shape letters: T tokens, K top-k, N entries that are present of T * K, D model, P partial sums. Entries and places are those of
kernels/expert_order.py: T * K places, of which N are not -1. Building blocks without autograd: each is the backward pass of the
other. This file is the reference in plain torch; CUDA takes kernels/triton_rows.py, except for float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import UserError
from kernels.expert_order import ExpertOrder
from kernels.limits import takes_kernels

LANE = 8  # numbers of 16 bits that one access moves
# The expert hidden size from which kernels do not gather: a copy of the rows takes as long as the products of about 160 hidden
# numbers, gathering a hundredth to a tenth of all (tests/benchmarks/kernels.md).
COPIED_FROM = 4096


@dataclass(frozen=True)
class Tokens:
    """Rows of tokens in place of rows of entries, for products that gather: each entry takes that of token `entry // top_k`."""

    rows_TD: Tensor  # where copies of 16 bytes can load them
    top_k: int

    @classmethod
    def of(cls, rows: Tensor, top_k: int) -> Tokens:
        """Of rows in any layout. Raises UserError where 32 bits cannot count the numbers."""
        apart = max(rows.stride(0), rows.shape[1])
        if rows.shape[0] * apart >= 2**31:
            raise UserError(
                f"{rows.shape[0]} tokens of {apart} numbers each are more than the {2**31 - 1} numbers that experts can gather "
                f"from; give at most {(2**31 - 1) // apart} tokens at once"
            )
        if rows.stride(1) == 1 and rows.stride(0) % 16 == 0 and rows.data_ptr() % 16 == 0:
            return cls(rows, top_k)
        return cls(rows.clone(memory_format=torch.contiguous_format), top_k)

    @property
    def operand(self) -> Tokens:
        """As Room has it."""
        return self

    @property
    def clippable(self) -> Tokens:
        return self


@dataclass(frozen=True)
class Room:
    """For rows of entries."""

    allocation: Tensor  # `rows`, and before them what the kernels on a GPU need there
    rows: Tensor

    @classmethod
    def of(cls, entries: int, width: int, like: Tensor) -> Room:
        """Of the dtype and on the device of `like`."""
        if takes_kernels(like):
            from kernels.hopper.ring import clippable  # here, because CPU machines may lack Triton

            return cls(*clippable(entries, width, like))
        rows = like.new_empty(entries, width)
        return cls(rows, rows)

    @property
    def operand(self) -> Tensor:
        """As products take it."""
        return self.rows

    @property
    def clippable(self) -> Tensor:
        """As products take it on the side that they clip."""
        return self.allocation


def of_entries(x_TD: Tensor, order: ExpertOrder, top_k: int, expert_hidden: int, room: Room | None = None) -> Room | Tokens:
    """The rows of all entries, sorted by expert: a copy, in `room` if it is given, or what kernels gather them from."""
    if takes_kernels(x_TD) and expert_hidden < COPIED_FROM:
        return Tokens.of(x_TD, top_k)
    room = room or Room.of(order.entry_N.shape[0], x_TD.shape[1], x_TD)
    if order.entry_N.shape[0]:
        spread_rows(x_TD, order.place_N, top_k, room.rows)
    return room


def spread_rows(x_TD: Tensor, place_N: Tensor, top_k: int, out_ND: Tensor) -> None:
    """out[place[t * K + k]] = x[t], into `out_ND` of the same dtype; for a place of -1, an absent entry, nothing is written.

    D must be a multiple of 8; rows in any stride.
    """
    _check(x_TD, out_ND)
    if _takes_kernel(x_TD):
        from kernels.triton_rows import launch_spread  # here, because CPU machines may lack Triton

        launch_spread(x_TD, place_N, top_k, out_ND)
    else:
        entry_N = (place_N >= 0).nonzero().squeeze(1)
        place_N, token_N = place_N.index_select(0, entry_N).long(), entry_N // top_k
        if len(entry_N) == out_ND.shape[0]:  # every row is written: each takes its token's, in one pass
            from_N = torch.empty_like(token_N).scatter_(0, place_N, token_N)
            torch.index_select(x_TD.detach(), 0, from_N, out=out_ND)
        else:
            out_ND.index_copy_(0, place_N, x_TD.detach().index_select(0, token_N))


def combine_rows(
    y_ND: Tensor, place_N: Tensor, top_k: int, *, weights_TK: Tensor | None = None, out_TD: Tensor | None = None
) -> Tensor:
    """out[t] = sum over k of weights[t, k] * y[place[t * K + k]], (T, D) in y's dtype; into a contiguous `out_TD`, if given.

    The sum runs over k = 0, 1, .. in float32 (float64 for float64). No weights are weights of 1; a place of -1 adds nothing,
    whatever its weight. D must be a multiple of 8.
    """
    _check(y_ND)
    if out_TD is None:
        out_TD = y_ND.new_empty(place_N.shape[0] // top_k, y_ND.shape[1])
    if _takes_kernel(y_ND):
        from kernels.triton_rows import launch_combine

        launch_combine(y_ND, place_N, top_k, weights_TK, None, out_TD, None)
        return out_TD
    place_TK = place_N.view(-1, top_k)
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    total_TD = torch.zeros(place_TK.shape[0], y_ND.shape[1], dtype=wide, device=y_ND.device)
    for k in range(top_k):
        token_N = (place_TK[:, k] >= 0).nonzero().squeeze(1)
        row_ND = y_ND.index_select(0, place_TK[:, k].index_select(0, token_N)).to(wide)
        if weights_TK is not None:
            row_ND *= weights_TK[:, k].index_select(0, token_N).unsqueeze(1)
        total_TD.index_add_(0, token_N, row_ND)
    return out_TD.copy_(total_TD)


def combine_rows_and_partials(
    y_ND: Tensor, place_N: Tensor, top_k: int, partials_PN: Tensor, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(combine_rows without weights, sums_TK), sums[t, k] = sum over p of partials[p, place[t * K + k]], in float32, or 0; into
    the two of `out`, contiguous, if they are given.

    What a backward pass needs at once: the gradient of the tokens, and that of the weights from partial sums by place.
    """
    _check(y_ND)
    tokens = place_N.shape[0] // top_k
    out_TD, sums_TK = out or (y_ND.new_empty(tokens, y_ND.shape[1]), partials_PN.new_empty(tokens, top_k))
    if _takes_kernel(y_ND):
        from kernels.triton_rows import launch_combine

        launch_combine(y_ND, place_N, top_k, None, partials_PN, out_TD, sums_TK)
        return out_TD, sums_TK
    sums_N = torch.zeros_like(partials_PN[0])
    for partial_N in partials_PN:
        sums_N += partial_N
    here_TK = place_N.view(-1, top_k) >= 0
    sums_TK.zero_()[here_TK] = sums_N[place_N[place_N >= 0]].to(sums_TK.dtype)
    return combine_rows(y_ND, place_N, top_k, out_TD=out_TD), sums_TK


def _takes_kernel(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype != torch.float64


def _check(*matrices: Tensor) -> None:
    for rows in matrices:
        if rows.shape[1] % LANE:
            raise UserError(
                f"rows of {rows.shape[1]} numbers cannot move in 16 bytes; make the hidden size a multiple of {LANE}"
            )
        assert rows.shape[0] <= 1 or rows.stride(1) == 1, f"numbers of a row must be adjacent, strides are {rows.stride()}"
