"""The weights that a rank computes with, and the frozen weights of the reference policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parallel.expert_arena import ExpertArena, ExpertShape
from parallel.expert_shards import PARTS
from parallel.hooks import Hooks
from parallel.placement import even_owners, without_copies
from parallel.sparse_collectives import Parts
from parallel.topology import World
from trainer import checkpoint
from trainer.config.model import ModelConfig
from trainer.model.transformer import Transformer


@dataclass(frozen=True)
class Weights:
    """Of one policy on this rank, in the dtype of the model: all dense ones, and the experts that lie here."""

    model: Transformer
    arena: ExpertArena
    bias_LE: Tensor  # float32


@torch.no_grad()
def read_reference(
    folder: Path, config: ModelConfig, batch_invariant: bool, dtype: torch.dtype, world: World, hooks: Hooks
) -> Weights:
    """The policy of a checkpoint, frozen: rounded from its masters as those of the trainer are, so the same bits.

    Its experts have owners of their own, equally many on every rank, who never change and are never copied: the trainer may
    move its own experts as it likes. `hooks`: of the policy's layers. Collective.
    """
    checkpoint.read_meta(folder, config)
    shape = ExpertShape(config.num_moe_layers, config.num_experts, config.hidden_size, config.expert_hidden_size)
    owner_E = even_owners(config.num_experts, world.size)
    own = [(layer, int(expert)) for layer in range(shape.layers) for expert in np.flatnonzero(owner_E == world.rank)]
    arena = ExpertArena(shape, len(own), 0, world, dtype, _no_gradients, "messages", hooks)
    arena.place([without_copies(owner_E, world.size)] * shape.layers)
    arena.attention = None
    model = Transformer(config, batch_invariant=batch_invariant).to(world.device, dtype).requires_grad_(False)
    weights = Weights(model, arena, torch.zeros(shape.layers, shape.experts, device=world.device))
    masters = checkpoint.read(folder, {name: tensor.shape for name, tensor in _named_tensors(weights, own)})
    for name, tensor in _named_tensors(weights, own):
        tensor.copy_(masters[name])
    return weights


def _named_tensors(weights: Weights, own: list[tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
    """Under the names of a checkpoint; `own` are this rank's experts in the order of the arena's rows."""
    yield "bias", weights.bias_LE
    for name, parameter in weights.model.named_parameters():
        yield f"dense.{name}", parameter
    for row, (layer, expert) in enumerate(own):
        for part, rows in zip(PARTS, weights.arena.rows, strict=True):
            yield f"experts.{layer}.{expert}.{part}", rows[row]


def _no_gradients(row: int, gradients: Parts) -> None:
    raise AssertionError("a frozen expert got a gradient")
