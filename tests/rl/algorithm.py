"""The algorithm options that tests share: those of algorithm=grpo, with changes."""

from __future__ import annotations

from typing import Any

from trainer.config.rl import AlgorithmConfig


def algorithm_config(**changes: Any) -> AlgorithmConfig:
    options: dict[str, Any] = {
        "advantage": "grpo",
        "uncertainty_focus": 0.0,
        "discount": 1.0,
        "gae_lambda": 1.0,
        "value_lambda": 1.0,
        "value_decay": 0.98,
        "value_coefficient": 0.1,
        "value_clip": 0.2,
        "value_warmup_rounds": 0,
        "overlong_margin": 0,
        "overlong_factor": 1.0,
        "loss": "ppo",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "dual_clip": None,
        "sapo_temperatures": (1.0, 1.05),
        "entropy_bonus": 0.0,
        "kl_coefficient": 0.0,
        "kl_estimator": "k3",
        "aggregation": "token",
        "updates_per_round": 1,
        "off_policy": "decoupled",
        "truncation": 2.0,
        "token_band": None,
        "sequence_band": None,
        "sequence_delta": None,
    }
    return AlgorithmConfig(**{**options, **changes})
