"""Attention over packed rows, and rotary positions.

Shape letters: B batch, S sequence, H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention import attend
from kernels.ragged import ragged
from trainer.config.model import ModelConfig


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


class PackedAttention:
    """An `Attend` for training: causal, and only within a document. The mask is made once for all layers.

    `documents_BS` (integer) names the document of every token; -1 is padding, which attends to itself alone, so that its
    softmax has a term and no NaN reaches the gradients.
    """

    def __init__(self, documents_BS: Tensor) -> None:
        whole_rows = bool((documents_BS == documents_BS[:, :1]).all()) and bool((documents_BS[:, 0] >= 0).all())
        self._mask = None if whole_rows else _mask(documents_BS)  # a mask costs the fused causal kernels

    def __call__(self, layer: int, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            q_BHSd,
            _expanded(k_BGSd, q_BHSd.shape[1]),
            _expanded(v_BGSd, q_BHSd.shape[1]),
            attn_mask=self._mask,
            is_causal=self._mask is None,
        )


class BatchInvariantAttention:
    """The same function as `PackedAttention`, by kernels/attention.py: a token's result does not depend on where it is packed.

    Padding is a document like the others.
    """

    def __init__(self, documents_BS: Tensor, config: ModelConfig, device: torch.device) -> None:
        """`documents_BS`: best on the host, which reads them; `device`: where queries and keys are."""
        starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
        starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
        ends = [*starts_BS.flatten().nonzero().flatten().tolist(), documents_BS.numel()]
        counts = [end - start for start, end in itertools.pairwise(ends)]
        self._spans = ragged(counts, counts, None, config.num_heads // config.num_kv_heads, device)

    def __call__(self, layer: int, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        q_THd, k_TGd, v_TGd = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSd, k_BGSd, v_BGSd))
        return attend(q_THd, k_TGd, v_TGd, self._spans).unflatten(0, (q_BHSd.shape[0], q_BHSd.shape[2])).transpose(1, 2)


def _mask(documents_BS: Tensor) -> Tensor:
    """(B, 1, S, S) bool: which keys a query may see."""
    length = documents_BS.shape[1]
    same = documents_BS[:, :, None] == documents_BS[:, None, :]
    mask = (same & (documents_BS >= 0)[:, :, None]).tril()
    mask |= torch.eye(length, dtype=torch.bool, device=documents_BS.device)
    return mask[:, None]


def _expanded(x_BGSd: Tensor, num_heads: int) -> Tensor:
    """Each key/value head beside the query heads that share it. Copied, because not every fused kernel takes grouped heads."""
    batch, groups, length, head_dim = x_BGSd.shape
    if groups == num_heads:
        return x_BGSd
    shared = x_BGSd[:, :, None].expand(batch, groups, num_heads // groups, length, head_dim)
    return shared.reshape(batch, num_heads, length, head_dim)
