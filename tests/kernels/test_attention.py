"""Ragged and paged attention: by definition, and the same bits for a query however its sequence is cut up and stored."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kernels.attention import attend, attend_pages
from kernels.ragged import PAGE_TOKENS, Ragged, ragged

CPU = torch.device("cpu")
SHAPES = [(4, 2, 32), (3, 3, 16), (8, 1, 24)]  # H, G, d


def tensors(counts: list[int], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    heads, groups, size = shape
    generator = torch.Generator().manual_seed(sum(counts))
    sizes = [(sum(counts), number, size) for number in (heads, groups, groups)]
    return [torch.randn(*each, generator=generator).to(device, dtype) for each in sizes]


def by_definition(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, counts: list[int]) -> Tensor:
    outs = []
    for q, k, v in zip(q_THd.split(counts), k_TGd.split(counts), v_TGd.split(counts), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        outs.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


def some_queries_of_pages(
    counts: list[int], k_TGd: Tensor, v_TGd: Tensor, shared: int, random: Random
) -> tuple[Tensor, Tensor, Tensor, Ragged]:
    """(chosen queries, key pages, value pages, spans): the last few queries up to some point of each sequence."""
    device = k_TGd.device
    page = PAGE_TOKENS[device.type]
    pages = [-(-count // page) for count in counts]
    order = random.sample(range(sum(pages) + 3), sum(pages))
    keys, values = (torch.full((sum(pages) + 3, page, *k_TGd.shape[1:]), 7.0, dtype=k_TGd.dtype, device=device) for _ in "kv")
    table = torch.zeros(len(counts), max(pages), dtype=torch.int32)
    chosen, numbers, lengths, first = [], [], [], 0
    for index, count in enumerate(counts):
        own, order = order[: pages[index]], order[pages[index] :]
        table[index, : len(own)] = torch.tensor(own)
        places = torch.tensor([own[place // page] * page + place % page for place in range(count)], device=device)
        keys.flatten(0, 1)[places] = k_TGd[first : first + count]
        values.flatten(0, 1)[places] = v_TGd[first : first + count]
        lengths.append(random.randint(1, count))
        numbers.append(random.choice([1, random.randint(1, lengths[-1])]))
        chosen += range(first + lengths[-1] - numbers[-1], first + lengths[-1])
        first += count
    return torch.tensor(chosen, device=device), keys, values, ragged(numbers, lengths, table.to(device), shared, device)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.sampled_from(SHAPES), st.randoms(use_true_random=False))
def test_a_querys_bits_do_not_depend_on_how_its_sequence_is_cut_up(
    counts: list[int], shape: tuple[int, int, int], random: Random
) -> None:
    q, k, v = tensors(counts, shape, CPU, torch.float32)
    shared = shape[0] // shape[1]
    whole = attend(q, k, v, ragged(counts, counts, None, shared, CPU))
    torch.testing.assert_close(whole, by_definition(q, k, v, counts), rtol=1e-4, atol=1e-5)
    chosen, keys, values, spans = some_queries_of_pages(counts, k, v, shared, random)
    assert torch.equal(attend_pages(q[chosen], keys, values, spans), whole[chosen])


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_definition(shape: tuple[int, int, int]) -> None:
    counts = [5, 1, 20]
    leaves = [x.requires_grad_() for x in tensors(counts, shape, CPU, torch.float64)]
    got = attend(*leaves, ragged(counts, counts, None, shape[0] // shape[1], CPU))
    upstream = torch.randn_like(got)
    expected = torch.autograd.grad(by_definition(*leaves, counts), leaves, upstream)
    for left, right in zip(torch.autograd.grad(got, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter: -inf less -inf in rows that are padding
@pytest.mark.parametrize("shape", [(4, 2, 32), (8, 1, 24)])
def test_the_kernel_follows_the_definition(kernel_device: str, shape: tuple[int, int, int]) -> None:
    from kernels.triton_attention import launch_attention

    counts, device = [70, 1, 9], torch.device(kernel_device)
    q, k, v = tensors(counts, shape, device, torch.float32)
    out, log_sums = launch_attention(q, k, v, ragged(counts, counts, None, shape[0] // shape[1], device))
    torch.testing.assert_close(out, by_definition(q, k, v, counts), rtol=1e-4, atol=1e-5)
    scores = (q[-9:, 0] @ k[-9:, 0].T / shape[2] ** 0.5).masked_fill(torch.ones(9, 9, device=device).triu(1) > 0, -torch.inf)
    torch.testing.assert_close(log_sums[0, -9:], scores.logsumexp(-1), rtol=1e-4, atol=1e-5)


def test_keys_and_values_go_to_their_places(kernel_device: str) -> None:
    from kernels.triton_attention import launch_put

    k, v = (numbers.to(kernel_device) for numbers in torch.randn(2, 5, 3, 24))
    k, v = k[..., ::2], v.flip(1)
    v = torch.cat([v, v], dim=1)[:, 1:4, :12]
    places = torch.tensor([7, 0, 31, 12, 8], device=kernel_device)
    keys, values = torch.zeros(2, 4, 8, 3, 12, device=kernel_device)
    launch_put(k, v, places, keys, values)
    for pages, tokens in ((keys, k), (values, v)):
        expected = torch.zeros(32, 3, 12, device=kernel_device)
        expected[places] = tokens
        assert torch.equal(pages.flatten(0, 1), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(16, 8, 64), (32, 4, 128), (4, 4, 32), (24, 2, 96)])
def test_on_a_gpu_packed_rows_chunks_and_pages_give_the_same_bits(shape: tuple[int, int, int]) -> None:
    cuda, random = torch.device("cuda"), Random(0)
    for _ in range(5):
        counts = [random.randint(1, 700) for _ in range(9)]
        q, k, v = tensors(counts, shape, cuda, torch.bfloat16)
        shared = shape[0] // shape[1]
        spans = ragged(counts, counts, None, shared, cuda)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        whole = attend(*leaves, spans)
        wide = [x.float().requires_grad_() for x in (q, k, v)]
        expected = by_definition(*wide, counts)
        assert (whole - expected).abs().max() < 0.03
        upstream = torch.randn_like(whole)
        gradients = torch.autograd.grad(whole, leaves, upstream)
        for left, right in zip(gradients, torch.autograd.grad(expected, wide, upstream.float()), strict=True):
            assert (left - right).norm() < 0.01 * right.norm()
        chosen, keys, values, some = some_queries_of_pages(counts, k, v, shared, random)
        assert torch.equal(attend_pages(q[chosen], keys, values, some), whole[chosen])
