"""Weights on their way to the engines keep every bit."""

from __future__ import annotations

import pickle

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import tiny_model
from trainer.model.transformer import LanguageModel
from trainer.weights import pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6))
def test_any_tensors_come_back_bit_for_bit(kinds: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = {f"t{i}": (torch.randn(shape) * 100).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    found = unpack(pickle.loads(pickle.dumps(pack(tensors), protocol=5)))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_tensors_that_are_not_contiguous_are_packed_in_their_order() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(unpack(pack({"t": tensor}))["t"], tensor)


def test_a_model_is_loaded_from_a_block() -> None:
    model = LanguageModel.initialize(tiny_model(), 1)
    other = LanguageModel.initialize(tiny_model(), 2)
    other.load_state(unpack(pack(model.state())))
    for name, tensor in model.state().items():
        assert torch.equal(other.state()[name], tensor), name
