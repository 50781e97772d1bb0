"""What several ranks chose, read in place: the plan by definition, and the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.peer_routing import lay_out, plan_rows
from kernels.peers import HEADER, LANE_BYTES, PeerChoices, PeerRows, RowPlan

Laid = tuple[Tensor, Tensor, Tensor]  # rank_TK, experts_TK, weights_TK of one rank


def drawn(ranks: int, tokens: list[int], top_k: int, experts: int, seed: int) -> list[Laid]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(-(seed % 2), ranks, (count, top_k), generator=generator, dtype=torch.int32),  # -1: absent
            torch.randint(0, experts, (count, top_k), generator=generator),
            torch.rand(count, top_k, generator=generator),
        )
        for count in tokens
    ]


WIDTH = 20  # of the tokens behind the choices


def room_for(ranks: int, capacity: int, top_k: int, device: str = "cpu") -> tuple[PeerChoices, PeerRows]:
    """Blocks full of garbage."""
    nbytes = PeerChoices((), torch.empty(0), capacity, top_k).nbytes
    start = -(-nbytes // LANE_BYTES) * LANE_BYTES
    blocks = [torch.randint(0, 255, (start + 4 * WIDTH * capacity + 32,), dtype=torch.uint8).to(device) for _ in range(ranks)]
    pointers_W = torch.tensor([block.data_ptr() for block in blocks], device=device)
    return PeerChoices(blocks, pointers_W, capacity, top_k), PeerRows(blocks, pointers_W, start, WIDTH, torch.float32)


def tokens_of(laid: Laid) -> Tensor:
    """Rows that are not adjacent."""
    return torch.rand(laid[0].shape[0], 2 * WIDTH, generator=torch.Generator().manual_seed(3))[:, :WIDTH]


def laid_out(laid: list[Laid], capacity: int, top_k: int, device: str = "cpu") -> PeerChoices:
    choices, rows = room_for(len(laid), capacity, top_k, device)
    for rank, parts in enumerate(laid):
        fits = lay_out(choices, rows, rank, *(part.to(device) for part in parts), tokens_of(parts).to(device))
        assert fits == (parts[0].shape[0] <= capacity)
    return choices


@pytest.mark.parametrize(("tokens", "top_k"), [(5, 3), (9, 1), (0, 2)])
def test_the_kernel_lays_out_what_the_reference_does_and_nothing_else(
    kernel_device: str, tokens: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels import launches, triton_peer_routing

    monkeypatch.setattr(launches, "BLOCK_D", 16)  # so that a token takes two programs
    (laid,) = drawn(1, [tokens], top_k, 6, 1)
    choices, rows = room_for(1, 9, top_k)
    there = choices.blocks[0].to(kernel_device, copy=True)
    pointers_W = torch.tensor([there.data_ptr()], device=kernel_device)
    copied = PeerChoices([there], pointers_W, 9, top_k), PeerRows([there], pointers_W, rows.start, WIDTH, torch.float32)
    assert lay_out(choices, rows, 0, *laid, tokens_of(laid))
    parts = [part.to(kernel_device) for part in (*laid, tokens_of(laid))]
    triton_peer_routing.launch_lay_out(*copied, 0, *parts)
    assert torch.equal(there.cpu(), choices.blocks[0])
    numbers = choices.of_rank[0]
    assert int(numbers[0]) == tokens and torch.equal(rows.of_rank[0][:tokens], tokens_of(laid))
    ranks_TK, experts_TK, weights_TK = numbers[HEADER:].view(3, 9, top_k)[:, :tokens]
    assert torch.equal(ranks_TK, laid[0]) and torch.equal(experts_TK, laid[1].int())
    assert torch.equal(weights_TK.view(torch.float32), laid[2])


def check(plan: RowPlan, laid: list[Laid], capacity: int, index_E: Tensor, here: int) -> None:
    most, entries, *rows_W = plan.numbers.tolist()
    assert most == max(rank_TK.shape[0] for rank_TK, _, _ in laid)
    assert entries == sum(int((rank_TK == here).sum()) for rank_TK, _, _ in laid)
    next_row = [0] * len(laid)
    for source, (rank_TK, experts_TK, weights_TK) in enumerate(laid):
        for t in range(capacity):
            names = set(rank_TK[t].tolist()) if t < rank_TK.shape[0] else set()
            for rank in range(len(laid)):
                row = int(plan.row_WV[rank, source * capacity + t])
                assert row == (next_row[rank] if rank in names else -1)
                if rank in names and rank == here:
                    served_K = rank_TK[t] == here
                    assert torch.equal(plan.slots_VK[row].cpu(), torch.where(served_K, index_E[experts_TK[t]], -1))
                    assert torch.equal(plan.weights_VK[row].cpu()[served_K], weights_TK[t, served_K])
                next_row[rank] += rank in names
    assert rows_W == next_row
    assert (plan.slots_VK[rows_W[here] :] == -1).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_every_token_has_a_row_where_it_is_served(tokens: list[int], top_k: int, experts: int, seed: int) -> None:
    laid = drawn(len(tokens), tokens, top_k, experts, seed)
    index_E = torch.randperm(experts, generator=torch.Generator().manual_seed(seed)).int()
    here = seed % len(tokens)
    check(plan_rows(laid_out(laid, 9, top_k), index_E, here), laid, 9, index_E, here)


def with_too_many(device: str) -> PeerChoices:
    """Rank 1 has 12 tokens, where there is room for 9: what lies there names this rank, and experts that nobody has."""
    choices = laid_out(drawn(2, [3, 12], 2, 4, 0), 9, 2, device)
    numbers = choices.of_rank[1]
    numbers[HEADER : HEADER + 9 * 2], numbers[HEADER + 9 * 2 : HEADER + 2 * 9 * 2] = 0, 2**30
    return choices


def test_too_many_tokens_are_told_of_and_their_choices_not_read() -> None:
    assert int(plan_rows(with_too_many("cpu"), torch.arange(4).int(), 0).numbers[0]) == 12


def test_the_kernels_do_not_read_choices_that_are_not_there(kernel_device: str) -> None:
    from kernels.triton_peer_routing import launch_plan

    plan = launch_plan(with_too_many(kernel_device), torch.arange(4, device=kernel_device).int(), 0)
    assert int(plan.numbers[0]) == 12
    assert plan.slots_VK.min() >= -1 and plan.slots_VK.max() < 4
    assert (plan.row_WV[:, 9:] == -1).all()


@pytest.mark.parametrize(("tokens", "top_k"), [([300, 0, 171], 8), ([5], 3), ([129, 128], 1)])
def test_kernels_equal_the_reference(kernel_device: str, tokens: list[int], top_k: int) -> None:
    from kernels.triton_peer_routing import launch_plan

    laid, capacity = drawn(len(tokens), tokens, top_k, 16, 1), max(tokens) + 7
    index_E = torch.randperm(16, generator=torch.Generator().manual_seed(2)).int()
    choices = laid_out(laid, capacity, top_k, kernel_device)
    for here in range(len(tokens)):
        check(launch_plan(choices, index_E.to(kernel_device), here), laid, capacity, index_E, here)


def test_counts_of_more_blocks_than_are_added_at_once(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import triton_peer_routing

    monkeypatch.setattr(triton_peer_routing, "CHUNK", 4)
    laid, index_E = drawn(3, [300, 0, 300], 2, 5, 1), torch.arange(5).int()
    choices = laid_out(laid, 300, 2, kernel_device)
    check(triton_peer_routing.launch_plan(choices, index_E.to(kernel_device), 2), laid, 300, index_E, 2)
