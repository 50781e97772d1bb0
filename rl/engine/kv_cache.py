"""The keys and values of the sequences that an engine decodes, and the two attentions that write and read them.

Every layer has one contiguous block of slots x max_length. Sequences in use occupy the first slots, without gaps, so that a
decoding step reads a view. Shape letters: B sequences, S tokens, M max_length, H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.config import ModelConfig

# Without cuDNN, which prepares a plan for every new shape, 10 ms each, while here the length grows with every step.
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class KVCache:
    """Keys and values by layer, slot, head and position."""

    def __init__(self, config: ModelConfig, slots: int, max_length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (slots, config.num_kv_heads, max_length, config.head_dim)
        # Zeros, not uninitialised memory: masked positions get weight 0, and 0 * NaN would still be NaN.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]

    def move(self, sources: Tensor, destinations: Tensor, length: int) -> None:
        """Copies the first `length` positions from slots `sources` to slots `destinations`; the two are disjoint."""
        for block in (*self.keys, *self.values):
            block[destinations, :, :length] = block[sources, :, :length]


@dataclass(frozen=True)
class PrefillAttention:
    """An `Attend` for whole prefixes, padded on the right: causal attention among themselves, and a copy into the cache.

    Row `sources_R[i]` of the batch goes into slot `slots_R[i]`; one row may go into several slots.
    """

    cache: KVCache
    sources_R: Tensor
    slots_R: Tensor

    def __call__(self, layer: int, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        length = k_BGSd.shape[2]
        # A real token never sees the padding behind it. What padding leaves in the cache is masked until it is overwritten.
        self.cache.keys[layer][self.slots_R, :, :length] = k_BGSd[self.sources_R]
        self.cache.values[layer][self.slots_R, :, :length] = v_BGSd[self.sources_R]
        with sdpa_kernel(FUSED):
            return functional.scaled_dot_product_attention(q_BHSd, k_BGSd, v_BGSd, is_causal=True, enable_gqa=True)


class DecodeAttention:
    """An `Attend` for one new token of each of the first B slots.

    `lengths_B` says how many tokens each sequence has in the cache; the new one is put behind them. `longest` is at least
    their maximum.
    """

    def __init__(self, cache: KVCache, lengths_B: Tensor, longest: int) -> None:
        places = torch.arange(longest + 1, device=lengths_B.device)
        self._cache, self._lengths_B, self._reach = cache, lengths_B, longest + 1
        self._rows_B = torch.arange(lengths_B.shape[0], device=lengths_B.device)
        self._mask = (places <= lengths_B[:, None])[:, None, None]

    def __call__(self, layer: int, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._rows_B, :, self._lengths_B] = k_BGSd[:, :, 0]
        values[self._rows_B, :, self._lengths_B] = v_BGSd[:, :, 0]
        batch, groups, _, head_dim = k_BGSd.shape
        # With one position a sequence, the query heads that share a key head can stand where positions stand; no key is copied.
        query = q_BHSd.reshape(batch, groups, -1, head_dim)
        keys, values = keys[:batch, :, : self._reach], values[:batch, :, : self._reach]
        if query.is_cuda:
            with sdpa_kernel(FUSED):
                out = functional.scaled_dot_product_attention(query, keys, values, attn_mask=self._mask)
        else:  # the fused kernel of the CPU is made for many positions; for one, plain products take a third of its time
            scores = torch.matmul(query.float() * head_dim**-0.5, keys.float().transpose(-1, -2))
            out = torch.matmul(scores.masked_fill_(~self._mask, -torch.inf).softmax(dim=-1), values.float()).to(query.dtype)
        return out.reshape(q_BHSd.shape)
