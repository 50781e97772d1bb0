"""First values of the weights. Each tensor has a generator of its own, seeded from (seed, name), so that a rank may draw
only what it owns and still gets the numbers that a single process gets."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from trainer.config import ModelConfig


def initial_experts(config: ModelConfig, seed: int, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Experts first..last-1 of MoE layer `layer` (counted without the dense layers), float32 on the CPU.

    Returns gate_up_ECD and down_EDF with E = last - first and C = 2 * expert_hidden_size.
    """
    gate_up_ECD = torch.empty(last - first, 2 * config.expert_hidden_size, config.hidden_size)
    down_EDF = torch.empty(last - first, config.hidden_size, config.expert_hidden_size)
    for place, expert in enumerate(range(first, last)):
        fill_normal(gate_up_ECD[place], config.init_std, seed, f"experts.{layer}.{expert}.gate_up")
        fill_normal(down_EDF[place], residual_std(config), seed, f"experts.{layer}.{expert}.down")
    return gate_up_ECD, down_EDF


def residual_std(config: ModelConfig) -> float:
    """Of matrices that write to the residual stream, two a layer; keeps its variance independent of the depth (GPT-2)."""
    return config.init_std / math.sqrt(2 * config.num_layers)


@torch.no_grad()
def fill_normal(tensor: Tensor, std: float, seed: int, name: str) -> None:
    """normal(0, std) in place, drawn in float32 on the CPU whatever the device and dtype of the tensor."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=generator))
