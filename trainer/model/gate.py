"""The trained part of an MoE layer's router: the parameters of the gate that `model.router` names, and its logits.

The arithmetic is in kernels/gates.py and kernels/linear.py; what follows the logits is in kernels/router.py. Shape letters:
T tokens, D model, E experts, R dimension of the comparison, B batch, S sequence.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.gates import cosine_logits, noisy_logits
from kernels.linear import linear, linears
from kernels.random_bits import normal_numbers
from trainer.config.model import CosineRouter, ModelConfig, NoisyTopKRouter
from trainer.model.initial import fill_normal


@dataclass(frozen=True)
class RouterNoise:
    """Names each token of a training step, so that its noise is the same when it is computed again, and on any rank."""

    step: str  # of the run: its seed and the number of the update
    row_T: Tensor  # int64; the row of the global batch, whatever rank and micro-batch it is in; (B, S) before it is flattened
    position_T: Tensor  # int64; the place in the row

    def flattened(self) -> RouterNoise:
        return replace(self, row_T=self.row_T.flatten(), position_T=self.position_T.flatten())

    def normal(self, layer: int, experts: int) -> Tensor:
        """(T, E) standard normal numbers of a layer; a pure function of (step, layer, row, position)."""
        digest = hashlib.sha256(f"{self.step}/{layer}".encode()).digest()
        return normal_numbers(self.row_T, self.position_T, int.from_bytes(digest[:7], "big"), experts)


def router_noise(seed: int, update: int, rows: range, length: int, device: torch.device) -> RouterNoise:
    """Of rows `rows` of the global batch of an update, (B, S)."""
    row_B1 = torch.arange(rows.start, rows.stop, device=device)[:, None]
    position_S = torch.arange(length, device=device)
    return RouterNoise(f"{seed}/{update}", row_B1.expand(-1, length), position_S.expand(len(rows), -1))


class LinearGate(nn.Module):
    """x W^T. In float32, and a token's logits do not depend on the tokens beside it, as for every gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def initialize(self, std: float, seed: int, name: str) -> None:
        """`name`: of this module in the model."""
        fill_normal(self.weight, std, seed, f"{name}.weight")

    def forward(self, x_TD: Tensor, layer: int, noise: RouterNoise | None) -> Tensor:
        return linear(x_TD, self.weight, dtype=wide(x_TD))


class NoisyGate(LinearGate):
    """The same with noise while it is given; `noise` starts at zero, which gives every logit a deviation of ln 2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.noise = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def initialize(self, std: float, seed: int, name: str) -> None:
        super().initialize(std, seed, name)
        nn.init.zeros_(self.noise)

    def forward(self, x_TD: Tensor, layer: int, noise: RouterNoise | None) -> Tensor:
        if noise is None:
            return super().forward(x_TD, layer, noise)
        logits_TE, spread_TE = linears(x_TD, [self.weight, self.noise], dtype=wide(x_TD))
        return noisy_logits(logits_TE, spread_TE, noise.normal(layer, logits_TE.shape[1]))


class CosineGate(nn.Module):
    """Cosines of tokens and experts in R dimensions, over a learned temperature."""

    def __init__(self, config: ModelConfig, router: CosineRouter) -> None:
        super().__init__()
        self.router = router
        self.projection = nn.Parameter(torch.empty(router.size, config.hidden_size))
        self.experts = nn.Parameter(torch.empty(config.num_experts, router.size))
        self.log_temperature = nn.Parameter(torch.empty(1))

    def initialize(self, std: float, seed: int, name: str) -> None:
        fill_normal(self.projection, std, seed, f"{name}.projection")
        fill_normal(self.experts, std, seed, f"{name}.experts")
        nn.init.constant_(self.log_temperature, math.log(self.router.temperature))

    def forward(self, x_TD: Tensor, layer: int, noise: RouterNoise | None) -> Tensor:
        return cosine_logits(x_TD, self.projection, self.experts, self.log_temperature)


Gate = LinearGate | CosineGate


def gate(config: ModelConfig) -> Gate:
    if isinstance(config.router, NoisyTopKRouter):
        return NoisyGate(config)
    if isinstance(config.router, CosineRouter):
        return CosineGate(config, config.router)
    return LinearGate(config)


def wide(x_TD: Tensor) -> torch.dtype:
    """What logits are computed in."""
    return torch.promote_types(x_TD.dtype, torch.float32)
