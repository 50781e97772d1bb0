"""The weights of a rank as pieces of the whole model's tensors, as views of its memory.

Every rank has the dense parameters and the selection bias, and its own experts, by (layer, expert) in the rows of its arena
(parallel/expert_shards.py). Adjacent experts of one rank form one piece, so a single rank has the experts of all layers in one
piece per part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.expert_shards import PARTS, ExpertShards
from trainer.model.transformer import Transformer

SMALL_BYTES = 16 << 20  # from here on a copy or a message of its own costs little


class Span(NamedTuple):
    """Elements of a tensor of `LanguageModel.state`, which is contiguous."""

    name: str
    first: int
    elements: int

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """(elements,); a view."""
        return state[self.name].view(-1)[self.first : self.first + self.elements]


class Piece(NamedTuple):
    span: Span
    values_N: Tensor  # in the dtype of the model


def shared_pieces(model: Transformer, bias_LE: Tensor) -> list[Piece]:
    """What every rank has."""
    tensors = {f"dense.{name}": parameter.detach() for name, parameter in model.named_parameters()} | {"bias": bias_LE}
    return [Piece(Span(name, 0, tensor.numel()), tensor.view(-1)) for name, tensor in tensors.items()]


def expert_pieces(experts: ExpertShards) -> list[Piece]:
    """What this rank owns."""
    found = runs([layer * experts.arena.shape.experts + expert for layer, expert in experts.own])
    pieces = []
    for part, rows in zip(PARTS, experts.arena.rows, strict=True):
        size = rows[0].numel()
        for row, first, count in found:
            values_N = rows[row : row + count].view(-1)
            pieces.append(Piece(Span(f"experts.{part}", first * size, count * size), values_N))
    return pieces


def runs(places: Sequence[int]) -> list[tuple[int, int, int]]:
    """(index of the first, its value, how many) of every maximal run of consecutive numbers; `places` ascend."""
    found: list[tuple[int, int, int]] = []
    for index, place in enumerate(places):
        if found and place == sum(found[-1][1:]):
            start, first, count = found[-1]
            found[-1] = start, first, count + 1
        else:
            found.append((index, place, 1))
    return found


@torch.no_grad()
def put(pieces: Iterable[Piece], state: Mapping[str, Tensor]) -> None:
    """Copies the pieces into the tensors of a model on any device."""
    found = list(pieces)
    copy([piece.values_N for piece in found], [piece.span.of(state) for piece in found])


def copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Each into its target; large ones by the device's copy engine, the small ones of a dtype in a few launches for all."""
    small: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        if is_small(source):
            of_dtype = small.setdefault(source.dtype, ([], []))
            of_dtype[0].append(source)
            of_dtype[1].append(target)
        else:
            target.copy_(source)
    for some_sources, some_targets in small.values():
        torch._foreach_copy_(some_targets, some_sources)


def is_small(tensor: Tensor) -> bool:
    return tensor.nbytes < SMALL_BYTES
