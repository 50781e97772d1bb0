"""From samples, or demonstrations, to the rows of a TrainBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from kernels.errors import UserError
from kernels.replay import unrecorded
from rl.advantages import advantages, overlong_penalty, uncertainty_weight
from rl.extras import ADVANTAGES, BEHAVIOUR, PROXIMAL, RESPONSES, WHOLE
from rl.routed_experts import RoutedExperts
from rl.trajectory import Group, Sample
from trainer.batch import TrainBatch
from trainer.config.rl import AlgorithmConfig


class Rows(TypedDict):
    """What rows a batch has."""

    sequence_length: int  # tokens of a row
    rows_multiple_of: int  # the ranks, which share the rows evenly
    pad_id: int


@dataclass(frozen=True)
class Document:
    """A prompt and a response. `behaviour_logprobs` and `learned` have an entry for each token of the response.

    So have `whole_logprobs`, where they differ: those of the same policy before tokens were left out of what it sampled from;
    and `proximal_logprobs`, which all documents of a batch have or none: those of the trainer, known before the update.
    `experts` are to be replayed, of its first tokens or of all but the last.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    behaviour_logprobs: tuple[float, ...]
    advantage: float
    learned: tuple[bool, ...]
    whole_logprobs: tuple[float, ...] | None = None
    proximal_logprobs: tuple[float, ...] | None = None
    experts: RoutedExperts | None = None

    def __post_init__(self) -> None:
        assert self.experts is None or self.experts.tokens <= self.positions, (self.experts.tokens, self.positions)
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
    documents = []
    for group in groups:
        rewards = [_shaped_reward(sample, config, max_new_tokens) for sample in group.samples]
        found = advantages(rewards, config.advantage)
        weight = uncertainty_weight([sample.reward for sample in group.samples], config.uncertainty_focus)
        for sample, advantage in zip(group.samples, found, strict=True):
            newest = (config.off_policy != "mask" or version == weight_version for version in sample.versions)
            learned = tuple(fresh and sampled for fresh, sampled in zip(newest, sample.sampled, strict=True))
            if advantage is not None and any(learned):
                proximal = sample.trainer_logprobs if config.off_policy == "staged" else None
                documents.append(
                    Document(
                        sample.prompt_ids,
                        sample.response_ids,
                        behaviour_logprobs=sample.logprobs,
                        advantage=weight * advantage,
                        learned=learned,
                        whole_logprobs=sample.whole_logprobs,
                        proximal_logprobs=proximal,
                        experts=sample.experts,
                    )
                )
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
    documents: Sequence[Document], config: AlgorithmConfig, max_new_tokens: int, **rows: Unpack[Rows]
) -> list[TrainBatch]:
    """A batch for each optimizer step of a round, equal shares of the documents in their order; never an empty one.

    aggregation=constant divides the sum over all tokens by documents * max_new_tokens, as Dr. GRPO does (2503.20783): a token
    counts the same in a long response and in a short one.
    """
    parts = min(config.updates_per_round, len(documents))
    batches = []
    for part in range(parts):
        share = documents[part * len(documents) // parts : (part + 1) * len(documents) // parts]
        batch = pack(share, aggregation=config.aggregation, **rows)
        constant = config.aggregation == "constant"
        batches.append(replace(batch, denominator=float(len(share) * max_new_tokens) if constant else None))
    return batches


def pack(
    documents: Sequence[Document], *, aggregation: Literal["token", "sequence", "constant"], **rows: Unpack[Rows]
) -> TrainBatch:
    """Packs `documents` into rows of `sequence_length`, several a row; the number of rows is a multiple of `rows_multiple_of`.

    A document's tokens stand at consecutive positions of one row and share its number, which counts up within the row;
    padding has number -1. Only positions that predict a learned token have a weight: 1 / learned tokens of the document
    for the mean over sequences, else 1. The extras stand at all response tokens.
    Raises UserError when a document does not fit into a row.
    """
    assert documents, "nothing to pack"
    length, multiple = rows["sequence_length"], rows["rows_multiple_of"]
    places = _places(documents, length)
    shape = (-(-(1 + max(place.row for place in places)) // multiple) * multiple, length)
    tokens_BS = torch.full(shape, rows["pad_id"], dtype=torch.int64)
    targets_BS = torch.full(shape, rows["pad_id"], dtype=torch.int64)
    documents_BS = torch.full(shape, -1, dtype=torch.int32)
    responses_BS = torch.zeros(shape, dtype=torch.bool)
    weights_BS, advantages_BS, behaviour_BS, whole_BS, proximal_BS = (torch.zeros(shape, dtype=torch.float32) for _ in range(5))
    for document, place in zip(documents, places, strict=True):
        ids = torch.tensor(document.prompt_ids + document.response_ids)
        document_at, response_at = place.document, place.response
        tokens_BS[document_at] = ids[:-1]
        targets_BS[document_at] = ids[1:]
        documents_BS[document_at] = place.number
        share = 1.0 / sum(document.learned) if aggregation == "sequence" else 1.0
        weights_BS[response_at] = torch.tensor(document.learned) * share
        responses_BS[response_at] = True
        advantages_BS[response_at] = document.advantage
        behaviour_BS[response_at] = torch.tensor(document.behaviour_logprobs)
        whole_BS[response_at] = torch.tensor(document.whole_logprobs or document.behaviour_logprobs)
        if document.proximal_logprobs is not None:
            proximal_BS[response_at] = torch.tensor(document.proximal_logprobs)
    extras = {RESPONSES: responses_BS, ADVANTAGES: advantages_BS, BEHAVIOUR: behaviour_BS}
    if any(document.whole_logprobs for document in documents):
        extras[WHOLE] = whole_BS
    if documents[0].proximal_logprobs is not None:
        extras[PROXIMAL] = proximal_BS
    return TrainBatch(
        tokens_BS, targets_BS, documents_BS, weights_BS, extras, routed_BSLK=_routed(documents, places, tokens_BS.shape)
    )


def _routed(documents: Sequence[Document], places: Sequence[Place], shape: tuple[int, ...]) -> Tensor | None:
    """The recorded experts of all rows; None without any."""
    found = [(document.experts.tensor(), place) for document, place in zip(documents, places, strict=True) if document.experts]
    if not found:
        return None
    first, _ = found[0]
    routed_BSLK = torch.full((*shape, *first.shape[1:]), unrecorded(first.dtype), dtype=first.dtype)
    for experts_TLK, place in found:
        routed_BSLK[place.row, place.first : place.first + len(experts_TLK)] = experts_TLK
    return routed_BSLK


def response_values(values_BS: Tensor, documents: Sequence[Document], sequence_length: int) -> list[list[float]]:
    """Of each document the values at its response tokens; `values_BS` belong to the rows that `pack` made of the documents."""
    return [values_BS[place.response].tolist() for place in _places(documents, sequence_length)]


def pack_demonstrations(
    demonstrations: Sequence[tuple[Sequence[int], Sequence[int], Sequence[bool]]], **rows: Unpack[Rows]
) -> TrainBatch:
    """Packs (prompt ids, response ids, which of them are learned) for supervised learning; every learned token counts 1."""
    documents = [
        Document(tuple(prompt), tuple(response), (0.0,) * len(response), 0.0, tuple(learned))
        for prompt, response, learned in demonstrations
    ]
    return pack(documents, aggregation="token", **rows)


@dataclass(frozen=True)
class Place:
    """Of a document in the rows."""

    row: int
    number: int  # among the documents of the row
    first: int
    end: int
    length: int  # of the response, which stands at the end

    @property
    def document(self) -> tuple[int, slice]:
        return self.row, slice(self.first, self.end)

    @property
    def response(self) -> tuple[int, slice]:
        return self.row, slice(self.end - self.length, self.end)


def _places(documents: Sequence[Document], sequence_length: int) -> list[Place]:
    """First fit, longest first: each goes into the first row with room; equal lengths keep their order."""
    places: dict[int, Place] = {}
    used: list[tuple[int, int]] = []  # of each row: documents and positions
    for index, document in sorted(enumerate(documents), key=lambda pair: -pair[1].positions):
        if document.positions > sequence_length:
            raise UserError(
                f"a sample with {len(document.prompt_ids)} prompt and {len(document.response_ids)} response tokens does not "
                f"fit into a row of loop.sequence_length = {sequence_length}; raise it to the longest prompt + "
                "rollout.max_new_tokens, or lower rollout.max_new_tokens"
            )
        fits = (row for row, (_, filled) in enumerate(used) if filled + document.positions <= sequence_length)
        row = next(fits, len(used))
        if row == len(used):
            used.append((0, 0))
        number, first = used[row]
        end = first + document.positions
        places[index] = Place(row, number, first, end, len(document.response_ids))
        used[row] = number + 1, end
    return [places[index] for index in range(len(documents))]
