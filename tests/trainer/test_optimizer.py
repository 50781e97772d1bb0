"""The learning-rate schedules at their corners."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.run import OptimizerConfig
from trainer.optimizer import learning_rate


def config(**changes: Any) -> OptimizerConfig:
    values: dict[str, Any] = {
        **{"lr": 2.0, "schedule": "wsd", "warmup_steps": 10, "decay_share": 0.2, "final_lr_share": 0.1},
        **{"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0},
    }
    return OptimizerConfig(**{**values, **changes})


def test_wsd_warms_up_stays_and_decays() -> None:
    rates = [learning_rate(step, 100, config()) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:80] == pytest.approx([2.0] * 71)
    assert rates[90] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[100] == pytest.approx(0.2)


def test_cosine_passes_the_middle_at_half_way() -> None:
    told = config(schedule="cosine", warmup_steps=0)
    assert learning_rate(0, 100, told) == pytest.approx(2.0)
    assert learning_rate(50, 100, told) == pytest.approx(2.0 * 0.55)
    assert learning_rate(100, 100, told) == pytest.approx(0.2)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(["wsd", "cosine", "constant"]), st.integers(1, 500), st.integers(0, 50), st.floats(0, 1), st.floats(0, 1)
)
def test_rates_stay_between_the_floor_and_the_peak(schedule: str, total: int, warmup: int, decay: float, floor: float) -> None:
    told = config(schedule=schedule, warmup_steps=warmup, decay_share=decay, final_lr_share=floor)
    rates = [learning_rate(step, total, told) for step in range(total)]
    assert all(0 < rate <= 2.0 + 1e-9 or floor == 0 for rate in rates)
    after = rates[warmup:]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(after))
    assert all(rate >= floor * 2.0 - 1e-9 for rate in after)
