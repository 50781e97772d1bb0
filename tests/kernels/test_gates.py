"""Logits of noisy and cosine routers against plain formulas, their gradients, and the numbers that noise is made of."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from kernels.gates import cosine_logits, directions, noisy_logits
from kernels.random_bits import normal_numbers
from kernels.router import route


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(tokens=st.integers(0, 9), experts=st.integers(2, 9), seed=st.integers(0, 99), data=st.data())
def test_noisy_top_k_weighs_as_the_paper_does(tokens: int, experts: int, seed: int, data: st.DataObject) -> None:
    """softmax(KeepTopK(H, k)): everything but the k largest is minus infinity."""
    top_k = data.draw(st.integers(1, experts))
    logits, spread, normal = (random(tokens, experts, seed=seed + place) for place in range(3))
    noisy = noisy_logits(logits, spread, normal)
    expected = logits + normal * torch.log1p(spread.exp())
    torch.testing.assert_close(noisy, expected)
    routing = route(noisy, top_k=top_k, scores="softmax", renormalize=True, scale=1.0, bias_E=None, valid_T=None)
    least = noisy.topk(top_k, dim=1).values[:, -1:]
    kept = noisy.masked_fill(noisy < least, -torch.inf).softmax(dim=1)
    torch.testing.assert_close(torch.zeros_like(noisy).scatter(1, routing.experts_TK, routing.weights_TK), kept)


@given(tokens=st.integers(0, 40), experts=st.integers(1, 9), size=st.integers(1, 12), seed=st.integers(0, 99))
def test_cosine_logits_are_cosines_over_the_temperature(tokens: int, experts: int, size: int, seed: int) -> None:
    x, projection, embedding = (
        random(tokens, 8, seed=seed),
        random(size, 8, seed=seed + 1),
        random(experts, size, seed=seed + 2),
    )
    found = cosine_logits(x, projection, embedding, torch.tensor([math.log(0.3)], dtype=torch.float64))
    expected = functional.cosine_similarity((x @ projection.T)[:, None], embedding[None], dim=2) / 0.3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_both_are_those_of_differences() -> None:
    arguments = [random(4, 5, seed=seed).requires_grad_() for seed in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: noisy_logits(a, b, random(4, 5, seed=3)), arguments)
    shapes = ((5, 8), (3, 8), (6, 3), (1,))
    arguments = [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(cosine_logits, arguments)


def test_cosine_logits_of_a_token_do_not_depend_on_the_others() -> None:
    x, projection, embedding = (random(*s, dtype=torch.float32) for s in ((50, 24), (6, 24), (9, 6)))
    temperature = torch.tensor([-1.0])
    whole = cosine_logits(x, projection, embedding, temperature)
    for first, last in ((0, 1), (7, 9), (3, 40), (49, 50)):
        assert torch.equal(cosine_logits(x[first:last], projection, embedding, temperature), whole[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_of_zeros_has_no_direction_and_finite_gradients(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    directions(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert not directions(x).any()


def test_directions_that_generation_asked_for_first_are_learned_from() -> None:
    x = random(3, 37)  # a size of its own
    with torch.inference_mode():
        first = directions(x)
    x.requires_grad_()
    again = directions(x)
    (d_x,) = torch.autograd.grad(again, x, torch.ones_like(x))
    assert torch.equal(again, first) and d_x.isfinite().all()


def test_normal_numbers_are_normal_and_a_function_of_where_they_stand() -> None:
    rows, positions = torch.arange(64).repeat_interleave(64), torch.arange(64).repeat(64)
    numbers = normal_numbers(rows, positions, 7, 32)
    assert numbers.isfinite().all() and numbers.abs().max() < 6.7
    count = numbers.numel()
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):  # within five deviations of each mean
        deviation = math.sqrt(math.prod(range(1, 2 * power, 2)) / count)
        assert abs(float(numbers.double().pow(power).mean()) - moment) < 5 * deviation
    cube = numbers.view(64, 64, 32)
    for other in (cube.roll(1, 0), cube.roll(1, 1), cube.roll(1, 2), normal_numbers(rows, positions, 8, 32).view_as(cube)):
        assert abs(float((cube * other).mean())) < 5 / math.sqrt(count)
    some = torch.tensor([4000, 3, 77])
    assert torch.equal(normal_numbers(rows[some], positions[some], 7, 32), numbers[some])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_both_gates_are_those_of_the_cpu() -> None:
    x, projection, embedding = (random(*s, dtype=torch.float32) for s in ((300, 64), (16, 64), (24, 16)))
    temperature = torch.tensor([-1.0])
    on_gpu = cosine_logits(x.cuda(), projection.cuda(), embedding.cuda(), temperature.cuda())
    torch.testing.assert_close(on_gpu.cpu(), cosine_logits(x, projection, embedding, temperature), rtol=1e-5, atol=1e-5)
    some = [cosine_logits(x[7:9].cuda(), projection.cuda(), embedding.cuda(), temperature.cuda()), on_gpu[7:9]]
    assert torch.equal(*some), "bit for bit, whatever the other tokens"
    rows, positions = torch.arange(300), torch.arange(300) * 3
    found = normal_numbers(rows.cuda(), positions.cuda(), 7, 24).cpu()
    torch.testing.assert_close(found, normal_numbers(rows, positions, 7, 24), rtol=1e-5, atol=1e-5)
