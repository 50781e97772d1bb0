"""A whole model with random weights, in the sizes that the options ask for: for benchmarks that generate or learn."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt

from launch.benchmarks.options import Options
from launch.machines import read_group
from parallel.adamw import AdamWSettings
from trainer.batch import TrainBatch
from trainer.config.model import ModelConfig, TopKRouter
from trainer.config.run import BalanceConfig, ParallelConfig
from trainer.guard import Guard
from trainer.model.transformer import ExpertWeights, LanguageModel, Transformer, expert_shapes, parameter_counts
from trainer.state import TrainerSpec


class ModelOptions(Options):
    hidden: PositiveInt | None = None
    expert_hidden: PositiveInt | None = None
    experts: PositiveInt | None = None
    top_k: PositiveInt | None = None
    vocabulary: PositiveInt | None = None
    layers: PositiveInt = Field(description="all of them MoE layers")
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt


def model_config(options: ModelOptions, name: str, positions: int) -> ModelConfig:
    shape = options.shapes()[name]  # type: ignore[index]
    return ModelConfig(
        hidden_size=shape.hidden,
        num_layers=options.layers,
        num_dense_layers=0,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        dense_hidden_size=shape.expert_hidden,
        num_experts=shape.experts,
        top_k=shape.top_k,
        expert_hidden_size=shape.expert_hidden,
        num_shared_experts=0,
        router=TopKRouter(kind="top_k"),
        router_scores="softmax",
        renormalize=True,
        routed_scale=1.0,
        selection_bias=False,
        qk_norm=True,
        attention_bias=False,
        tie_embeddings=True,
        rope_theta=1e6,
        norm_eps=1e-6,
        init_std=0.02,
        max_positions=positions,
        vocab_size=shape.vocabulary,
    )


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int) -> LanguageModel:
    """Norms one, all else normal; made on the device, where billions of them take no time."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        dense = Transformer(config, batch_invariant=True).to(dtype)
        experts = ExpertWeights(*(torch.empty(shape, dtype=dtype) for shape in expert_shapes(config)))
        bias_LE = torch.zeros(config.num_moe_layers, config.num_experts)
    with torch.no_grad():
        for weight in (*dense.parameters(), experts.gate_up_LECD, experts.down_LEDF):
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0, config.init_std, generator=generator)
    return LanguageModel(config, dense, experts, bias_LE)


def random_rows(rows: int, length: int, vocabulary: int, seed: int, document: int = 0) -> TrainBatch:
    """On the host. A row is one document, or has documents of that many tokens on average, which any token may end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=generator)
    ends = torch.rand(rows, length, generator=generator) * document < 1 if document else torch.zeros(rows, length)
    return TrainBatch(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ends.cumsum(dim=1).int(), torch.ones(rows, length)
    )


def trainer_spec(model: ModelConfig, device: torch.device, micro_rows: int, seed: int, batch_invariant: bool) -> TrainerSpec:
    """Of ranks that learn by FSSDP as a run does; `batch_invariant`: as in RL."""
    return TrainerSpec(
        model=model,
        adamw=AdamWSettings(betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, clip_norm=1.0),
        balance=read_group("balance", "frozen", BalanceConfig),
        parallel=read_group("parallel", "fssdp", ParallelConfig),
        dtype="bfloat16" if device.type == "cuda" else "float32",
        recompute=False,
        micro_rows=micro_rows,
        batch_invariant=batch_invariant,
        temperature=1.0,
        freeze_router=False,
        value_decay=None,
        seed=seed,
        guard=Guard(skip_nonfinite=0, spike_zscore=None, spike_window=2, on_spike="stop"),
    )


def floor_bytes(config: ModelConfig, rows: float, context: float, size: int) -> float:
    """What a decoding step has to read: experts as often as rows that choose evenly and independently leave one out, the dense
    weights, and keys and values of `context` tokens, those of all rows together."""
    counts = parameter_counts(config)
    chosen = 1 - (1 - config.top_k / config.num_experts) ** rows
    experts = config.num_moe_layers * config.num_experts * chosen * counts.per_expert
    keys = 2 * config.num_layers * config.num_kv_heads * config.head_dim * context
    return (counts.dense + experts + keys) * size
