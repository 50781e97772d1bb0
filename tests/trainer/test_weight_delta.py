"""Deltas of weights lose no bit and are small; an engine that gets them holds what one with all weights holds."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import tiny_model
from trainer import weight_delta
from trainer.config.rl import SyncConfig
from trainer.model.transformer import LanguageModel
from trainer.weight_delta import WeightDelta, apply, bits, decode, difference, encode
from trainer.weight_sync import WeightSource, WeightUpdate
from trainer.weights import PackedTensors, digests, pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
SPECIAL = {  # as bits of bfloat16: both zeros, infinities, three NaNs, the smallest subnormal
    "zero": 0x0000,
    "-zero": -0x8000,
    "inf": 0x7F80,
    "-inf": -0x80,
    "quiet nan": 0x7FC0,
    "nan with a payload": 0x7FC1,
    "signalling nan": 0x7F81,
    "subnormal": 0x0001,
}
Shapes = list[tuple[torch.dtype, list[int]]]
tensors = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 7), max_size=3)), min_size=1, max_size=6)


def random_bits(dtype: torch.dtype, shape: list[int], generator: torch.Generator) -> Tensor:
    """Any bits at all, NaNs among them; of booleans only the two that exist."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = torch.tensor([], dtype=dtype).element_size()
    return torch.randint(0, 256, (int(np.prod(shape)) * size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def changed(tensor: Tensor, share: float, generator: torch.Generator) -> Tensor:
    other = random_bits(tensor.dtype, list(tensor.shape), generator)
    return torch.where(torch.rand(tensor.shape, generator=generator) < share, other, tensor)


def same_bits(left: PackedTensors, right: PackedTensors) -> bool:
    return left.layout == right.layout and bool(np.array_equal(left.data, right.data))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tensors, st.sampled_from([0.0, 0.02, 0.3, 1.0]), st.integers(0, 2**31), st.integers(1, 40))
def test_a_delta_gives_the_new_bits(kinds: Shapes, share: float, seed: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = {f"t{i}": random_bits(dtype, shape, generator) for i, (dtype, shape) in enumerate(kinds)}
    new = {name: changed(tensor, share, generator) for name, tensor in old.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_delta, "CHUNK", chunk)
        delta = difference(pack(old), pack(new), base=3)
    count = sum(len(part.values) for part in delta.changes)
    assert delta.changed_share == count / max(1, sum(t.numel() for t in old.values()))
    received = {name: tensor.clone() for name, tensor in old.items()}
    apply(pickle.loads(pickle.dumps(delta, protocol=5)), received)
    assert same_bits(pack(received), pack(new))
    assert delta.nbytes <= 1.2 * sum(part.values.nbytes + 4 * len(part.values) for part in delta.changes)


def test_bits_decide_and_not_numbers() -> None:
    """Every special number turns into every other, and none that stays is sent."""
    patterns = torch.tensor(list(SPECIAL.values()), dtype=torch.int32).to(torch.int16)
    for pattern in patterns:
        old, new = (
            {"t": torch.full((8,), int(pattern), dtype=torch.int16).view(torch.bfloat16)},
            {"t": patterns.view(torch.bfloat16)},
        )
        delta = difference(pack(old), pack(new), base=0)
        assert len(delta.changes[0].values) == len(SPECIAL) - 1
        apply(delta, old)
        assert torch.equal(bits(old["t"]), patterns)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 2**33), max_size=60))
def test_positions_come_back_in_no_more_than_four_bytes_each(found: set[int]) -> None:
    positions = np.array(sorted(found), dtype=np.int64)
    encoded = encode(positions)
    assert np.array_equal(decode(encoded), positions)
    assert encoded.nbytes <= 4 * len(positions) + 8  # gaps of more than 2^32 - 1 take another number


@pytest.mark.parametrize(("share", "most"), [(0.001, 2.01), (0.01, 1.15), (0.1, 1.01), (1.0, 1.0)])
def test_a_position_takes_few_bytes(share: float, most: float) -> None:
    positions = (torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) < share).nonzero().squeeze(1).numpy()
    assert encode(positions).nbytes <= most * len(positions)


def test_another_dtype_of_the_same_size_is_refused() -> None:
    delta = difference(pack({"t": torch.zeros(3, dtype=torch.bfloat16)}), pack({"t": torch.ones(3, dtype=torch.bfloat16)}), 0)
    with pytest.raises(AssertionError, match=r"t is torch.float16, its changes are bfloat16"):
        apply(delta, {"t": torch.zeros(3, dtype=torch.float16)})


# ---------------------------------------------------------------- hashes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tensors, st.integers(0, 2**31), st.data())
def test_one_bit_changes_the_hash_of_its_tensor_and_no_other(kinds: Shapes, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = {f"t{i}": random_bits(dtype, shape, generator) for i, (dtype, shape) in enumerate(kinds)}
    before = digests(found)
    assert digests({name: tensor.clone() for name, tensor in found.items()}) == before
    full = [name for name, tensor in found.items() if tensor.numel()]
    if full:
        name = data.draw(st.sampled_from(full))
        flat = found[name].view(-1).view(torch.uint8)
        flat[data.draw(st.integers(0, len(flat) - 1))] ^= 1
        assert {other for other, digest in digests(found).items() if digest != before[other]} == {name}


def test_a_hash_knows_dtype_and_shape_and_the_order_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros(2, 6)
    kinds = [zeros, zeros.view(6, 2), zeros.view(torch.int32), torch.zeros(2, 7)]
    assert len({digests({"t": kind})["t"] for kind in kinds}) == len(kinds)
    assert digests({"t": torch.arange(6.0).view(2, 3).t()}) == digests({"t": torch.tensor([[0.0, 3], [1, 4], [2, 5]])})
    monkeypatch.setattr("trainer.weights.DIGEST_BYTES", 16)
    order = torch.arange(24.0)
    assert digests({"t": order}) != digests({"t": torch.cat([order[4:8], order[:4], order[8:]])}), "pieces have an order"


# ---------------------------------------------------------------- the sender


def blocks(count: int, share: float = 0.05) -> list[PackedTensors]:
    """Versions of the same tensors, each a little different from the one before."""
    generator = torch.Generator().manual_seed(1)
    state = {"a": torch.randn(40, 5, generator=generator).to(torch.bfloat16), "b": torch.randn(30, generator=generator)}
    found = []
    for _ in range(count):
        found.append(pack(state))
        state = {name: changed(tensor, share, generator) for name, tensor in state.items()}
    return found


def config(anchor_every: int, check: bool = False) -> SyncConfig:
    return SyncConfig(transport="store", anchor_every=anchor_every, check=check)


def test_the_first_update_and_every_anchor_are_whole_and_the_others_are_changes() -> None:
    source = WeightSource()
    updates = [source.update(block, version, config(3)) for version, block in enumerate(blocks(8), start=5)]
    assert [isinstance(update.weights, WeightDelta) for update in updates] == [False, True, True] * 2 + [False, True]
    assert [update.weights.base for update in updates if isinstance(update.weights, WeightDelta)] == [5, 6, 8, 9, 11]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.floats(0, 0.4), st.lists(st.booleans(), min_size=8, max_size=8))
def test_whole_and_changed_weights_give_the_same_bits_also_after_restarts_of_the_receiver(
    anchor_every: int, share: float, restarts: list[bool]
) -> None:
    source, held, since_anchor = WeightSource(), dict[str, Tensor](), list[WeightUpdate]()
    for number, (block, restart) in enumerate(zip(blocks(8, share), restarts, strict=True)):
        update = source.update(block, number, config(anchor_every))
        since_anchor = [*since_anchor, update] if isinstance(update.weights, WeightDelta) else [update]
        for one in since_anchor if restart else [update]:
            if isinstance(one.weights, WeightDelta):
                apply(one.weights, held)
            else:
                held = {name: tensor.clone() for name, tensor in unpack(one.weights).items()}
        assert update.version == number and same_bits(pack(held), block)


def test_where_everything_changes_all_weights_are_smaller() -> None:
    source = WeightSource()
    first, second = blocks(2, share=1.0)
    source.update(first, 0, config(9))
    assert isinstance(source.update(second, 1, config(9)).weights, PackedTensors)


def test_a_model_of_changes_is_the_model() -> None:
    """Of a real model after a small step, tied embeddings and the float32 bias included."""
    model = LanguageModel.initialize(tiny_model(), 1).to(torch.device("cpu"), torch.bfloat16)
    other = LanguageModel.initialize(tiny_model(), 1).to(torch.device("cpu"), torch.bfloat16)
    old = pack(model.state())
    for tensor in model.state().values():
        tensor += 1e-4
    delta = difference(old, pack(model.state()), base=0)
    assert 0 < delta.changed_share < 0.7
    apply(delta, other.state())
    assert same_bits(pack(other.state()), pack(model.state()))
