"""Slices of dense gradients over NCCL, on a stream of their own: exact means, and updates in which ZeRO reduces by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import gradient_slices
from parallel.schedule.pipeline import GRADIENTS
from parallel.scheduling import FILE, SLICES
from parallel.topology import World
from tests.distributed.ranks import run_ranks
from tests.distributed.test_gradient_slices import PLACES, Case, check_means, objective, planned, reduce_all, told
from tests.distributed.test_trainer import LR, own_state
from tests.gpu.needs import gpus, hopper, linked
from tests.models import random_batch
from trainer.state import MACHINE
from trainer.step import Trainer

pytestmark = [pytest.mark.gpu, gpus(2)]
LARGE = {"model": {"hidden_size": 64, "expert_hidden_size": 32}, "micro_rows": 2}
SIZES = (1_000_003, 7, 300_000, 64, 2_000_000, 1)
WHEN = (0, 0, 1, 2, 2, PLACES)  # of the last parameter first
MEANS = [
    Case(
        SIZES,
        WHEN,
        late=2,
        without=3,
        before=before,
        cuts=((50,) * 4, (0, 100, 3, 0)),
        per_node=2,
        dtype=dtype,
        most_bytes=most,
        least=least,
    )
    for before, dtype, most, least in ((True, torch.bfloat16, 2**20, 0), (False, torch.float32, 2**27, 1_000_000))
]


def test_means_over_nccl_have_the_same_bits_for_any_slices() -> None:
    check_means(run_ranks(reduce_all, 2, MEANS, kind="cuda"), MEANS, 2)


def first_update(world: World, changes: dict[str, Any], schedule: str | int) -> dict[str, Any]:
    """And the norms of three more, in which slices set out under the backward pass."""
    gradient_slices.LEAST_BYTES = 0  # no gradients of a model this small are worth one
    trainer = Trainer(told(schedule, **changes), world)
    norms, state = [], {}
    for step in range(4):
        batch = random_batch(step)
        norms.append(trainer.learn(batch.rows(4 * world.rank, 4 * world.rank + 4), objective, LR)["train/grad_norm"])
        state = own_state(trainer) if step == 0 else state
    slices = trainer.dense.slices
    return {"norms": norms, "state": state, "complete": None if slices is None else slices.complete_P}


def both(world: World, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    schedule = 1 if changes["parallel"].get("transport") == "peer_memory" else 3
    return first_update(world, dict(changes), "off"), first_update(world, dict(changes), schedule)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=hopper())])
@pytest.mark.parametrize(
    "settings",
    [{"zero_stage": 1}, {"zero_stage": 2}, pytest.param({"zero_stage": 2, "transport": "peer_memory"}, marks=linked(2))],
)
def test_two_gpus_update_as_where_zero_reduces(dtype: str, settings: dict[str, Any]) -> None:
    """Two means of two numbers have the same bits; attention's backward pass on a GPU may not have."""
    near, far = (1e-5, 1e-3) if dtype == "float32" else (1e-3, 3e-2)
    for zero, slices in run_ranks(both, 2, {**LARGE, "dtype": dtype, "parallel": settings}, kind="cuda"):
        assert 0 < slices["complete"][0] < slices["complete"][-1]
        assert slices["norms"][0] == pytest.approx(zero["norms"][0], rel=near)
        assert slices["norms"] == pytest.approx(zero["norms"], rel=far)
        for name, wanted in zero["state"].items():
            if name != MACHINE:  # measured
                torch.testing.assert_close(
                    slices["state"][name], wanted, rtol=1e-3, atol=1e-4, msg=lambda t, at=name: f"{at}: {t}"
                )


def test_planned_slices_are_measured_on_their_stream(tmp_path: Path) -> None:
    by_rank = run_ranks(planned, 2, "auto", str(tmp_path), kind="cuda")
    assert by_rank[0]["sums"] == by_rank[1]["sums"] is not None
    record = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    spans = [span for span in record["timelines"]["backward, measured"] if span["task"]["resource"] == SLICES]
    assert all(span["task"]["name"].startswith(GRADIENTS) and span["end_s"] >= span["start_s"] >= 0 for span in spans)
    assert spans or not record["slices"][-2]
