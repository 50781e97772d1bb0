"""Several updates a round, as the driver asks the ranks for them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.topology import World
from rl.extras import PROXIMAL, REFERENCE
from rl.packing import Document, policy_batches
from rl.update import balance_of_round, learn, metrics_of_round
from tests.distributed.ranks import run_ranks
from tests.models import spec, tiny_model
from tests.rl.algorithm import algorithm_config
from tests.rl.test_staged import OneRank
from trainer.batch import TrainBatch
from trainer.config.run import BalanceConfig
from trainer.metrics import Value
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.transformer import LanguageModel
from trainer.state import TrainerSpec
from trainer.step import Trainer


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


def test_work_is_added_up_and_the_rest_is_a_mean_over_the_updates_that_have_it() -> None:
    first = {"train/loss": 1.0, "train/tokens": 10.0, "moe/load": [[0.5, 0.5]], "perf/mfu": 0.5, "time/train_s": 1.0}
    last = {"train/loss": 2.0, "train/tokens": 20.0, "moe/load": [[0.25, 0.75]], "perf/mfu": 0.1, "time/train_s": 3.0}
    found = metrics_of_round([first, last | {"moe/owners_moved": 3.0}])
    assert found.pop("perf/mfu") == pytest.approx((0.5 * 1 + 0.1 * 3) / 4), "all FLOPs over all time"
    assert found == {"train/loss": 1.5, "train/tokens": 30, "moe/owners_moved": 3, "time/train_s": 4}


def test_the_balance_of_a_round_is_that_of_all_its_tokens() -> None:
    """100 and 300 positions; an expert that one update left out is not dead, one that both did is."""
    updates: list[dict[str, Value]] = [
        {"moe/load": [[0.5, 0.5, 0.0, 0.0], [0.25] * 4], "moe/max_vio": 9.0, "moe/dead_experts": 2.0},
        {"train/skipped": 1.0},
        {"moe/load": [[0.1, 0.5, 0.4, 0.0], [0.25] * 4], "moe/max_vio": 9.0, "moe/dead_experts": 1.0},
    ]
    found = balance_of_round(updates, [100, 1000, 300])
    assert found["moe/load"] == [pytest.approx([0.2, 0.5, 0.3, 0.0]), [0.25] * 4]
    assert found["moe/max_vio"] == pytest.approx(0.5) and found["moe/max_vio_worst_layer"] == pytest.approx(1.0)
    assert found["moe/dead_experts"] == 1
    assert balance_of_round([{"train/skipped": 1.0}], [5]) == {}


@pytest.mark.parametrize("rate", [0.0, 0.01], ids=["frozen", "moving"])
def test_a_round_tells_its_balance_with_a_bias_that_is_frozen_or_moves(rate: float) -> None:
    told = spec(tiny_model(), micro_rows=2, balance=BalanceConfig(rule="sign", rate=rate))
    ((metrics, counts_LE),) = run_ranks(round_of, 1, told)
    load_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True)
    if rate == 0:  # the gates' first choice is known: two updates at a rate of zero
        assert torch.allclose(torch.tensor(metrics["moe/load"]), load_LE, atol=2e-5)
        assert metrics["moe/max_vio"] == pytest.approx((load_LE.amax(dim=1) * 8 - 1).mean().item(), abs=2e-4)
        assert metrics["moe/dead_experts"] == int((counts_LE == 0).sum())
    assert (metrics["moe/bias_range"] > 0) == (rate > 0)


def round_of(world: World, told: TrainerSpec) -> tuple[dict[str, Value], Tensor]:
    """Two updates of a round at learning rate 0, and the tokens of each expert of a single model."""
    draw = random.Random(0)
    documents = [
        Document((draw.randrange(61),), tuple(draw.randrange(61) for _ in range(n)), (-1.0,) * n, 1.0, (True,) * n)
        for n in (2, 9, 7, 3, 1, 8)
    ]
    config = algorithm_config(updates_per_round=2)
    rows = policy_batches(documents, config, 9, sequence_length=12, rows_multiple_of=2, pad_id=0)
    metrics = learn(OneRank(Trainer(told, world)), rows, config, 0.0, 0)  # type: ignore[arg-type]
    model = LanguageModel.initialize(told.model, told.seed)
    counts = [
        model.forward(
            b.tokens_BS,
            positions_of(b.documents_BS),
            b.documents_BS >= 0,
            PackedAttention(b.documents_BS, b.documents_BS.device),
        ).counts_LE
        for b in rows
    ]
    return metrics, sum(counts, torch.zeros_like(counts[0]))
