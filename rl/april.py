"""APRIL: active partial rollouts (2509.18521), one round at a time.

A round needs N finished groups and submits N' = ceil(over_provision * N) >= N. When the N-th group is finished, everything
else is interrupted: unfinished samples return to the buffer as segments, with their log-probabilities and the weight version,
and the next round continues them before it starts anything new. Samples that are done already are never generated again.
With over_provision = 1 the same code waits for every sample: a plain synchronous rollout.

Two differences from the published code: groups that finish together with the N-th one are kept for the next round, and a
group is regenerated when its oldest token is more than `max_staleness` rounds behind.

Engines move in lockstep by a number of tokens, not by the clock, so a round is a pure function of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from kernels.errors import UserError
from rl.trajectory import Group, RolloutBuffer, Sample, fresh_group
from trainer.config import RolloutConfig


class EnginePool(Protocol):
    """What generates. One engine is a pool of one; several engines work on their shares at the same time."""

    def submit(self, samples: Sequence[Sample]) -> None:
        """Queues pending and partial samples, to be started in this order."""

    def advance(self, tokens: int) -> list[Sample]:
        """Decodes at most `tokens` tokens for every active sample, on all engines; returns those done, in any order."""

    def drain(self) -> list[Sample]:
        """Stops: returns every submitted sample that is not done, with what it has, in any order."""


Prompts = Callable[[int], Sequence[int]]  # index of a prompt -> its token ids
Score = Callable[[Sample], float | None]  # reward of a sample that is done; None: it could not be judged


@dataclass(frozen=True)
class RoundResult:
    """`groups`: exactly `config.groups` finished groups with their rewards, sorted by id. `metrics`: see `_metrics`."""

    groups: tuple[Group, ...]
    metrics: dict[str, float]


def submitted_groups(config: RolloutConfig) -> int:
    """N' = ceil(over_provision * N); the rounding forgives 1.1 * 10 = 11.000000000000002."""
    return math.ceil(round(config.over_provision * config.groups, 6))


def rollout_round(
    pool: EnginePool, buffer: RolloutBuffer, prompts: Prompts, config: RolloutConfig, weight_version: int, score: Score
) -> RoundResult:
    """Runs one round under the weights `weight_version` (they count rounds) and leaves the rest of the work in `buffer`.

    The engines must be empty and hold these weights. Raises UserError when not one sample of the round could be judged.
    """
    dropped = buffer.restart_older_than(weight_version - config.max_staleness)
    taken = buffer.take(
        config.groups,
        submitted_groups(config),
        lambda index: fresh_group(index, prompts(index), config.samples_per_group),
    )
    finished, unfinished = _generate(pool, taken, config)
    used, surplus = finished[: config.groups], finished[config.groups :]
    groups = tuple(_judged(group, score) for group in sorted(used, key=lambda group: group.id))
    buffer.settle(recycled=unfinished, surplus=surplus)
    metrics = _metrics(groups, weight_version)
    metrics["rollout/finished_groups"] = len(finished)
    metrics["rollout/recycled_samples"] = _count_partial(unfinished)
    metrics["rollout/resumed_samples"] = _count_partial(taken)
    metrics["rollout/new_tokens"] = _tokens(finished) + _tokens(unfinished) - _tokens(taken)
    metrics["rollout/dropped_groups"] = dropped
    return RoundResult(groups, metrics)


def complete(pool: EnginePool, samples: Sequence[Sample], advance_tokens: int) -> list[Sample]:
    """Generates `samples` to the end, all of them, for evaluation; sorted by uid. The engines must be empty before."""
    pool.submit(samples)
    done: list[Sample] = []
    while len(done) < len(samples):
        done += pool.advance(advance_tokens)
    return sorted(done, key=lambda sample: sample.uid)


def _generate(pool: EnginePool, taken: Sequence[Group], config: RolloutConfig) -> tuple[list[Group], list[Group]]:
    """Generates until `config.groups` groups are finished; returns (finished, unfinished), in order of completion and FIFO."""
    finished = [group for group in taken if group.done]
    running = {group.id: group for group in taken if not group.done}
    latest = {sample.uid: sample for group in running.values() for sample in group.samples}
    if len(finished) < config.groups:
        pool.submit([sample for group in running.values() for sample in group.samples if not sample.done])
        while len(finished) < config.groups:
            latest.update({sample.uid: sample for sample in pool.advance(config.advance_tokens)})
            completed = [group for group in (_refreshed(g, latest) for g in running.values()) if group.done]
            finished += completed
            for group in completed:
                del running[group.id]
        latest.update({sample.uid: sample for sample in pool.drain()})
    return finished, [_refreshed(group, latest) for group in running.values()]


def _refreshed(group: Group, latest: dict[int, Sample]) -> Group:
    return Group(group.id, tuple(latest[sample.uid] for sample in group.samples))


def _judged(group: Group, score: Score) -> Group:
    return Group(group.id, tuple(replace(sample, reward=score(sample)) for sample in group.samples))


def _tokens(groups: Sequence[Group]) -> int:
    return sum(sample.length for group in groups for sample in group.samples)


def _count_partial(groups: Sequence[Group]) -> int:
    return sum(sample.status == "partial" for group in groups for sample in group.samples)


def _metrics(groups: Sequence[Group], weight_version: int) -> dict[str, float]:
    """What the finished groups look like.

    rollout/length_mean, length_max   response tokens of a sample
    rollout/stale_token_share         response tokens sampled under older weights than `weight_version`
    rollout/staleness_max             rounds that the oldest token is behind
    rollout/truncated_share           samples that ran into max_new_tokens
    reward/mean, reward/std           over all judged samples of the round
    reward/zero_std_share             groups whose judged samples all have the same reward, so nothing can be learned from them
    reward/missing                    samples that could not be judged; they take no part in the update
    """
    samples = [sample for group in groups for sample in group.samples]
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    if not rewards:
        raise UserError(
            f"none of the {len(samples)} samples of this round could be judged (every score was None); "
            "check the task's score method and the service it may ask"
        )
    lengths = np.array([sample.length for sample in samples])
    ages = weight_version - np.array([version for sample in samples for version in sample.versions])
    kinds = [{sample.reward for sample in group.samples if sample.reward is not None} for group in groups]
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/stale_token_share": float((ages > 0).mean()),
        "rollout/staleness_max": float(ages.max()),
        "rollout/truncated_share": float(np.mean([sample.status == "truncated" for sample in samples])),
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        "reward/zero_std_share": float(np.mean([len(kind) <= 1 for kind in kinds])),
        "reward/missing": float(len(samples) - len(rewards)),
    }
