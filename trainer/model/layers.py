"""Layers of a model's blocks: linear maps, norms, SwiGLU, and the projections around the attention.

Shape letters: B batch, S sequence, D model, F the hidden size of an MLP, H query heads, G key/value heads, d head_dim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.expert_mlp import swiglu
from kernels.linear import linears
from kernels.norm import add_rms_norm, norm_rotate, rms_norm, rotate
from trainer.config.model import ModelConfig


class Attend(Protocol):
    """Causal attention that respects documents; also what a decoding engine puts a cache behind."""

    def __call__(self, layer: int, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        """out_BHSd, from rotated queries and keys. `layer` counts all layers from zero."""


class Angles(NamedTuple):
    """Rotary cosines and sines, (B * S, d) float32."""

    cosines: Tensor
    sines: Tensor


class Linear(nn.Linear):
    """By the library's product, or by the one whose rows do not depend on the batch (kernels/linear.py)."""

    batch_invariant = False

    def reset_parameters(self) -> None:
        """Weights stay unset: torch's initialisation draws from the global generator, and on the meta device it brings in all
        of torch's compiler, which takes a process a second."""

    def forward(self, x: Tensor) -> Tensor:
        return side_by_side(x, self)[0]


def side_by_side(x: Tensor, *maps: Linear) -> list[Tensor]:
    """Each of up to three linear maps of `x`."""
    if not maps[0].batch_invariant and len(maps) == 1:
        return [functional.linear(x, maps[0].weight, maps[0].bias)]
    results = linears(x, [linear.weight for linear in maps], plain=not maps[0].batch_invariant)
    return [y if linear.bias is None else y + linear.bias for y, linear in zip(results, maps, strict=True)]


def linear(inputs: int, outputs: int, *, bias: bool = False) -> Linear:
    """Most have no bias."""
    return Linear(inputs, outputs, bias=bias)


class Norm(nn.Module):
    """What norms have."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


class RMSNorm(Norm):
    """x / rms(x) * weight over the last dimension, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def updated(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the residual stream `x` with its update, that normed), in one pass over memory."""
        return (x, self(x)) if update is None else add_rms_norm(x, update, self.weight, self.eps)


class HeadNorm(Norm):
    """RMSNorm of every head by itself, which its token's angles then turn: both in one pass over memory."""

    def forward(self, x_BSHd: Tensor, angles: Angles) -> Tensor:
        return norm_rotate(x_BSHd.flatten(0, 1), self.weight, self.eps, *angles).view_as(x_BSHd)


class SwiGLU(nn.Module):
    """The MLP of a dense layer, and the shared experts of an MoE layer; rows 0..F of `gate_up` are the gate."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = linear(size, 2 * hidden)
        self.down = linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(swiglu(self.gate_up(x)))
        return y


class Attention(nn.Module):
    """Grouped-query attention around an `Attend`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = linear(config.hidden_size, config.num_heads * config.head_dim, bias=config.attention_bias)
        self.key = linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.attention_bias)
        self.value = linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.attention_bias)
        self.output = linear(config.num_heads * config.head_dim, config.hidden_size)
        self.query_norm = self._norm(config, config.num_heads)
        self.key_norm = self._norm(config, config.num_kv_heads)

    def forward(self, layer: int, x_BSD: Tensor, angles: Angles, attend: Attend) -> Tensor:
        query, key, value = side_by_side(x_BSD, self.query, self.key, self.value)
        query_BSHd = self._turned(query, self.query_norm, angles)
        key_BSGd = self._turned(key, self.key_norm, angles)
        value_BSGd = value.unflatten(2, (-1, self.head_dim))
        out_BHSd = attend(layer, query_BSHd.transpose(1, 2), key_BSGd.transpose(1, 2), value_BSGd.transpose(1, 2))
        out_BSD: Tensor = self.output(out_BHSd.transpose(1, 2).flatten(2))
        return out_BSD

    @staticmethod
    def _norm(config: ModelConfig, heads: int) -> nn.Module:
        if not config.qk_norm:
            return nn.Identity()
        if config.qk_norm == "all_heads":
            return RMSNorm(config.head_dim * heads, config.norm_eps)
        return HeadNorm(config.head_dim, config.norm_eps)

    def _turned(self, x_BSN: Tensor, norm: nn.Module, angles: Angles) -> Tensor:
        """The heads of `x_BSN`, normed and rotated."""
        if isinstance(norm, HeadNorm):  # called as a module, so that who looks for what is not finite sees it
            turned: Tensor = norm(x_BSN.unflatten(2, (-1, self.head_dim)), angles)
            return turned
        x_BSHd = norm(x_BSN).unflatten(2, (-1, self.head_dim))
        return rotate(x_BSHd.flatten(0, 1), *angles).view_as(x_BSHd)
