"""Small models for the tests of this folder: ours, and those of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.models import tiny_model

TINY = tiny_model(num_experts=4, expert_hidden_size=16, attention_bias=True, init_std=0.3, max_positions=64, vocab_size=96)
PLAIN = {"num_dense_layers": 0, "num_shared_experts": 0, "qk_norm": False, "attention_bias": False, "tie_embeddings": False}

THEIRS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "norm_topk_prob": True,
}


def qwen(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**THEIRS | {"num_experts": 4, "mlp_only_layers": [0]} | changes))


def olmoe() -> PreTrainedModel:
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**THEIRS | {"num_experts": 4, "norm_topk_prob": False}))
    for name, parameter in model.named_parameters():
        if "_norm" in name:  # which start as ones, so that it would not show which feature they are of
            parameter.data.normal_(1, 0.3)
    return model


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**THEIRS | {"num_local_experts": 4}))


def glm(**changes: Any) -> PreTrainedModel:
    """As published models, half of each head turns with the position."""
    torch.manual_seed(0)
    own = {"n_routed_experts": 4, "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5}
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**THEIRS | own | changes))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.3)
    for name, parameter in model.named_parameters():
        if "_norm" in name or name.endswith(".bias"):
            parameter.data.normal_(1, 0.3)
    return model


def tokens(rows: int, length: int, vocabulary: int = 96) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(3))
