"""Attention over packed rows, and rotary positions.

Shape letters: B batch, S sequence, H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

import itertools
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention import attend, attend_flash
from kernels.host_device import pinned
from kernels.ragged import ragged
from trainer.config.model import ModelConfig

FLASH_UNIT = 8  # features, of which FlashAttention takes multiples


def rope(positions_BS: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles (Su et al., arXiv 2104.09864) of kernels/norm.py, both (B * S, d), float32.

    Where a share of the features turns, these are the first pairs (i, i + d/2); the angles of the others are zero.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions_BS.device) / config.rotary_dim
    frequencies = functional.pad(1.0 / config.rope_theta**exponents, (0, (config.head_dim - config.rotary_dim) // 2))
    angles = positions_BS.flatten()[:, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def positions_of(documents_BS: Tensor) -> Tensor:
    """int64 positions that restart at zero wherever the document changes along a row."""
    places = torch.arange(documents_BS.shape[1], device=documents_BS.device).expand(documents_BS.shape)
    starts = torch.zeros_like(places)
    starts[:, 1:] = torch.where(documents_BS[:, 1:] != documents_BS[:, :-1], places[:, 1:], 0)
    return places - starts.cummax(dim=1).values


def document_lengths(documents_BS: Tensor) -> list[int]:
    """Tokens of each document, in order. A row's end ends one, and padding is a document like the others. Best on the host."""
    starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    ends = [*starts_BS.flatten().nonzero().flatten().tolist(), documents_BS.numel()]
    return [end - start for start, end in itertools.pairwise(ends)]


class PackedAttention:
    """An `Attend` for training: causal, and only within a document.

    `documents_BS` (integer) names the document of every token; -1 is padding. Rows of one document each take the library's
    causal kernels. Packed ones take FlashAttention over the documents' lengths on a GPU, which leaves out pairs that see
    nothing of each other (documents of 700 tokens in rows of 4,096: a quarter of the time with a mask); elsewhere a mask, made
    once for all layers.
    """

    def __init__(self, documents_BS: Tensor, device: torch.device) -> None:
        """`documents_BS`: best on the host, which reads them; `device`: where queries and keys are."""
        self._documents_BS, self._device = documents_BS, device
        lengths = document_lengths(documents_BS)
        self._whole_rows, self._longest = len(lengths) == len(documents_BS), max(lengths)
        first_N = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        self._first_N = pinned(first_N, device).to(device, non_blocking=True)

    @cached_property
    def _mask(self) -> Tensor:
        return _mask(self._documents_BS.to(self._device))

    def __call__(self, layer: int, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        by_kernel = q_BHSd.is_cuda and q_BHSd.dtype in (torch.bfloat16, torch.float16) and q_BHSd.shape[3] % FLASH_UNIT == 0
        if by_kernel and not self._whole_rows:
            q_THd, k_TGd, v_TGd = _tokens_first(q_BHSd, k_BGSd, v_BGSd)
            out_THd = attend_flash(q_THd, k_TGd, v_TGd, self._first_N, self._longest)
            return out_THd.unflatten(0, (q_BHSd.shape[0], q_BHSd.shape[2])).transpose(1, 2)
        if not by_kernel:  # not every fused kernel takes grouped heads there
            k_BGSd, v_BGSd = (_expanded(x, q_BHSd.shape[1]) for x in (k_BGSd, v_BGSd))
        mask = None if self._whole_rows else self._mask
        return functional.scaled_dot_product_attention(
            q_BHSd, k_BGSd, v_BGSd, attn_mask=mask, is_causal=mask is None, enable_gqa=by_kernel
        )


class BatchInvariantAttention:
    """The same function as `PackedAttention`, by `attend`: a token's result does not depend on where it is packed."""

    def __init__(self, documents_BS: Tensor, config: ModelConfig, device: torch.device) -> None:
        """As that of `PackedAttention`."""
        counts = document_lengths(documents_BS)
        self._spans = ragged(counts, counts, None, config.num_heads // config.num_kv_heads, device)

    def __call__(self, layer: int, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        q_THd, k_TGd, v_TGd = _tokens_first(q_BHSd, k_BGSd, v_BGSd)
        return attend(q_THd, k_TGd, v_TGd, self._spans).unflatten(0, (q_BHSd.shape[0], q_BHSd.shape[2])).transpose(1, 2)


def _tokens_first(*parts_BHSd: Tensor) -> list[Tensor]:
    """Each as (B * S, H, d)."""
    return [x.transpose(1, 2).flatten(0, 1) for x in parts_BHSd]


def _mask(documents_BS: Tensor) -> Tensor:
    """(B, 1, S, S) bool: which keys a query may see. Padding sees itself, so that its softmax has a term."""
    length = documents_BS.shape[1]
    same = documents_BS[:, :, None] == documents_BS[:, None, :]
    mask = (same & (documents_BS >= 0)[:, :, None]).tril()
    mask |= torch.eye(length, dtype=torch.bool, device=documents_BS.device)
    return mask[:, None]


def _expanded(x_BGSd: Tensor, num_heads: int) -> Tensor:
    """Each key/value head beside the query heads that share it, copied."""
    batch, groups, length, head_dim = x_BGSd.shape
    if groups == num_heads:
        return x_BGSd
    shared = x_BGSd[:, :, None].expand(batch, groups, num_heads // groups, length, head_dim)
    return shared.reshape(batch, num_heads, length, head_dim)
