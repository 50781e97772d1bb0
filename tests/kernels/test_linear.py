"""The batch-invariant product: by definition, and the same bits for a row whatever the other rows are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from kernels.linear import _in_halves, linear, linears, one_matrix, product


def case(rows: int, inputs: int, outputs: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + inputs)
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((rows, inputs), (outputs, inputs))]


@settings(deadline=None)
@given(st.integers(0, 70), st.sampled_from([1, 16, 33, 128, 300]), st.sampled_from([1, 20, 64, 257]), st.randoms())
def test_a_rows_bits_do_not_depend_on_the_others(rows: int, inputs: int, outputs: int, random) -> None:  # type: ignore[no-untyped-def]
    x, weight = case(rows, inputs, outputs)
    whole = linear(x, weight)
    assert whole.shape == (rows, outputs)
    torch.testing.assert_close(whole, x @ weight.T, rtol=1e-4, atol=1e-4)
    some = random.sample(range(rows), random.randint(0, rows))
    assert torch.equal(linear(x[some], weight), whole[some])
    assert torch.equal(linear(x[None, some], weight), whole[None, some])


def test_gradients_are_those_of_the_library() -> None:
    x, weight = (tensor.double().requires_grad_() for tensor in case(19, 24, 7))
    assert torch.autograd.gradcheck(linear, (x, weight))
    other = weight.detach()[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, left, right: linears(x, [left, right]), (x, weight, other))


def beside_each_other(*weights: torch.Tensor) -> list[torch.Tensor]:
    """The same weights one behind the other in memory, as leaves, with other numbers around them."""
    sizes = [weight.numel() for weight in weights]
    flat = torch.cat([torch.ones(5), *(weight.detach().flatten().cpu() for weight in weights), torch.ones(5)])
    parts = flat.to(weights[0]).split([5, *sizes, 5])[1:-1]
    return [part.view(weight.shape).detach().requires_grad_() for part, weight in zip(parts, weights, strict=True)]


def test_weights_one_behind_the_other_areone_matrix() -> None:
    _, weight = case(19, 24, 7)
    first, second, third = beside_each_other(weight, weight[:3] + 1, weight[:5] - 1)
    together = one_matrix([first, second, third])
    assert together is not None and torch.equal(together, torch.cat([first, second, third]))
    assert one_matrix([first]) is None, "nothing to save"
    for apart in ([second, first], [first, third], [first, second.detach().clone()], [first, second.detach().T]):
        assert one_matrix(apart) is None


@pytest.mark.parametrize("plain", [True, False])
def testone_matrix_gives_what_weights_apart_give(plain: bool) -> None:
    x, weight = (tensor.double() for tensor in case(19, 24, 7))
    apart = [weight, weight[:3] + 1, weight[:5] - 1]
    beside = beside_each_other(*apart)
    pulls = [torch.randn(19, len(each), dtype=torch.float64) for each in apart]
    found = []
    for weights in ([each.clone().requires_grad_() for each in apart], beside):
        x = x.detach().requires_grad_()
        results = linears(x, weights, plain=plain)
        found.append([*results, *torch.autograd.grad(results, [x, *weights], pulls)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_wider_result_of_narrow_operands_keeps_what_they_say() -> None:
    x, weight = (tensor.requires_grad_() for tensor in case(19, 24, 7, dtype=torch.bfloat16))
    y = linear(x, weight, dtype=torch.float32)
    torch.testing.assert_close(y, x.float() @ weight.float().T, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(19, 7)
    got = torch.autograd.grad(y, (x, weight), upstream)
    wide = [tensor.detach().float().requires_grad_() for tensor in (x, weight)]
    expected = torch.autograd.grad(functional.linear(*wide), wide, upstream)
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == torch.bfloat16
        torch.testing.assert_close(left, right.bfloat16())


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(3, 20, 9), (70, 96, 40), (130, 64, 129)])
def test_the_kernel_computes_the_product(kernel_device: str, rows: int, inputs: int, outputs: int) -> None:
    from kernels.triton_linear import launch_linears

    x, weight = case(rows, inputs, outputs, kernel_device)
    others = [case(rows, inputs, size, kernel_device)[1] for size in (33, 5)]
    for count in (1, 2, 3):
        weights = [weight, *others][:count]
        results = launch_linears(torch.cat([x, x], dim=1)[:, :inputs], weights, torch.float32)
        for result, each in zip(results, weights, strict=True):
            torch.testing.assert_close(result, x @ each.T, rtol=1e-4, atol=1e-4)
            assert torch.equal(result, launch_linears(x, [each], torch.float32)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 2048), (192, 100), (2048, 128), (768, 5000)])
def test_the_kernels_rows_have_the_same_bits_at_any_number(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    x, weight = case(3000, inputs, outputs, "cuda", dtype)
    whole = product(x, weight, torch.float32)
    exact = x.double() @ weight.double().T
    assert (whole - exact).abs().max() < 1e-3
    for rows in (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 500):
        some = torch.randperm(3000, device="cuda")[:rows]
        assert torch.equal(product(x[some], weight, torch.float32), whole[some]), rows


def test_halves_keep_sixteen_bits() -> None:
    d = torch.randn(400, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 7)
    first, rest = _in_halves(d).double().chunk(2, dim=1)
    assert ((first + rest - d.double()).abs() <= 2**-16 * d.double().abs()).all()
    assert ((first - d.double()).abs() > 2**-10 * d.double().abs()).any(), "one of them alone keeps as much"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(16384, 1024, 64), (5, 192, 6), (3000, 2048, 128)])
def test_on_a_gpu_gradients_of_wide_results_are_as_exact_as_their_dtype(rows: int, inputs: int, outputs: int) -> None:
    x, weight = case(rows, inputs, outputs, "cuda", torch.bfloat16)
    others = torch.randn_like(weight)
    leaves = [x.requires_grad_(), weight.requires_grad_(), others.requires_grad_()]
    pulls = [torch.randn(rows, outputs, device="cuda") for _ in "wo"]
    found = torch.autograd.grad(linears(x, [weight, others], dtype=torch.float32), leaves, pulls)
    exact = [leaf.detach().double() for leaf in leaves]
    wanted = [pulls[0].double() @ exact[1] + pulls[1].double() @ exact[2], *(pull.double().T @ exact[0] for pull in pulls)]
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() < 3e-3 * other.norm()  # to round once costs 1.7e-3
