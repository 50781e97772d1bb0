"""Rows of a TrainBatch from samples and demonstrations."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from rl.extras import BEHAVIOUR, WHOLE
from rl.packing import Document, documents_of, pack, pack_demonstrations
from rl.trajectory import Group, Sample, Segment
from tests.rl.algorithm import algorithm_config
from trainer.batch import TrainBatch

PAD = 2
LENGTH = 16


@st.composite
def document_lists(draw: st.DrawFn) -> list[Document]:
    """Every token of all documents is a different number, so it can be found again."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 9)), min_size=1, max_size=12))
    next_token, documents = 100, []
    for prompt, response in sizes:
        ids = tuple(range(next_token, next_token + prompt + response))
        next_token += prompt + response
        logprobs = tuple(-(token % 97) / 64 for token in ids[prompt:])
        learned = draw(st.lists(st.booleans(), min_size=response, max_size=response).filter(any))
        documents.append(Document(ids[:prompt], ids[prompt:], logprobs, (ids[0] % 13) / 8 - 0.5, tuple(learned)))
    return documents


def packed(
    documents: list[Document],
    aggregation: Literal["token", "sequence", "constant"] = "token",
    multiple: int = 1,
    length: int = LENGTH,
) -> TrainBatch:
    return pack(documents, sequence_length=length, rows_multiple_of=multiple, aggregation=aggregation, pad_id=PAD)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(document_lists(), st.sampled_from(["token", "sequence", "constant"]), st.integers(1, 4))
def test_every_learned_token_is_learned_exactly_once_with_its_own_numbers(
    documents: list[Document], aggregation: Literal["token", "sequence", "constant"], multiple: int
) -> None:
    batch = packed(documents, aggregation, multiple)
    assert batch.tokens_BS.shape[1] == LENGTH and batch.num_rows % multiple == 0
    learned = batch.weights_BS > 0
    expected = {
        token: (1 / sum(document.learned) if aggregation == "sequence" else 1.0, document.advantage, logprob)
        for document in documents
        for token, logprob, learned in zip(document.response_ids, document.behaviour_logprobs, document.learned, strict=True)
        if learned
    }
    assert sorted(batch.targets_BS[learned].tolist()) == sorted(expected)
    columns = (batch.weights_BS, batch.extras["advantages"], batch.extras["behaviour_logprobs"])
    for token, *numbers in zip(batch.targets_BS[learned].tolist(), *(c[learned].tolist() for c in columns), strict=True):
        assert numbers == pytest.approx(expected[token])
    responses = torch.isin(batch.targets_BS, torch.tensor([token for d in documents for token in d.response_ids]))
    assert not batch.weights_BS[~learned].any()
    for column in columns:
        assert not column[~responses].any()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(document_lists())
def test_documents_stay_whole_in_order_and_apart(documents: list[Document]) -> None:
    batch = packed(documents, multiple=2)
    found = []
    for row in range(batch.num_rows):
        numbers = batch.documents_BS[row]
        used = numbers[numbers >= 0].tolist()
        assert used == sorted(used) and set(used) == set(range(len(set(used)))), "numbers count up along the row"
        assert (numbers[len(used) :] == -1).all(), "padding stands behind the documents"
        assert (batch.tokens_BS[row, len(used) :] == PAD).all()
        for number in set(used):
            places = numbers == number
            found.append((*batch.tokens_BS[row, places].tolist(), batch.targets_BS[row, places][-1].item()))
            assert batch.targets_BS[row, places][:-1].tolist() == batch.tokens_BS[row, places][1:].tolist()
    assert sorted(found) == sorted(document.prompt_ids + document.response_ids for document in documents)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(document_lists())
def test_sequence_aggregation_gives_every_sample_the_same_share(documents: list[Document]) -> None:
    assert packed(documents, "sequence").weights_BS.sum().item() == pytest.approx(len(documents), rel=1e-5)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(document_lists())
def test_packing_is_deterministic_and_uses_rows_well(documents: list[Document]) -> None:
    first, second = packed(documents), packed(documents)
    assert torch.equal(first.tokens_BS, second.tokens_BS) and torch.equal(first.documents_BS, second.documents_BS)
    filled = (first.documents_BS >= 0).sum(dim=1)
    assert (filled <= LENGTH // 2).sum() <= 1, "two rows that are at most half full would have been one"


def test_the_last_token_takes_no_place_and_one_more_is_an_error_with_numbers() -> None:
    ids = tuple(range(10))
    document = Document(ids[:4], ids[4:], (0.0,) * 6, 1.0, (True,) * 6)
    assert packed([document], length=9).tokens_BS.tolist() == [list(range(9))]
    with pytest.raises(UserError, match=r"4 prompt and 6 response tokens .* loop.sequence_length = 8.*max_new_tokens"):
        packed([document], length=8)


def test_samples_become_documents_with_the_advantages_of_their_group() -> None:
    def sample(uid: int, reward: float | None) -> Sample:
        first, second = Segment((uid + 10,), (-0.5,), 0), Segment((uid + 20, 1), (-0.25, -0.125), 1)
        return Sample(uid, 0, (7, 8), (first, second), "finished", reward)

    group = Group(0, tuple(sample(uid, reward) for uid, reward in enumerate((1.0, 0.0, None))))
    documents = documents_of([group], algorithm_config(advantage="dr_grpo"), weight_version=1, max_new_tokens=8)
    assert [document.advantage for document in documents] == [0.5, -0.5], "a sample without a reward is left out"
    assert documents[1] == Document((7, 8), (11, 21, 1), (-0.5, -0.25, -0.125), -0.5, (True,) * 3)
    masked = documents_of([group], algorithm_config(off_policy="mask"), weight_version=1, max_new_tokens=8)
    assert [document.learned for document in masked] == [(False, True, True)] * 2, "the first token has version 0"
    with pytest.raises(UserError, match=r"none of the samples of 1 groups .*off_policy=mask .*over_provision"):
        documents_of([group], algorithm_config(off_policy="mask"), weight_version=2, max_new_tokens=8)


def test_logprobs_of_the_whole_distribution_stand_beside_those_sampled_at_where_a_document_has_others() -> None:
    def sample(uid: int, whole: tuple[float, ...] | None) -> Sample:
        segment = Segment((uid + 10, uid + 20), (-0.5, -0.25), 0, whole_logprobs=whole)
        return Sample(uid, 0, (7, 8), (segment,), "finished", float(uid))

    for wholes in ([None, (-0.75, -0.5)], [None, None]):
        group = Group(0, tuple(sample(uid, whole) for uid, whole in enumerate(wholes)))
        batch = packed(documents_of([group], algorithm_config(), weight_version=0, max_new_tokens=8), length=6)
        assert (WHOLE in batch.extras) == any(wholes)
        for token, column in ((10, 0), (11, 0), (20, 1), (21, 1)):
            place = batch.targets_BS == token
            assert batch.extras[BEHAVIOUR][place].tolist() == [(-0.5, -0.25)[column]]
            if any(wholes):
                whole = wholes[token % 10]
                assert batch.extras[WHOLE][place].tolist() == [(whole or (-0.5, -0.25))[column]]


def test_long_answers_and_certain_groups_weigh_less_and_the_weight_sees_the_reward_of_the_task() -> None:
    """Rewards 1, 0, 0 of 3, 4 and 2 tokens; 4 tokens are allowed and the last 2 cost up to 0.5."""
    samples = tuple(
        Sample(uid, 0, (7,), (Segment((5,) * length, (-0.5,) * length, 0),), "finished", reward)
        for uid, (reward, length) in enumerate([(1.0, 3), (0.0, 4), (0.0, 2)])
    )
    config = algorithm_config(advantage="dr_grpo", overlong_margin=2, overlong_factor=0.5, uncertainty_focus=2.0)
    shaped = [1 - 0.25, 0 - 0.5, 0.0]
    mean = sum(shaped) / 3
    weight = math.exp(-2 * (1 / 3 * math.log(2 / 3) + 2 / 3 * math.log(4 / 3)))
    documents = documents_of([Group(0, samples)], config, weight_version=0, max_new_tokens=4)
    assert [document.advantage for document in documents] == pytest.approx([weight * (reward - mean) for reward in shaped])


def test_demonstrations_learn_what_they_are_told_and_not_the_prompt() -> None:
    shown = [([5, 6, 7], [8, 1], [True, True]), ([5], [9, 1], [False, True])]
    batch = pack_demonstrations(shown, sequence_length=6, rows_multiple_of=2, pad_id=PAD)
    assert batch.tokens_BS.tolist() == [[5, 6, 7, 8, 5, 9], [PAD] * 6]
    assert batch.targets_BS.tolist() == [[6, 7, 8, 1, 9, 1], [PAD] * 6]
    assert batch.weights_BS.tolist() == [[0, 0, 1, 1, 0, 1], [0] * 6]
    assert batch.documents_BS.tolist() == [[0, 0, 0, 0, 1, 1], [-1] * 6]
