"""Several updates a round, as the driver asks the ranks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl.algorithms import PROXIMAL, PolicyObjective
from rl.loop import learn, metrics_of_round
from rl.packing import Document, policy_batches
from tests.rl.algorithm import algorithm_config
from trainer.batch import TrainBatch


class ScriptedRanks:
    """Two ranks whose log-probability of every token is the number of updates so far."""

    def __init__(self) -> None:
        self.learned: list[TrainBatch] = []

    def call(self, method: str, batch: TrainBatch, *_: Any) -> list[Any]:
        if method == "logprobs":
            half = batch.num_rows // 2
            return [
                torch.full_like(batch.rows(*share).weights_BS, len(self.learned)) for share in ((0, half), (half, 2 * half))
            ]
        assert method == "learn"
        self.learned.append(batch)
        return [{"train/loss": float(len(self.learned)), "train/tokens": 7}] * 2


def batches(updates: int) -> list[TrainBatch]:
    documents = [Document((1,), (2, 3), (-1.0, -1.0), 1.0, (True, True)) for _ in range(4)]
    config = algorithm_config(updates_per_round=updates)
    return policy_batches(documents, config, 2, sequence_length=4, rows_multiple_of=2, pad_id=0)


def proximal_of(batch: TrainBatch) -> Tensor:
    return batch.extras[PROXIMAL]


def test_all_updates_of_a_round_are_held_to_the_policy_before_the_first() -> None:
    ranks, objective = ScriptedRanks(), PolicyObjective(algorithm_config())
    metrics = learn(ranks, batches(2), objective, 0.1)  # type: ignore[arg-type]
    assert len(ranks.learned) == 2
    for batch in ranks.learned:
        assert proximal_of(batch).shape == batch.tokens_BS.shape and not proximal_of(batch).any()
    assert metrics.pop("time/proximal_s")
    assert metrics == {"train/loss": 1.5, "train/tokens": 14}


def test_one_update_needs_no_forward_pass_before_it() -> None:
    ranks, objective = ScriptedRanks(), PolicyObjective(algorithm_config())
    assert learn(ranks, batches(1), objective, 0.1) == {"train/loss": 1.0, "train/tokens": 7}  # type: ignore[arg-type]
    assert PROXIMAL not in ranks.learned[0].extras


def test_work_is_added_up_loads_are_the_last_and_the_rest_is_a_mean_over_the_updates_that_have_it() -> None:
    first = {"train/loss": 1.0, "train/tokens": 10.0, "moe/load": [[0.5, 0.5]]}
    last = {"train/loss": 2.0, "train/tokens": 20.0, "moe/load": [[0.25, 0.75]], "moe/owners_moved": 3.0}
    assert metrics_of_round([first, last]) == {
        "train/loss": 1.5,
        "train/tokens": 30,
        "moe/load": [[0.25, 0.75]],
        "moe/owners_moved": 3,
    }
