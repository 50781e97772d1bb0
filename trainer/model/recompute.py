"""Activations that are computed again for the backward pass instead of being kept (Chen et al., arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from torch.utils.checkpoint import checkpoint

from parallel.moe_layer import Recomputation

Result = TypeVar("Result")


def recomputed(block: Callable[..., Result], *arguments: object) -> Result:
    """block(*arguments, Recomputation()): once now, of which only the arguments are kept, and once more, `again`, when its
    backward pass comes. That one asks for what the block saves inside; its results are known by then, and may be anything."""
    return cast(Result, checkpoint(_Twice(block), *arguments, use_reentrant=False, preserve_rng_state=False))


class _Twice:
    def __init__(self, block: Callable[..., object]) -> None:
        self._block, self._recomputation = block, Recomputation()

    def __call__(self, *arguments: object) -> object:
        found = self._block(*arguments, self._recomputation)
        self._recomputation.again = True
        return found
