"""Several updates a round, as the driver asks the ranks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rl.extras import PROXIMAL, REFERENCE
from rl.packing import Document, policy_batches
from rl.update import learn, metrics_of_round
from tests.rl.algorithm import algorithm_config
from trainer.batch import TrainBatch


class ScriptedRanks:
    """Two ranks whose every prediction is the number of updates so far."""

    def __init__(self) -> None:
        self.learned: list[TrainBatch] = []
        self.methods: list[str] = []
        self.asked: list[tuple[bool, bool]] = []

    def call(self, method: str, batch: TrainBatch, *arguments: Any) -> list[Any]:
        if method == "predict":
            policy, reference = arguments
            self.asked.append((policy, reference))
            names = ["logprobs", "values"] * policy + ["reference_logprobs"] * reference
            half = batch.num_rows // 2
            shares = [batch.rows(*share).weights_BS for share in ((0, half), (half, 2 * half))]
            return [{name: torch.full_like(share, len(self.learned)) for name in names} for share in shares]
        assert method in ("learn", "learn_values")
        self.methods.append(method)
        self.learned.append(batch)
        return [{"train/loss": float(len(self.learned)), "train/tokens": 7}] * 2


def batches(updates: int) -> list[TrainBatch]:
    documents = [Document((1,), (2, 3), (-1.0, -1.0), 1.0, (True, True)) for _ in range(4)]
    config = algorithm_config(updates_per_round=updates)
    return policy_batches(documents, config, 2, sequence_length=4, rows_multiple_of=2, pad_id=0)


def proximal_of(batch: TrainBatch) -> Tensor:
    return batch.extras[PROXIMAL]


def test_all_updates_of_a_round_are_held_to_the_policy_before_the_first() -> None:
    ranks = ScriptedRanks()
    metrics = learn(ranks, batches(2), algorithm_config(), 0.1, 0)  # type: ignore[arg-type]
    assert len(ranks.learned) == 2 and ranks.asked == [(True, False)] * 2
    for batch in ranks.learned:
        assert proximal_of(batch).shape == batch.tokens_BS.shape and not proximal_of(batch).any()
    assert metrics.pop("time/proximal_s")
    assert metrics == {"train/loss": 1.5, "train/tokens": 14}


def test_one_update_needs_no_forward_pass_before_it() -> None:
    ranks = ScriptedRanks()
    assert learn(ranks, batches(1), algorithm_config(), 0.1, 0) == {"train/loss": 1.0, "train/tokens": 7}  # type: ignore[arg-type]
    assert PROXIMAL not in ranks.learned[0].extras and not ranks.asked


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"kl_coefficient": 0.1}, (False, True)),
        ({"kl_coefficient": 0.1, "kl_estimator": "k1", "advantage": "reinforce_pp"}, (True, True)),
        ({"advantage": "gae"}, (True, False)),
    ],
    ids=["penalty", "in-the-reward", "values"],
)
def test_only_what_the_algorithm_needs_is_asked_once_a_batch(changes: dict[str, Any], asked: tuple[bool, bool]) -> None:
    ranks = ScriptedRanks()
    learn(ranks, batches(1), algorithm_config(**changes), 0.1, 0)  # type: ignore[arg-type]
    assert ranks.asked == [asked]
    assert (REFERENCE in ranks.learned[0].extras) == asked[1]


def test_the_value_head_learns_alone_in_the_first_rounds() -> None:
    ranks, config = ScriptedRanks(), algorithm_config(advantage="gae", value_warmup_rounds=2)
    for rounds_done in range(4):
        metrics = learn(ranks, batches(1), config, 0.1, rounds_done)  # type: ignore[arg-type]
        assert "value/explained_variance" in metrics
    assert ranks.methods == ["learn_values"] * 2 + ["learn"] * 2


def test_work_is_added_up_loads_are_the_last_and_the_rest_is_a_mean_over_the_updates_that_have_it() -> None:
    first = {"train/loss": 1.0, "train/tokens": 10.0, "moe/load": [[0.5, 0.5]]}
    last = {"train/loss": 2.0, "train/tokens": 20.0, "moe/load": [[0.25, 0.75]], "moe/owners_moved": 3.0}
    assert metrics_of_round([first, last]) == {
        "train/loss": 1.5,
        "train/tokens": 30,
        "moe/load": [[0.25, 0.75]],
        "moe/owners_moved": 3,
    }
