"""Hooks between the parts of an MoE layer (FSMoE, arXiv 2501.10714, section 3.2): before and after a layer, and before and
after its rows travel to the experts and back.

Hooks around a layer are part of its computation, and autograd goes through them. Hooks around a transfer decide in which form
rows travel: `before_...` gets the rows of a message when it is sent and `after_...` when it arrives, separately for each leg if
there are two. In the backward pass they get gradients: those of results on the way there, those of tokens on the way back. They
work row by row, so results do not depend on chunks.

Letters: T tokens of a rank, S rows of a message, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]
MessageDtype = Literal["auto", "bfloat16", "float8"]
LARGEST = torch.finfo(torch.float8_e4m3fn).max
SCALE_BYTES = 8  # after a row in float8: its scale in float32, and as much again, so that rows stay aligned


def unchanged(rows: Tensor) -> Tensor:
    return rows


@dataclass(frozen=True)
class Hooks:
    before_start: Change = unchanged  # tokens, (T, D)
    before_dispatch: Change = unchanged  # rows of a message, (S, D), to what travels, (S, any width) of any dtype
    after_dispatch: Change = unchanged  # and to rows again
    before_combine: Change = unchanged  # results, likewise
    after_combine: Change = unchanged
    after_end: Change = unchanged  # results of the tokens, (T, D)

    def row_bytes(self, hidden: int, dtype: torch.dtype) -> float:
        """Of a row on its way, in the mean of both ways."""
        row = torch.zeros(1, hidden, dtype=dtype)
        return (self.before_dispatch(row).nbytes + self.before_combine(row).nbytes) / 2


NONE = Hooks()


def message_hooks(wanted: MessageDtype, dtype: torch.dtype) -> Hooks:
    """Rows travel as they are computed, in `dtype`; or rounded to bfloat16; or to float8 (e4m3, a scale for each row) there and
    bfloat16 back (as DeepSeek-V3, arXiv 2412.19437, section 3.3, with a scale for 128 numbers)."""
    if wanted == "auto":
        return NONE
    half: tuple[Change, Change] = (partial(_cast, dtype=torch.bfloat16), partial(_cast, dtype=dtype))
    there = half if wanted == "bfloat16" else (to_float8, partial(from_float8, dtype=dtype))
    return Hooks(before_dispatch=there[0], after_dispatch=there[1], before_combine=half[0], after_combine=half[1])


def _cast(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype)


def to_float8(rows_SD: Tensor) -> Tensor:
    """(S, D + 8) bytes: numbers over the row's scale, and the scale. Done again to what `from_float8` gave it changes nothing
    but the last bit of the scale."""
    scale_S1 = rows_SD.float().abs().amax(dim=1, keepdim=True) / LARGEST
    scale_S1 = torch.where(scale_S1 > 0, scale_S1, 1.0)
    numbers = (rows_SD.float() / scale_S1).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    scale = scale_S1.repeat(1, SCALE_BYTES // scale_S1.element_size())
    return torch.cat([numbers.view(torch.uint8), scale.view(torch.uint8)], dim=1)


def from_float8(bytes_SB: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, D) of this dtype."""
    numbers = bytes_SB[:, :-SCALE_BYTES].contiguous().view(torch.float8_e4m3fn)
    scale_S2 = bytes_SB[:, -SCALE_BYTES:].contiguous().view(torch.float32)
    return (numbers.float() * scale_S2[:, :1]).to(dtype)
