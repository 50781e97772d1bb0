"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from parallel.adamw import AdamWSettings
from trainer.config.run import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of update `step` (0-based) of `total_steps`.

    Linear warm-up over `warmup_steps`, then: `cosine` falls over all remaining steps; `wsd` stays, and falls linearly over
    the last `decay_share` of all steps (MiniCPM, 2404.06395); `constant` stays. The floor is `final_lr_share * lr`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.final_lr_share
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    decay_steps = max(round(total_steps * config.decay_share), 1)
    left = min(max(total_steps - step, 0) / decay_steps, 1.0)
    return config.lr * (floor + (1 - floor) * left)


def adamw_settings(config: OptimizerConfig) -> AdamWSettings:
    return AdamWSettings(config.betas, config.eps, config.weight_decay, config.clip_norm)
