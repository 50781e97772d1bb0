"""off_policy=staged: the trainer's log-probabilities under the weights that generated each token.

Source: CoPRIS (2511.05589). After every rollout round and before its update the trainer runs all samples through the model,
finished or not, and keeps its log-probabilities of the tokens of this round. The ratio of an update is then to the policy that
sampled the token, as computed by the trainer: its clip bounds the lag, and the engine's rounding plays no role. If the engine
rounds as the trainer does, these equal the engine's own numbers, and the pass is useless.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import torch

from kernels.errors import UserError
from rl.april import RoundResult
from rl.packing import Document, Rows, pack, response_values
from rl.trajectory import Group, RolloutBuffer, Sample
from trainer.cluster import Processes


def appended(stored: Sequence[float], fresh: Sequence[float]) -> tuple[float, ...]:
    """old = cat(stored, fresh[len(stored):]): what was said of a token when it was new stays, whatever newer weights say."""
    return (*stored, *fresh[len(stored) :])


def staged(sample: Sample, fresh: Sequence[float]) -> Sample:
    """The sample with a trainer's log-probability for every token; `fresh` are those of the whole response now."""
    stored = [
        value for segment in sample.segments if segment.trainer_logprobs is not None for value in segment.trainer_logprobs
    ]
    old, segments, first = appended(stored, fresh), [], 0
    for segment in sample.segments:
        end = first + len(segment.token_ids)
        segments.append(replace(segment, trainer_logprobs=old[first:end]))
        first = end
    return replace(sample, segments=tuple(segments))


def is_new(sample: Sample) -> bool:
    """Whether it has tokens that the trainer was not asked about; they are its last ones."""
    return bool(sample.segments) and sample.segments[-1].trainer_logprobs is None


def stage(
    ranks: Processes, result: RoundResult, buffer: RolloutBuffer, weight_version: int, **rows: Unpack[Rows]
) -> RoundResult:
    """The round with the trainer's log-probabilities; the groups of the buffer get theirs in place.

    The ranks must still hold the weights `weight_version`. Raises UserError for new tokens of another version.
    """
    clock = time.perf_counter()
    everything = [sample for group in (*result.groups, *buffer.recycled, *buffer.surplus) for sample in group.samples]
    new = [sample for sample in everything if is_new(sample)]
    for sample in new:
        _require_version(sample, weight_version)
    documents = [Document(s.prompt_ids, s.response_ids, s.logprobs, 0.0, (True,) * s.length, experts=s.experts) for s in new]
    found: dict[int, Sample] = {}
    if documents:
        shares = ranks.call("predict", pack(documents, aggregation="token", **rows), True, False)
        logprobs_BS = torch.cat([share["logprobs"] for share in shares])
        values = response_values(logprobs_BS, documents, rows["sequence_length"])
        found = {sample.uid: staged(sample, fresh) for sample, fresh in zip(new, values, strict=True)}

    def changed(group: Group) -> Group:
        return Group(group.id, tuple(found.get(sample.uid, sample) for sample in group.samples))

    buffer.change(changed)
    metrics = {**result.metrics, "time/staged_s": time.perf_counter() - clock}
    return replace(result, groups=tuple(map(changed, result.groups)), metrics=metrics)


def _require_version(sample: Sample, weight_version: int) -> None:
    other = {s.weight_version for s in sample.segments if s.trainer_logprobs is None} - {weight_version}
    if other:
        raise UserError(
            f"sample {sample.uid} has new tokens of weight version {min(other)}, but the trainer holds {weight_version}: "
            "algorithm.off_policy=staged asks the trainer before it learns. Choose algorithm.off_policy=decoupled where "
            "engines go on generating during an update"
        )
