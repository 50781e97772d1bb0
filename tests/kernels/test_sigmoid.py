"""The sigmoid: the library's in value and gradient, and the same bits wherever a number lies."""

from __future__ import annotations

import torch

from kernels.sigmoid import sigmoid


def test_values_and_gradients_are_the_librarys_even_far_out() -> None:
    x = torch.linspace(-120, 120, 1001, requires_grad=True)
    torch.testing.assert_close(sigmoid(x), x.sigmoid(), rtol=1e-6, atol=1e-37)
    got, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (sigmoid, torch.sigmoid))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-37)
    assert torch.autograd.gradcheck(sigmoid, torch.randn(9, dtype=torch.float64, requires_grad=True))
    assert sigmoid(x.bfloat16()).dtype == torch.bfloat16


def test_bits_do_not_depend_on_the_place() -> None:
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    whole = sigmoid(x)
    for first, last in [(0, 1), (7, 40), (50_000, 50_033), (99_990, 100_003)]:
        assert torch.equal(sigmoid(x[first:last]), whole[first:last])
