"""APRIL: active partial rollouts (2509.18521), one round at a time.

A round needs N finished groups and submits N' = ceil(over_provision * N) >= N. When the N-th group is finished, everything
else is interrupted: unfinished samples return to the buffer as segments, with their log-probabilities and the weight version,
and the next round continues them before it starts anything new. Samples that are done already are never generated again.
With over_provision = 1 the same code waits for every sample: a plain synchronous rollout.

With refills, DAPO's dynamic sampling (2503.14476): a group whose judged rewards are all equal teaches nothing and does not
count. Once the groups in progress can no longer make N, more are drawn, over-provisioned as before. When the refills are used
up and all is finished, groups without signal fill the round, so a round ends even if the task is too easy or too hard.

Two differences from the published code: groups that finish together with the N-th one are kept for the next round, and a
group is regenerated, or dropped (`stale`), when its oldest token is more than `max_staleness` rounds behind. So is a group that
was kept, where only tokens of the newest weights are learned (algorithm.off_policy=mask): it has none.

Engines move in lockstep by a number of tokens, not by the clock, so a round is a pure function of its inputs.

With overlap (rollout=async) the engines are not interrupted when the N-th group is finished, but when new weights are there:
while the ranks learn, they go on with N' groups, with new ones in place of those being learned. Finished groups that wait count
among the N', so neither trainer nor engines can get far ahead of the other, and each drawn group is still trained once. How far
the engines get meanwhile depends on the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np

from kernels.errors import UserError
from rl.length_bias import RoundLengths
from rl.trajectory import Group, RolloutBuffer, Sample, fresh_group, lengths_of
from trainer.config.rl import RolloutConfig


class EnginePool(Protocol):
    """What generates. One engine is a pool of one; several engines work on their shares at the same time."""

    def submit(self, samples: Sequence[Sample]) -> None:
        """Queues pending and partial samples, to be started in this order."""

    def advance(self, tokens: int) -> list[Sample]:
        """Decodes at most `tokens` tokens for every active sample, on all engines; returns those done, in any order."""

    def drain(self) -> list[Sample]:
        """Stops: returns every submitted sample that `advance` has not returned, with what it has, in any order."""


class OverlappingPool(EnginePool, Protocol):
    """One that can also generate by itself."""

    def going_on(self, tokens: int, samples: int) -> AbstractContextManager[list[Sample]]:
        """As if `advance(tokens)` was called all the time while the block runs, until the `samples` under way are done.

        The list has those done when the block ends; nothing else may be called within it.
        """

    def learning(self) -> AbstractContextManager[None]:
        """While the block runs the ranks learn: what they hold is of no version, and no engine may get it."""


Prompts = Callable[[int], Sequence[int]]  # index of a prompt -> its token ids
Learn = Callable[[Sequence[Group]], None]
Score = Callable[[Sequence[Sample]], Sequence[float | None]]  # rewards of samples that are done; None: not to be judged


@dataclass(frozen=True)
class RoundResult:
    """`groups`: exactly `config.groups` finished groups with their rewards, sorted by id. `metrics`: see `_metrics`."""

    groups: tuple[Group, ...]
    metrics: dict[str, float]
    dropped: tuple[Group, ...] = ()  # too old, and not regenerated


def submitted_groups(groups: int, config: RolloutConfig) -> int:
    """N' = ceil(over_provision * N) for N groups; the rounding forgives 1.1 * 10 = 11.000000000000002."""
    return math.ceil(round(config.over_provision * groups, 6))


def rollout_round(
    pool: OverlappingPool,
    buffer: RolloutBuffer,
    prompts: Prompts,
    config: RolloutConfig,
    weight_version: int,
    score: Score,
    meanwhile: Learn | None = None,
    *,
    newest_only: bool = False,
) -> RoundResult:
    """Runs one round under the weights `weight_version` (they count rounds) and leaves the rest of the work in `buffer`.

    The engines must be empty and hold these weights. `meanwhile` gets the groups of the result as soon as they are there, and
    the engines go on generating until it returns. With `newest_only` nothing else than tokens of these weights is learned, as
    under off_policy=mask, so finished groups that have none are stale too. Raises UserError when not one sample of the round
    could be judged.
    """
    newest = weight_version if newest_only else None
    stale = buffer.expire(weight_version - config.max_staleness, drop=config.stale == "drop", newest=newest)
    dropped = buffer.dropped
    first_drawn = buffer.next_group
    judged: dict[int, Group] = {}

    def fresh(index: int) -> Group:
        return fresh_group(index, prompts(index), config.samples_per_group)

    def informative(groups: Sequence[Group]) -> list[bool]:
        if config.refills == 0:
            return [True] * len(groups)
        found = _judged(groups, score)
        judged.update((group.id, group) for group in found)
        return [len(_distinct_rewards(group)) > 1 for group in found]

    progress = _Progress(pool, informative)
    progress.enter(buffer.take(config.groups, submitted_groups(config.groups, config), fresh))
    _generate(progress, config, lambda missing: buffer.take_more(submitted_groups(missing, config), fresh))
    used = (progress.useful + progress.flat)[: config.groups]
    judged.update((group.id, group) for group in _judged([group for group in used if group.id not in judged], score))
    groups = tuple(judged[group.id] for group in sorted(used, key=lambda group: group.id))
    metrics = _metrics(groups, weight_version)
    if meanwhile is not None:
        _overlap(progress, config, lambda missing: buffer.take_more(missing, fresh), partial(meanwhile, groups))
    if progress.running:
        progress.update(pool.drain())
    metrics |= _settle(progress, buffer, groups, dropped, first_drawn)
    metrics["rollout/stale_groups"] = len(stale)
    return RoundResult(groups, metrics, dropped)


def _settle(
    progress: _Progress, buffer: RolloutBuffer, groups: Sequence[Group], dropped: Sequence[Group], first_drawn: int
) -> dict[str, float]:
    """Leaves in the buffer what the round does not use. Metrics of what the engines did in it."""
    ids = {group.id for group in groups}
    surplus = [group for group in progress.useful if group.id not in ids]
    replaced = [group for group in progress.flat if group.id not in ids]
    unfinished, finished = list(progress.running.values()), [*progress.useful, *progress.flat]
    buffer.settle(recycled=unfinished, surplus=surplus)
    buffer.lengths.close_round(RoundLengths(first_drawn, lengths_of(groups), lengths_of((*replaced, *dropped))))
    return {
        "rollout/decode_steps": progress.steps,
        "rollout/finished_groups": len(finished),
        "rollout/replaced_groups": len(replaced),
        "rollout/recycled_samples": _count_partial(unfinished),
        "rollout/resumed_samples": _count_partial(progress.taken),
        "rollout/resumed_tokens": sum(
            len(sample.prompt_ids) + sample.length
            for group in progress.taken
            for sample in group.samples
            if sample.status == "partial"
        ),
        "rollout/new_tokens": _tokens(finished) + _tokens(unfinished) - _tokens(progress.taken),
        "rollout/length_bias": buffer.lengths.bias(lengths_of((*buffer.recycled, *buffer.surplus))),
    }


def complete(pool: EnginePool, samples: Sequence[Sample], advance_tokens: int) -> list[Sample]:
    """Generates `samples` to the end, all of them, for evaluation; sorted by uid. The engines must be empty before."""
    pool.submit(samples)
    done: list[Sample] = []
    while len(done) < len(samples):
        done += pool.advance(advance_tokens)
    return sorted(done, key=lambda sample: sample.uid)


@dataclass
class _Progress:
    """The groups of a round: `taken` as they came, and where each is now, in order of completion and FIFO."""

    pool: OverlappingPool
    informative: Callable[[Sequence[Group]], Sequence[bool]]
    taken: list[Group] = field(default_factory=list)
    useful: list[Group] = field(default_factory=list)
    flat: list[Group] = field(default_factory=list)  # finished, and not informative
    running: dict[int, Group] = field(default_factory=dict)
    steps: int = 0  # of decoding, until the round is full

    def enter(self, groups: Sequence[Group]) -> None:
        self.taken += groups
        self.running |= {group.id: group for group in groups}
        waiting = [sample for group in groups for sample in group.samples if not sample.done]
        if waiting:
            self.pool.submit(waiting)
        self.update([])

    @property
    def waiting(self) -> int:
        """Samples that are not done."""
        return sum(not sample.done for group in self.running.values() for sample in group.samples)

    def update(self, samples: Sequence[Sample]) -> None:
        """Takes samples in their new state, and moves the groups that are finished with them."""
        latest = {sample.uid: sample for sample in samples}
        for group in [_refreshed(group, latest) for group in self.running.values()]:
            self.running[group.id] = group
        done = [group for group in self.running.values() if group.done]
        for group, useful in zip(done, self.informative(done), strict=True):
            del self.running[group.id]
            (self.useful if useful else self.flat).append(group)


def _generate(progress: _Progress, config: RolloutConfig, more: Callable[[int], list[Group]]) -> None:
    """Generates until `config.groups` groups are useful, or nothing is left to try; `more` draws for this many that miss."""
    refills = config.refills
    while len(progress.useful) < config.groups and (progress.running or refills):
        missing = config.groups - len(progress.useful) - len(progress.running)
        if missing > 0 and refills:
            progress.enter(more(missing))
            refills -= 1
        else:
            progress.update(progress.pool.advance(config.advance_tokens))
            progress.steps += config.advance_tokens


def _overlap(
    progress: _Progress, config: RolloutConfig, more: Callable[[int], list[Group]], meanwhile: Callable[[], None]
) -> None:
    """Runs `meanwhile` while the engines have as many groups as they had at first; those that wait finished count as theirs."""
    under_way = len(progress.running) + max(0, len(progress.useful) - config.groups)
    progress.enter(more(max(0, submitted_groups(config.groups, config) - under_way)))
    with progress.pool.going_on(config.advance_tokens, progress.waiting) as done:
        meanwhile()
    progress.update(done)


def _refreshed(group: Group, latest: dict[int, Sample]) -> Group:
    return Group(group.id, tuple(latest.get(sample.uid, sample) for sample in group.samples))


def _judged(groups: Sequence[Group], score: Score) -> list[Group]:
    """The groups with the rewards of their samples, all asked for at once."""
    rewards = iter(score([sample for group in groups for sample in group.samples]))
    return [Group(group.id, tuple(replace(sample, reward=next(rewards)) for sample in group.samples)) for group in groups]


def _distinct_rewards(group: Group) -> set[float]:
    return {sample.reward for sample in group.samples if sample.reward is not None}


def _tokens(groups: Sequence[Group]) -> int:
    segments = (segment for group in groups for sample in group.samples for segment in sample.segments)
    return sum(len(segment.token_ids) for segment in segments if segment.sampled)


def _count_partial(groups: Sequence[Group]) -> int:
    return sum(sample.status == "partial" for group in groups for sample in group.samples)


def _metrics(groups: Sequence[Group], weight_version: int) -> dict[str, float]:
    """What the finished groups look like.

    rollout/length_mean, length_max   response tokens of a sample, replies of the environment included
    rollout/stale_token_share         the model's tokens sampled under older weights than `weight_version`
    rollout/staleness_mean, _max      rounds that the model's tokens are behind, and the oldest of them
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
    ages = weight_version - np.array([v for s in samples for v, sampled in zip(s.versions, s.sampled, strict=True) if sampled])
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/stale_token_share": float((ages > 0).mean()),
        "rollout/staleness_mean": float(ages.mean()),
        "rollout/staleness_max": float(ages.max()),
        "rollout/truncated_share": float(np.mean([sample.status == "truncated" for sample in samples])),
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        "reward/zero_std_share": float(np.mean([len(_distinct_rewards(group)) <= 1 for group in groups])),
        "reward/missing": float(len(samples) - len(rewards)),
    }
