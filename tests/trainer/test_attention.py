"""Attention over packed rows: every document by itself, whichever kernel the rows take, on a CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from trainer.model.attention import PackedAttention, document_lengths

CPU = torch.device("cpu")
ROWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)  # lengths of each row's documents


def documents_of(rows: list[list[int]], padded: bool) -> Tensor:
    """Rows of the longest's length; what is left of a row is padding, or its last document."""
    length = max(sum(row) for row in rows)
    documents_BS = torch.full((len(rows), length), -1, dtype=torch.int32)
    for number, row in enumerate(rows):
        of_token = torch.arange(len(row)).repeat_interleave(torch.tensor(row))
        documents_BS[number, : len(of_token)] = of_token
        if not padded:
            documents_BS[number, len(of_token) :] = of_token[-1]
    return documents_BS


def attended(
    documents_BS: Tensor, heads: int, groups: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs and gradients of queries, keys and values, of tokens that are no padding; the same, document by document)."""
    generator = torch.Generator().manual_seed(int(documents_BS.sum()))
    shapes = [(*documents_BS.shape, number, size) for number in (heads, groups, groups, heads)]
    *parts, pull_BSHd = (torch.randn(shape, generator=generator) for shape in shapes)
    pull_BSHd[documents_BS < 0] = 0.0
    leaves = [part.to(device, dtype).requires_grad_() for part in parts]
    attend = PackedAttention(documents_BS, device)
    out_BSHd = attend(0, *(leaf.transpose(1, 2) for leaf in leaves)).transpose(1, 2)
    found = [out_BSHd, *torch.autograd.grad(out_BSHd, leaves, pull_BSHd.to(device, dtype))]

    exact = [leaf.detach().cpu().float().requires_grad_() for leaf in leaves]
    lengths = document_lengths(documents_BS)
    pieces = zip(*(part.flatten(0, 1).split(lengths) for part in exact), strict=True)
    each = [[x.transpose(0, 1)[None] for x in piece] for piece in pieces]
    outs = [functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in each]
    whole = torch.cat([out[0].transpose(0, 1) for out in outs]).view_as(pull_BSHd)
    wanted = [whole, *torch.autograd.grad(whole, exact, pull_BSHd)]
    real_BS = documents_BS >= 0
    return [x.detach().cpu().float()[real_BS] for x in found], [x.detach()[real_BS] for x in wanted]


@settings(deadline=None, max_examples=40)
@given(ROWS, st.booleans(), st.sampled_from([(4, 2), (3, 3), (4, 1)]))
def test_a_document_sees_nothing_of_others(rows: list[list[int]], padded: bool, heads: tuple[int, int]) -> None:
    documents_BS = documents_of(rows, padded)
    found, wanted = attended(documents_BS, *heads, 8, CPU, torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_rows_end_ends_a_document() -> None:
    assert document_lengths(torch.tensor([[4, 4, 7, -1], [-1, -1, 0, 0], [0, 0, 0, 0]])) == [2, 1, 1, 2, 2, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [[[700], [700]], [[1, 300, 17, 512], [64, 64, 701], [830]]])
def test_on_a_gpu_it_is_as_exact_as_its_numbers(rows: list[list[int]], dtype: torch.dtype) -> None:
    for heads, groups, size in ((32, 4, 128), (16, 8, 64), (6, 6, 32)):
        for padded in (False, True):
            documents_BS = documents_of(rows, padded)
            found, wanted = attended(documents_BS, heads, groups, size, torch.device("cuda"), dtype)
            for one, other in zip(found, wanted, strict=True):
                assert (one - other).norm() < {torch.bfloat16: 6e-3, torch.float32: 1e-5}[dtype] * other.norm()
