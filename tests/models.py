"""Small models and batches that tests share."""

from __future__ import annotations

from typing import Any

import torch

from parallel.adamw import AdamWSettings
from trainer.batch import TrainBatch
from trainer.config.model import ModelConfig
from trainer.config.run import BalanceConfig, ParallelConfig
from trainer.guard import Guard
from trainer.state import TrainerSpec

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 3,
    "num_dense_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "dense_hidden_size": 48,
    "num_experts": 8,
    "top_k": 2,
    "expert_hidden_size": 24,
    "num_shared_experts": 1,
    "router": {"kind": "top_k"},
    "router_scores": "sigmoid",
    "renormalize": True,
    "routed_scale": 1.5,
    "selection_bias": True,
    "qk_norm": True,
    "attention_bias": False,
    "tie_embeddings": True,
    "rope_theta": 10000.0,
    "norm_eps": 1e-6,
    "init_std": 0.2,  # large, so that routing and attention are far from uniform
    "max_positions": 128,
    "vocab_size": 61,
}


def tiny_model(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, **changes})


def parallel(**changes: Any) -> ParallelConfig:
    values = {"zero_stage": 1, "policy": "hecate", "overlap": 2, "memory": 2}
    values |= {
        "transport": "auto",
        "message_dtype": "auto",
        "schedule": "off",
        "rematerialise": False,
        "reshard_every": 2,
        "calibrate": False,
    }
    values |= {"offload": "none", "nvme_dir": None}
    return ParallelConfig(**{**values, **changes})


def spec(model: ModelConfig, **changes: Any) -> TrainerSpec:
    values: dict[str, Any] = {
        "model": model,
        # A large eps: at 1e-8 AdamW divides rounding noise by rounding noise where a gradient is nearly zero.
        "adamw": AdamWSettings(betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1, clip_norm=0.5),
        "balance": BalanceConfig(rule="sign", rate=0.01),
        "parallel": parallel(),
        "dtype": "float32",
        "recompute": False,
        "micro_rows": 1,
        "batch_invariant": False,
        "temperature": 1.0,
        "freeze_router": False,
        "value_decay": None,
        "seed": 3,
        "guard": Guard(skip_nonfinite=0, spike_zscore=None, spike_window=2, on_spike="stop"),
    }
    return TrainerSpec(**{**values, **changes})


def random_batch(seed: int, rows: int = 8, length: int = 12, vocab: int = 61) -> TrainBatch:
    """Rows of several documents, some padding, and weights of which some are zero."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (rows, length + 1), generator=generator)
    starts = torch.rand(rows, length, generator=generator) < 0.2
    documents = starts.cumsum(dim=1).to(torch.int32)
    padding = torch.arange(length) >= torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    documents[padding] = -1
    weights = torch.rand(rows, length, generator=generator) * (torch.rand(rows, length, generator=generator) < 0.7)
    weights[padding] = 0.0
    return TrainBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents, weights)
