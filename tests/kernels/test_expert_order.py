"""The order of entries by expert: the reference against Python's sort, the kernels against the reference."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.errors import UserError
from kernels.expert_order import TILE_ROWS, ExpertOrder, expert_order, most_tiles
from tests.kernels.capture import captured

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CASES = {  # name: (tokens, top_k, experts, experts in use)
    "one entry": (1, 1, 1, 1),
    "fewer entries than experts": (3, 2, 16, 16),
    "spans of one chunk": (150, 2, 5, 5),
    "empty experts": (100, 4, 40, 7),
    "all tokens to one expert": (300, 1, 4, 1),
    "more experts than a tile of slots": (120, 2, 130, 130),
    "as many experts as there may be": (40, 8, 1024, 1024),
    "no tokens": (0, 3, 5, 5),
}


def choices(tokens: int, top_k: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randint(0, experts, (tokens, top_k), generator=torch.Generator().manual_seed(seed))


def thinned(experts_TK: Tensor, share: float, seed: int = 0) -> tuple[Tensor, int]:
    """With about `share` of the entries absent, and some tokens wholly; and how many are left."""
    generator = torch.Generator().manual_seed(seed)
    absent_TK = torch.rand(experts_TK.shape, generator=generator) < share
    absent_TK |= torch.rand(experts_TK.shape[0], 1, generator=generator) < share / 2
    return experts_TK.masked_fill(absent_TK, -1), int((~absent_TK).sum())


def with_kernels(experts_TK: Tensor, num_experts: int) -> ExpertOrder:
    from kernels.triton_expert_order import order_with_kernels

    present = int((experts_TK >= 0).sum())
    return ExpertOrder(*order_with_kernels(experts_TK, num_experts, present, most_tiles(present, num_experts), TILE_ROWS))


def assert_equal(found: ExpertOrder, expected: ExpertOrder) -> None:
    for field in fields(ExpertOrder):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=0, atol=0, msg=lambda text, at=field.name: f"{at}: {text}")


@given(st.integers(0, 200), st.integers(1, 4), st.integers(1, 8), st.integers(0, 100))
def test_entries_are_sorted_by_expert_then_token(tokens: int, top_k: int, experts: int, seed: int) -> None:
    chosen = choices(tokens, top_k, experts, seed)
    order = expert_order(chosen, experts)
    entries = sorted((int(expert), entry) for entry, expert in enumerate(chosen.flatten()))
    counts = [sum(expert == e for expert, _ in entries) for e in range(experts)]
    assert order.entry_N.tolist() == [entry for _, entry in entries]
    assert [entries[place][1] for place in order.place_N.tolist()] == list(range(len(entries)))
    assert order.counts_E.tolist() == counts
    assert order.ends_E.tolist() == [sum(counts[: e + 1]) for e in range(experts)]
    assert order.by_load_E.tolist() == sorted(range(experts), key=lambda e: (-counts[e], e))


@given(st.integers(0, 200), st.integers(1, 4), st.integers(1, 8), st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.integers(0, 100))
def test_absent_entries_are_left_out(tokens: int, top_k: int, experts: int, share: float, seed: int) -> None:
    chosen, present = thinned(choices(tokens, top_k, experts, seed), share, seed)
    order = expert_order(chosen, experts, num_entries=present)
    entries = [entry for _, entry in sorted((int(e), entry) for entry, e in enumerate(chosen.flatten()) if e >= 0)]
    assert order.entry_N.tolist() == entries
    places = {entry: place for place, entry in enumerate(entries)}
    assert order.place_N.tolist() == [places.get(entry, -1) for entry in range(tokens * top_k)]
    kept = expert_order(chosen[chosen >= 0].unsqueeze(1), experts)
    for name in ("counts_E", "ends_E", "tile_expert_M", "tile_row_M", "num_tiles", "by_load_E"):
        assert torch.equal(getattr(order, name), getattr(kept, name)), name


@given(st.integers(0, 600), st.integers(1, 3), st.integers(1, 6), st.integers(0, 100))
def test_tiles_cover_every_expert_in_order(tokens: int, top_k: int, experts: int, seed: int) -> None:
    order = expert_order(choices(tokens, top_k, experts, seed), experts)
    expected, start = [], 0
    for expert, count in enumerate(order.counts_E.tolist()):
        expected += [(expert, start + row) for row in range(0, count, TILE_ROWS)]
        start += count
    assert order.num_tiles.tolist() == [len(expected)]
    tail = [(-1, -1)] * (most_tiles(tokens * top_k, experts) - len(expected))
    assert list(zip(order.tile_expert_M.tolist(), order.tile_row_M.tolist(), strict=True)) == expected + tail


def test_too_many_entries_for_32_bits_are_refused() -> None:
    experts_TK = torch.zeros(1, dtype=torch.int64).expand(2**30, 2)
    with pytest.raises(UserError, match=r"1073741824 tokens x top_k=2 are 2147483648 entries.*at most 1073741823 tokens"):
        expert_order(experts_TK, 4)


def test_what_the_caller_says_of_the_entries_is_checked() -> None:
    chosen = torch.tensor([[0, -1], [1, 2]])
    with pytest.raises(AssertionError, match="3 entries are present, the caller says 4"):
        expert_order(chosen, 3)
    with pytest.raises(AssertionError, match="3 entries are present, the caller says 2"):
        expert_order(chosen, 3, num_entries=2)
    with pytest.raises(AssertionError, match="expert 2, but there are 2"):
        expert_order(chosen, 2, num_entries=3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("few", [0, 4096])
def test_kernels_equal_the_reference(name: str, few: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.triton_expert_order.FEW", few)
    tokens, top_k, experts, used = CASES[name]
    chosen = choices(tokens, top_k, used)
    assert_equal(with_kernels(chosen.to(kernel_device), experts), expert_order(chosen, experts))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("few", [0, 4096])
def test_kernels_leave_absent_entries_out(
    name: str, few: int, share: float, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.triton_expert_order.FEW", few)
    tokens, top_k, experts, used = CASES[name]
    chosen, present = thinned(choices(tokens, top_k, used), share)
    expected = expert_order(chosen, experts, num_entries=present)
    assert_equal(with_kernels(chosen.to(kernel_device), experts), expected)
    assert_equal(with_kernels(chosen.int().to(kernel_device), experts), expected)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_kernels_leave_absent_entries_out_whatever_top_k(top_k: int, kernel_device: str) -> None:
    chosen, present = thinned(choices(70, top_k, 9), 0.5)
    first = with_kernels(chosen.to(kernel_device), 9)
    assert_equal(first, expert_order(chosen, 9, num_entries=present))
    assert_equal(with_kernels(chosen.to(kernel_device), 9), first)


def test_kernels_add_over_many_long_spans(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.triton_expert_order.FEW", 0)
    monkeypatch.setattr("kernels.triton_expert_order.MAX_SPANS", 7)  # of two chunks
    monkeypatch.setattr("kernels.triton_expert_order.SPANS", 4)
    chosen, present = thinned(choices(400, 4, 9), 0.2)
    assert_equal(with_kernels(chosen.to(kernel_device), 9), expert_order(chosen, 9, num_entries=present))


def test_kernels_place_no_entry_past_the_number_that_they_were_told(kernel_device: str) -> None:
    from kernels.triton_expert_order import order_with_kernels

    chosen = choices(100, 2, 4)
    entry_N, place_N, *_ = order_with_kernels(chosen.to(kernel_device), 4, 50, most_tiles(200, 4), TILE_ROWS)
    expected = expert_order(chosen, 4)
    assert torch.equal(entry_N.cpu(), expected.entry_N[:50])
    assert torch.equal(place_N.cpu(), expected.place_N.where(expected.place_N < 50, -1))


def test_kernels_keep_experts_out_of_range_within_bounds(kernel_device: str) -> None:
    chosen = torch.tensor([[-5, 2], [7, 1], [2**40, 0]])
    assert_equal(with_kernels(chosen.to(kernel_device), 3), expert_order(chosen.clamp(-1, 2), 3, num_entries=5))


@gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [8192, 32768, 8191])
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (1024, 3), (60, 4), (8, 2)])
def test_many_entries_on_a_gpu(tokens: int, experts: int, top_k: int) -> None:
    chosen = (torch.randn(tokens, top_k, generator=torch.Generator().manual_seed(1)).abs() * experts / 3).long() % experts
    assert_equal(expert_order(chosen.cuda(), experts), expert_order(chosen, experts))
    some, present = thinned(chosen, 0.5)
    found = expert_order(some.cuda(), experts, num_entries=present)
    assert_equal(found, expert_order(some, experts, num_entries=present))


@gpu
@needs_gpu
def test_a_gpu_does_not_wait_and_replays_in_a_graph() -> None:
    static = choices(1000, 4, 32).cuda()
    graph, order = captured(lambda: expert_order(static, 32))
    for seed in (5, 6):
        chosen = choices(1000, 4, 32, seed)
        static.copy_(chosen)
        graph.replay()
        assert_equal(order, expert_order(chosen, 32))
