"""Normalisation and rotation: the kernels against the references, gradients, and independence of the other tokens."""

from __future__ import annotations

import pytest
import torch

from kernels.norm import add_rms_norm, norm_rotate, rms_norm, rms_norm_reference, rotate, rotate_reference


def numbers(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize("shape", [(5, 24), (3, 4, 16), (1, 1, 1), (0, 8)])
def test_the_kernels_follow_the_references(kernel_device: str, shape: tuple[int, ...]) -> None:
    from kernels.triton_norm import launch_rms_norm, launch_rotate

    x, weight = numbers(*shape, device=kernel_device), numbers(shape[-1], device=kernel_device)
    torch.testing.assert_close(launch_rms_norm(x, None, weight, 1e-6)[1], rms_norm_reference(x, weight, 1e-6))
    update = numbers(shape[-1], *shape[:-1], device=kernel_device).movedim(0, -1)
    total, y = launch_rms_norm(x, update, weight, 1e-6)
    assert torch.equal(total, x + update)
    torch.testing.assert_close(y, rms_norm_reference(x + update, weight, 1e-6))
    heads = numbers(6, 3, 24, device=kernel_device)[:, :, ::2]
    angles = numbers(6, 12, device=kernel_device)
    for back in (False, True):
        expected = rotate_reference(heads, angles.cos(), -angles.sin() if back else angles.sin())
        torch.testing.assert_close(launch_rotate(heads, None, 0.0, angles.cos(), angles.sin(), back=back), expected)


@pytest.mark.parametrize("shape", [(5, 24), (9, 4, 16), (77, 4, 16), (1, 1, 1), (0, 8)])
@pytest.mark.parametrize("also_elsewhere", [False, True])
def test_the_backward_kernel_follows_autograd(
    kernel_device: str, shape: tuple[int, ...], also_elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels import triton_norm

    monkeypatch.setattr(triton_norm, "BACKWARD_PROGRAMS", 2)  # so that a program has several tiles
    x, d_y, d_x = (numbers(*shape, device=kernel_device) + i for i in range(3))
    weight = numbers(shape[-1], device=kernel_device)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(rms_norm_reference(*leaves, 1e-6), leaves, d_y)
    found = triton_norm.launch_rms_norm_backward(x, weight, 1e-6, d_y, d_x if also_elsewhere else None)
    torch.testing.assert_close(found[0], expected[0] + d_x if also_elsewhere else expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("shape", [(5, 3, 24), (1, 1, 2), (7, 4, 16), (0, 2, 8)])
def test_the_kernels_of_both_follow_one_behind_the_other(
    kernel_device: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels import triton_norm

    monkeypatch.setattr(triton_norm, "BACKWARD_PROGRAMS", 2)
    x = numbers(shape[0], shape[1], 2 * shape[2], device=kernel_device)[:, :, ::2]
    d_y = numbers(shape[1], shape[0], shape[2], device=kernel_device).transpose(0, 1)
    weight = numbers(shape[2], device=kernel_device)
    angles = numbers(shape[0], shape[2] // 2, device=kernel_device).repeat(1, 2)
    turns = angles.cos(), angles.sin()
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = rotate_reference(rms_norm_reference(*leaves, 1e-6), *turns)
    torch.testing.assert_close(triton_norm.launch_rotate(x, weight, 1e-6, *turns), expected.detach())
    found = triton_norm.launch_norm_rotate_backward(x, weight, 1e-6, *turns, d_y)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, d_y))


def test_gradients() -> None:
    x, weight = numbers(4, 3, 8).double().requires_grad_(), numbers(8).double().requires_grad_()
    angles = numbers(4, 4).double().repeat(1, 2)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda x, u, w: add_rms_norm(x, u, w, 1e-6), (x, x.detach() + 1, weight))
    update = torch.ones_like(x).requires_grad_()
    assert torch.autograd.gradcheck(lambda u, w: add_rms_norm(x.detach(), u, w, 1e-6), (update, weight))
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), (x,))


def test_rotation_keeps_lengths_and_depends_on_differences_of_positions_only() -> None:
    q, k = numbers(1, 1, 16), numbers(2, 1, 16)[1:]
    frequencies = torch.linspace(0.1, 1, 8).repeat(2)

    def product(first: int, second: int) -> torch.Tensor:
        turned = [rotate(x, (p * frequencies).cos()[None], (p * frequencies).sin()[None]) for x, p in ((q, first), (k, second))]
        torch.testing.assert_close(turned[0].norm(), q.norm())
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(7, 3), product(14, 10))
    assert (product(7, 3) - product(7, 4)).abs() > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_a_tokens_bits_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight = numbers(700, 16, 64, device="cuda", dtype=dtype), numbers(64, device="cuda", dtype=dtype)
    angles = numbers(700, 32, device="cuda").repeat(1, 2)
    whole, turned = rms_norm(x, weight, 1e-6), rotate(x, angles.cos(), angles.sin())
    both = norm_rotate(x, weight, 1e-6, angles.cos(), angles.sin())
    torch.testing.assert_close(both, rotate_reference(rms_norm_reference(x, weight, 1e-6), angles.cos(), angles.sin()))
    assert torch.equal(add_rms_norm(x / 2, x / 2, weight, 1e-6)[1], whole)
    torch.testing.assert_close(whole, rms_norm_reference(x, weight, 1e-6))
    torch.testing.assert_close(turned, rotate_reference(x, angles.cos(), angles.sin()))
    for count in (1, 3, 16, 100):
        some = torch.randperm(700, device="cuda")[:count]
        assert torch.equal(rms_norm(x[some], weight, 1e-6), whole[some])
        turns = angles[some].cos(), angles[some].sin()
        assert torch.equal(rotate(x[some], *turns), turned[some])
        assert torch.equal(norm_rotate(x[some], weight, 1e-6, *turns), both[some])
