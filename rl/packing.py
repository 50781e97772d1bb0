"""From samples, or demonstrations, to the rows of a TrainBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kernels.errors import UserError
from rl.advantages import advantages, overlong_penalty, uncertainty_weight
from rl.trajectory import Group, Sample
from trainer.batch import TrainBatch
from trainer.config import AlgorithmConfig


@dataclass(frozen=True)
class Document:
    """A prompt and a response. `behaviour_logprobs` and `learned` have an entry for each token of the response."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    behaviour_logprobs: tuple[float, ...]
    advantage: float
    learned: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert self.prompt_ids and self.response_ids, "a prompt and a response need a token each"
        assert len(self.response_ids) == len(self.behaviour_logprobs) == len(self.learned)
        assert any(self.learned), "a document without a learned token is a forward pass for nothing"

    @property
    def positions(self) -> int:
        """Places that it takes in a row: one less than its tokens, because the last token is only a target."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


def documents_of(groups: Sequence[Group], config: AlgorithmConfig, weight_version: int, max_new_tokens: int) -> list[Document]:
    """The judged samples of finished groups with their advantages, from rewards less the overlong penalty.

    A sample without a reward has no advantage; it is left out, which is weight 0 without the forward pass. So is, under
    off_policy=mask, a sample that weights before `weight_version` generated to the end. No token of the environment is learned.
    """
    rewards = [[_shaped_reward(sample, config, max_new_tokens) for sample in group.samples] for group in groups]
    lengths = [[sum(sample.sampled) for sample in group.samples] for group in groups]
    documents = []
    for group, found in zip(groups, advantages(rewards, lengths, config.advantage), strict=True):
        weight = uncertainty_weight([sample.reward for sample in group.samples], config.uncertainty_focus)
        for sample, advantage in zip(group.samples, found, strict=True):
            newest = (config.off_policy != "mask" or version == weight_version for version in sample.versions)
            learned = tuple(fresh and sampled for fresh, sampled in zip(newest, sample.sampled, strict=True))
            if advantage is not None and any(learned):
                ids = sample.prompt_ids, sample.response_ids
                documents.append(Document(*ids, sample.logprobs, weight * advantage, learned))
    if not documents:
        raise UserError(
            f"none of the samples of {len(groups)} groups can be learned from: algorithm.off_policy=mask takes tokens of the "
            "newest weights only; lower rollout.over_provision, or choose algorithm.off_policy=decoupled"
        )
    return documents


def _shaped_reward(sample: Sample, config: AlgorithmConfig, max_new_tokens: int) -> float | None:
    if sample.reward is None:
        return None
    return sample.reward + overlong_penalty(sample.length, max_new_tokens, config.overlong_margin, config.overlong_factor)


def policy_batches(
    documents: Sequence[Document],
    config: AlgorithmConfig,
    max_new_tokens: int,
    *,
    sequence_length: int,
    rows_multiple_of: int,
    pad_id: int,
) -> list[TrainBatch]:
    """A batch for each optimizer step of a round, equal shares of the documents in their order; never an empty one.

    aggregation=constant divides the sum over all tokens by documents * max_new_tokens, as Dr. GRPO does (2503.20783): a token
    counts the same in a long response and in a short one.
    """
    parts = min(config.updates_per_round, len(documents))
    batches = []
    for part in range(parts):
        share = documents[part * len(documents) // parts : (part + 1) * len(documents) // parts]
        batch = pack(
            share,
            sequence_length=sequence_length,
            rows_multiple_of=rows_multiple_of,
            aggregation=config.aggregation,
            pad_id=pad_id,
        )
        constant = config.aggregation == "constant"
        batches.append(replace(batch, denominator=float(len(share) * max_new_tokens) if constant else None))
    return batches


def pack(
    documents: Sequence[Document],
    *,
    sequence_length: int,
    rows_multiple_of: int,
    aggregation: Literal["token", "sequence", "constant"],
    pad_id: int,
) -> TrainBatch:
    """Packs `documents` into rows of `sequence_length`, several a row; the number of rows is a multiple of `rows_multiple_of`.

    A document's tokens stand at consecutive positions of one row and share its number, which counts up within the row;
    padding has number -1. Only positions that predict a learned token have a weight: 1 / learned tokens of the document
    for the mean over sequences, else 1. Extras `advantages` and `behaviour_logprobs` stand at all response tokens.
    Raises UserError when a document does not fit into a row.
    """
    assert documents, "nothing to pack"
    rows = _first_fit_decreasing(documents, sequence_length)
    shape = (-(-len(rows) // rows_multiple_of) * rows_multiple_of, sequence_length)
    tokens_BS = torch.full(shape, pad_id, dtype=torch.int64)
    targets_BS = torch.full(shape, pad_id, dtype=torch.int64)
    documents_BS = torch.full(shape, -1, dtype=torch.int32)
    weights_BS, advantages_BS, behaviour_BS = (torch.zeros(shape, dtype=torch.float32) for _ in range(3))
    for row, members in enumerate(rows):
        start = 0
        for number, document in enumerate(members):
            ids = torch.tensor(document.prompt_ids + document.response_ids)
            end, length = start + document.positions, len(document.response_ids)
            tokens_BS[row, start:end] = ids[:-1]
            targets_BS[row, start:end] = ids[1:]
            documents_BS[row, start:end] = number
            share = 1.0 / sum(document.learned) if aggregation == "sequence" else 1.0
            weights_BS[row, end - length : end] = torch.tensor(document.learned) * share
            advantages_BS[row, end - length : end] = document.advantage
            behaviour_BS[row, end - length : end] = torch.tensor(document.behaviour_logprobs)
            start = end
    extras = {"advantages": advantages_BS, "behaviour_logprobs": behaviour_BS}
    return TrainBatch(tokens_BS, targets_BS, documents_BS, weights_BS, extras)


def pack_demonstrations(
    demonstrations: Sequence[tuple[Sequence[int], Sequence[int], Sequence[bool]]],
    *,
    sequence_length: int,
    rows_multiple_of: int,
    pad_id: int,
) -> TrainBatch:
    """Packs (prompt ids, answer ids, which of them are learned) for supervised learning; every learned token counts 1."""
    documents = [
        Document(tuple(prompt), tuple(answer), (0.0,) * len(answer), 0.0, tuple(learned))
        for prompt, answer, learned in demonstrations
    ]
    return pack(
        documents,
        sequence_length=sequence_length,
        rows_multiple_of=rows_multiple_of,
        aggregation="token",
        pad_id=pad_id,
    )


def _first_fit_decreasing(documents: Sequence[Document], sequence_length: int) -> list[list[Document]]:
    """Longest first, each into the first row with room; equal lengths keep their order, so the result is deterministic."""
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in sorted(documents, key=lambda document: -document.positions):
        if document.positions > sequence_length:
            raise UserError(
                f"a sample with {len(document.prompt_ids)} prompt and {len(document.response_ids)} response tokens does not "
                f"fit into a row of loop.sequence_length = {sequence_length}; raise it to the longest prompt + "
                "rollout.max_new_tokens, or lower rollout.max_new_tokens"
            )
        row = next((index for index, free in enumerate(room) if free >= document.positions), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(sequence_length)
        rows[row].append(document)
        room[row] -= document.positions
    return rows
