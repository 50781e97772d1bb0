"""The updates of a round, as the driver asks the ranks for them."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from parallel.balance import balance_metrics
from rl.algorithms import PolicyObjective
from rl.extras import PROXIMAL, REFERENCE, VALUES
from rl.returns import with_token_advantages
from trainer.batch import TrainBatch
from trainer.cluster import Processes
from trainer.config.rl import PER_TOKEN, AlgorithmConfig
from trainer.metrics import LOAD, Value

ADDED_UP = (
    "train/tokens",
    "train/model_tflops",
    "train/skipped",
    "time/train_s",
    "time/copies_exposed_s",
    "time/plans_exposed_s",
    "time/communication_exposed_s",
    "time/gpu_idle_s",
    "moe/moved_mib",
    "moe/owners_moved",
)  # over updates
NAMES = {"logprobs": PROXIMAL, "reference_logprobs": REFERENCE, "values": VALUES}  # of predictions before the first update


def learn(
    ranks: Processes, batches: list[TrainBatch], config: AlgorithmConfig, lr: float, rounds_done: int
) -> dict[str, Value]:
    """One optimizer step on each batch; their ratios are to the policy before the first. Returns the metrics of the round.

    In the first `config.value_warmup_rounds` rounds the value head alone learns.
    """
    batches, metrics = prepared(ranks, batches, config)
    objective = PolicyObjective(config)
    if config.advantage == "gae" and rounds_done < config.value_warmup_rounds:
        updates = [ranks.call("learn_values", batch, objective)[0] for batch in batches]
    else:
        updates = [ranks.call("learn", batch, objective, lr)[0] for batch in batches]
    positions = [int((batch.documents_BS >= 0).sum()) for batch in batches]
    return metrics | metrics_of_round(updates) | balance_of_round(updates, positions)


def prepared(ranks: Processes, batches: list[TrainBatch], config: AlgorithmConfig) -> tuple[list[TrainBatch], dict[str, Value]]:
    """The batches with all that must be known before the first update: predictions, and advantages that are made of them.

    With one update the proximal policy is the one being trained, so its log-probabilities need no pass of their own, unless a
    penalty within the reward asks for them. Under off_policy=staged they have come with the samples.
    """
    reference = config.kl_coefficient > 0
    known = PROXIMAL in batches[0].extras
    policy = config.advantage == "gae" or (not known and (len(batches) > 1 or config.kl_in_reward))
    metrics: dict[str, Value] = {}
    if policy or reference:
        clock = time.perf_counter()
        batches = [_predicted(ranks, batch, policy, reference) for batch in batches]
        metrics["time/proximal_s"] = time.perf_counter() - clock
    if config.advantage in PER_TOKEN:
        batches, found = with_token_advantages(batches, config)
        metrics |= found
    return batches, metrics


def _predicted(ranks: Processes, batch: TrainBatch, policy: bool, reference: bool) -> TrainBatch:
    shares = ranks.call("predict", batch, policy, reference)
    whole = {NAMES[name]: torch.cat([share[name] for share in shares]) for name in shares[0]}
    return replace(batch, extras={**whole, **batch.extras})  # what the batch brought along stays


def metrics_of_round(updates: list[dict[str, Value]]) -> dict[str, Value]:
    """What counts work is added up, all else is a mean over the updates that have it, and no table is taken.

    The mean of the MFU is over their time, so that it is all FLOPs over all time.
    """
    metrics: dict[str, Value] = {}
    for key in {key: None for update in updates for key in update}:
        numbers = [value for update in updates if not isinstance(value := update.get(key, []), list)]
        if numbers:
            metrics[key] = sum(numbers) if key in ADDED_UP else sum(numbers) / len(numbers)
    timed = [(_number(update, "perf/mfu"), _number(update, "time/train_s")) for update in updates if "perf/mfu" in update]
    if timed:
        metrics["perf/mfu"] = sum(mfu * seconds for mfu, seconds in timed) / sum(seconds for _, seconds in timed)
    return metrics


def _number(update: dict[str, Value], key: str) -> float:
    value = update[key]
    assert not isinstance(value, list)
    return value


def balance_of_round(updates: list[dict[str, Value]], positions: list[int]) -> dict[str, Value]:
    """The load of the experts over all updates of a round, which took this many positions through the gates, and its
    balance."""
    loads = [
        count * torch.tensor(load)
        for update, count in zip(updates, positions, strict=True)
        if isinstance(load := update.get(LOAD), list)
    ]
    if not loads:
        return {}
    return dict(balance_metrics(torch.stack(loads).sum(dim=0)))
