"""Rows in the memory of several ranks: the reference by definition, the kernels against the reference.

The blocks of all "ranks" lie on this device; tests/gpu/test_peer_memory.py reads those of others.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.peer_rows import pick_numbers, pull_rows, sum_rows
from kernels.peers import PeerRows

START = 48  # bytes before the rows of a block


def blocks(ranks: int, rows: int, width: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[PeerRows, list[Tensor]]:
    """Random rows of each rank, and the same as plain tensors."""
    generator = torch.Generator().manual_seed(seed)
    plain = [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(ranks)]
    found = []
    for part in plain:
        block = torch.zeros(START + part.nbytes + 16, dtype=torch.uint8)
        block[START : START + part.nbytes] = part.view(-1).view(torch.uint8)
        found.append(block.to(device))
    pointers_W = torch.tensor([block.data_ptr() for block in found], device=device)
    return PeerRows(found, pointers_W, START, width, dtype), plain


def routing(ranks: int, tokens: int, top_k: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """(rank_TK, row_WT): a row for each rank that a token names, -1 elsewhere. Some choices are absent."""
    generator = torch.Generator().manual_seed(seed)
    rank_TK = torch.randint(-(seed % 2), ranks, (tokens, top_k), generator=generator, dtype=torch.int32)
    row_WT = torch.randint(0, rows, (ranks, tokens), generator=generator, dtype=torch.int32)
    named_WT = (rank_TK.unsqueeze(0) == torch.arange(ranks).view(-1, 1, 1)).any(dim=2)
    return rank_TK, torch.where(named_WT, row_WT, -1)


@given(st.integers(1, 4), st.integers(0, 9), st.integers(1, 5), st.integers(0, 99))
def test_rows_are_pulled_summed_and_picked(ranks: int, tokens: int, top_k: int, seed: int) -> None:
    rows, plain = blocks(ranks, 6, 8, torch.float32, "cpu", seed)
    wanted_V = torch.rand(ranks * 6, generator=torch.Generator().manual_seed(seed)) < 0.5
    row_V = torch.where(wanted_V, wanted_V.cumsum(0) - 1, -1).int()
    out_RD = torch.full((int(wanted_V.sum()), 8), torch.nan)
    pull_rows(rows, row_V, out_RD)
    assert torch.equal(out_RD, torch.cat(plain)[wanted_V])
    found_RD = torch.full((len(out_RD) // 2, 8), torch.nan)  # room for some
    pull_rows(rows, row_V, found_RD)
    assert torch.equal(found_RD, out_RD[: len(found_RD)])
    rank_TK, row_WT = routing(ranks, tokens, top_k, 6, seed)
    sums_TD = sum_rows(rows, rank_TK, row_WT)
    for t in range(tokens):
        named = dict.fromkeys(rank for rank in rank_TK[t].tolist() if rank >= 0)
        wanted = sum((plain[rank][row_WT[rank, t]] for rank in named), torch.zeros(8))
        torch.testing.assert_close(sums_TD[t], wanted)
    numbers, plain = blocks(ranks, 6, top_k, torch.float32, "cpu", seed + 1)
    picked_TK = pick_numbers(numbers, rank_TK, row_WT)
    for t in range(tokens):
        for k in range(top_k):
            rank = int(rank_TK[t, k])
            assert picked_TK[t, k] == (plain[rank][row_WT[rank, t], k] if rank >= 0 else 0)


@pytest.mark.parametrize(("width", "top_k"), [(64, 8), (40, 3), (4096, 2), (6, 1)])
def test_kernels_equal_the_reference(kernel_device: str, width: int, top_k: int) -> None:
    from kernels import triton_peer_rows

    ranks, tokens, held = 3, 37, 50
    rows, plain = blocks(ranks, held, width, torch.float32, kernel_device)
    on_cpu = replace(rows, blocks=[block.cpu() for block in rows.blocks])
    wanted_V = torch.rand(ranks * held, generator=torch.Generator().manual_seed(1)) < 0.5
    row_V = torch.where(wanted_V, wanted_V.cumsum(0) - 1, -1).int()
    out_RD = torch.full((int(wanted_V.sum()), width), torch.nan, device=kernel_device)
    triton_peer_rows.launch_pull(rows, row_V.to(kernel_device), out_RD)
    assert torch.equal(out_RD.cpu(), torch.cat(plain)[wanted_V])
    found_RD = torch.full_like(out_RD[:-7], torch.nan)
    triton_peer_rows.launch_pull(rows, row_V.to(kernel_device), found_RD)
    assert torch.equal(found_RD, out_RD[:-7])
    rank_TK, row_WT = routing(ranks, tokens, top_k, held, width % 3)
    strided_WT = torch.full((ranks, tokens + 5), -1, dtype=torch.int32)
    strided_WT[:, 3 : 3 + tokens] = row_WT
    places = rank_TK.to(kernel_device), strided_WT.to(kernel_device)[:, 3 : 3 + tokens]
    found = triton_peer_rows.launch_sum(rows, *places)
    torch.testing.assert_close(found.cpu(), sum_rows(on_cpu, rank_TK, row_WT), rtol=1e-6, atol=1e-6)
    numbers, _ = blocks(ranks, held, top_k, torch.float32, kernel_device)
    on_cpu = replace(numbers, blocks=[block.cpu() for block in numbers.blocks])
    assert torch.equal(triton_peer_rows.launch_pick(numbers, *places).cpu(), pick_numbers(on_cpu, rank_TK, row_WT))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sums_on_a_gpu_are_rounded_once(dtype: torch.dtype) -> None:
    rows, _ = blocks(4, 300, 2048, dtype, "cuda")
    rank_TK, row_WT = routing(4, 500, 8, 300, 3)
    on_cpu = replace(rows, blocks=[block.cpu() for block in rows.blocks])
    found = sum_rows(rows, rank_TK.cuda(), row_WT.cuda())
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), sum_rows(on_cpu, rank_TK, row_WT))
