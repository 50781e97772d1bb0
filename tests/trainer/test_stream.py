"""Rows of a TokenStream: every token once an epoch, the same row however it is asked for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.errors import UserError
from launch.benchmarks.one_process import only_world
from parallel.topology import World
from tests.models import random_batch, spec, tiny_model
from trainer.batch import TrainBatch
from trainer.config.run import BalanceConfig
from trainer.step import Trainer
from trainer.stream import TokenArray, TokenStream
from trainer.worker import TrainWorker

BOS, EOS = 90, 91


def array_of(lengths: list[int]) -> TokenArray:
    """Documents whose tokens are numbered through from 100: each number occurs once."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenArray(np.arange(100, 100 + offsets[-1]).astype(np.uint32), offsets)


@st.composite
def streams(draw: st.DrawFn) -> TokenStream:
    array = array_of(draw(st.lists(st.integers(1, 12), min_size=1, max_size=12)))
    available = array.num_tokens + 2 * array.num_documents
    length = draw(st.integers(1, min(available - 1, 20)))
    return TokenStream(array, length, draw(st.integers(0, 2**40)), BOS, EOS)


@settings(max_examples=150, deadline=None)
@given(stream=streams(), epoch=st.integers(0, 3))
def test_an_epoch_has_every_token_once_but_for_the_tail(stream: TokenStream, epoch: int) -> None:
    count = stream.num_rows_per_epoch
    batch = stream.rows(epoch * count, count)
    in_place = torch.from_numpy(np.argsort(stream._epoch(epoch).rows))  # undoes the order of the rows
    inputs = [*batch.tokens_BS[in_place].flatten().tolist(), int(batch.targets_BS[in_place[-1], -1])]
    assert batch.targets_BS[in_place].flatten().tolist() == inputs[1:]
    bounds = stream.array.offsets.tolist()
    by_first = {100 + a: list(range(100 + a, 100 + b)) for a, b in itertools.pairwise(bounds)}
    place = 0
    while place < len(inputs):
        assert inputs[place] == BOS
        if place + 1 < len(inputs):
            wanted = [BOS, *by_first.pop(inputs[place + 1]), EOS]  # KeyError: a document comes twice
            assert inputs[place : place + len(wanted)] == wanted[: len(inputs) - place]
            place += len(wanted)
        else:
            place += 1
    assert stream.tokens_per_epoch - len(inputs) < stream.sequence_length


@settings(max_examples=100, deadline=None)
@given(stream=streams(), first=st.integers(0, 60), count=st.integers(1, 20), data=st.data())
def test_a_row_does_not_depend_on_how_it_is_asked_for(stream: TokenStream, first: int, count: int, data: st.DataObject) -> None:
    together = stream.rows(first, count)
    assert together.tokens_BS.shape == (count, stream.sequence_length)
    fresh = TokenStream(stream.array, stream.sequence_length, stream.seed, BOS, EOS)
    for offset in data.draw(st.permutations(range(count))):
        one = fresh.rows(first + offset, 1)
        for name in ("tokens_BS", "targets_BS", "documents_BS", "weights_BS"):
            assert torch.equal(vars(one)[name][0], vars(together)[name][offset])


@settings(max_examples=100, deadline=None)
@given(stream=streams(), first=st.integers(0, 30))
def test_documents_and_weights_follow_the_boundaries(stream: TokenStream, first: int) -> None:
    batch = stream.rows(first, 4)
    kinds = (batch.tokens_BS.dtype, batch.targets_BS.dtype, batch.documents_BS.dtype, batch.weights_BS.dtype)
    assert kinds == (torch.int64, torch.int64, torch.int32, torch.float32)
    for tokens, targets, ids, weights in zip(
        batch.tokens_BS.tolist(), batch.targets_BS.tolist(), batch.documents_BS.tolist(), batch.weights_BS.tolist(), strict=True
    ):
        assert ids[0] == 0
        starts = [int(token == BOS) for token in tokens[1:]]
        assert np.diff(ids).tolist() == starts
        assert weights == [float(token != EOS) for token in tokens]
        assert [target == BOS for target in targets] == [weight == 0 for weight in weights]


def test_shared_bos_and_eos_ids_keep_the_boundaries() -> None:
    stream = TokenStream(array_of([2, 2]), 7, 0, BOS, BOS)
    batch = stream.rows(0, 1)
    assert batch.documents_BS.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert batch.weights_BS.tolist() == [[1, 1, 1, 0, 1, 1, 1]]


def test_epochs_and_seeds_have_different_orders() -> None:
    array = array_of([5] * 50)
    stream = TokenStream(array, 16, 7, BOS, EOS)
    count = stream.num_rows_per_epoch
    epochs = [stream.rows(epoch * count, count).tokens_BS for epoch in range(3)]
    other = TokenStream(array, 16, 8, BOS, EOS).rows(0, count).tokens_BS
    assert not any(torch.equal(epochs[a], b) for a, b in ((0, epochs[1]), (1, epochs[2]), (0, other)))
    assert torch.equal(stream.rows(0, count).tokens_BS, epochs[0])  # also after its order was dropped


def test_the_rows_of_a_long_document_are_spread_over_the_epoch() -> None:
    stream = TokenStream(array_of([10] * 50 + [500]), 10, 0, BOS, EOS)
    long = [bool(tokens[5] >= 600) for tokens in stream.rows(0, stream.num_rows_per_epoch).tokens_BS]
    assert 40 < sum(long) < 55
    assert sum(a != b for a, b in itertools.pairwise(long)) > 30


def test_the_order_of_documents_never_changes_between_versions() -> None:
    stream = TokenStream(array_of([1] * 8), 23, 3, BOS, EOS)
    tokens = [token for token in stream.rows(1, 1).tokens_BS[0].tolist() if token >= 100]
    assert tokens == [105, 106, 103, 107, 100, 101, 102, 104]


def test_less_than_one_row_is_an_error() -> None:
    array = array_of([3, 4])
    TokenStream(array, 10, 0, BOS, EOS)
    with pytest.raises(UserError, match=r"has 11 tokens .*sequence_length=11 needs 12; lower sequence_length to at most 10 or"):
        TokenStream(array, 11, 0, BOS, EOS)


def test_a_batch_on_a_device_has_its_documents_on_the_host_too() -> None:
    batch = random_batch(0)
    moved = batch.to(torch.device("meta"))
    assert moved.tokens_BS.is_meta and moved.documents_BS.is_meta
    part = moved.rows(2, 5)
    assert part.tokens_BS.shape == (3, 12) and part.host_documents_BS is not None
    assert torch.equal(part.host_documents_BS, batch.documents_BS[2:5])


class Evaluated:
    """Notes what a rank is to evaluate."""

    def evaluate(self, batch: TrainBatch, token_bytes_V: Tensor) -> dict[str, Tensor]:
        return {"tokens": batch.tokens_BS, "documents": batch.documents_BS, "weights": batch.weights_BS}


@settings(max_examples=60, deadline=None)
@given(stream=streams(), size=st.integers(1, 5), rows=st.integers(1, 12))
def test_any_number_of_ranks_evaluates_the_same_rows(stream: TokenStream, size: int, rows: int) -> None:
    """Equally many each, because they exchange tokens; those of one epoch, once; what is left over is padding."""
    found = []
    for rank in range(size):
        worker: Any = TrainWorker(rank)
        worker.world, worker.held_out = World(rank, size, torch.device("cpu"), 1), stream
        worker.corpus = SimpleNamespace(tokenizer=SimpleNamespace(token_bytes=list))
        worker.trainer = Evaluated()
        found.append(worker.evaluate(rows))
    assert len({len(one["tokens"]) for one in found}) == 1
    tokens, documents, weights = (torch.cat([one[key] for one in found]) for key in ("tokens", "documents", "weights"))
    count = min(rows, stream.num_rows_per_epoch)
    alone = stream.rows(0, count)
    assert torch.equal(tokens[:count], alone.tokens_BS) and torch.equal(weights[:count], alone.weights_BS)
    assert torch.equal(documents[:count], alone.documents_BS)
    assert (documents[count:] == -1).all() and not weights[count:].any()


@pytest.mark.parametrize("router", [{"kind": "top_k"}, {"kind": "expert_choice", "most_experts": 8}])
def test_rows_of_padding_change_no_evaluation(router: dict[str, Any]) -> None:
    """In micro-batches of their own."""
    model = tiny_model(router=router, selection_bias=router["kind"] == "top_k")
    trainer = Trainer(spec(model, balance=BalanceConfig(rule="sign", rate=0.0)), only_world())
    batch, token_bytes_V = random_batch(0), torch.arange(61)
    expected = trainer.evaluate(batch.rows(0, 5), token_bytes_V)
    assert trainer.evaluate(batch.padded_from(5), token_bytes_V) == expected
