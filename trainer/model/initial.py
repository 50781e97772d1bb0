"""Initial weights. Each tensor has a generator of its own, seeded from (seed, name), so a rank draws only what it owns and
still gets the same numbers as a single process."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from trainer.config.model import ModelConfig


def initial_expert(config: ModelConfig, seed: int, layer: int, expert: int) -> tuple[Tensor, Tensor]:
    """gate_up_CD and down_DF of an expert of MoE layer `layer` (counted without the dense layers), float32 on the CPU."""
    gate_up_CD = torch.empty(2 * config.expert_hidden_size, config.hidden_size)
    down_DF = torch.empty(config.hidden_size, config.expert_hidden_size)
    fill_normal(gate_up_CD, config.init_std, seed, f"experts.{layer}.{expert}.gate_up")
    fill_normal(down_DF, residual_std(config), seed, f"experts.{layer}.{expert}.down")
    return gate_up_CD, down_DF


def residual_std(config: ModelConfig) -> float:
    """Of matrices that write to the residual stream, two a layer; keeps its variance independent of the depth (GPT-2)."""
    return config.init_std / math.sqrt(2 * config.num_layers)


@torch.no_grad()
def fill_normal(tensor: Tensor, std: float, seed: int, name: str) -> None:
    """normal(0, std) in place, drawn in float32 on the CPU whatever the device and dtype of the tensor."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=generator))
