"""Log-probabilities and entropy against the plain formula over all logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.vocab_loss import token_logprobs


def reference(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (hidden @ head.t() / temperature).log_softmax(dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)


def inputs(tokens: int, vocabulary: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, dtype=torch.float64, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, size, dtype=torch.float64, generator=generator, requires_grad=True)
    return hidden, head, torch.randint(0, vocabulary, (tokens,), generator=generator)


@given(st.integers(0, 20), st.integers(1, 12), st.integers(1, 30), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 50))
def test_values_and_gradients_equal_the_reference(
    tokens: int, vocabulary: int, chunk: int, temperature: float, seed: int
) -> None:
    hidden, head, targets = inputs(tokens, vocabulary, 5, seed)
    ours = token_logprobs(hidden, head, targets, temperature=temperature, chunk=chunk)
    expected = reference(hidden, head, targets, temperature)
    pulls = [torch.randn(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    for pull in ([pulls[0], pulls[1]], [pulls[0], torch.zeros_like(pulls[1])]):
        ours_grads = torch.autograd.grad(ours, (hidden, head), pull, retain_graph=True)
        expected_grads = torch.autograd.grad(expected, (hidden, head), pull, retain_graph=True)
        for ours_part, expected_part in zip((*ours, *ours_grads), (*expected, *expected_grads), strict=True):
            torch.testing.assert_close(ours_part, expected_part)


@pytest.mark.parametrize("which", [0, 1])
def test_gradcheck_of_one_output_alone(which: int) -> None:
    hidden, head, targets = inputs(7, 6, 4)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, temperature=0.7, chunk=3)[which], (hidden, head))


def test_only_the_gradients_that_are_asked_for() -> None:
    hidden, head, targets = inputs(5, 6, 4)
    token_logprobs(hidden, head.detach(), targets)[0].sum().backward()
    token_logprobs(hidden.detach(), head, targets)[0].sum().backward()
    expected = torch.autograd.grad(reference(hidden, head, targets, 1.0)[0].sum(), (hidden, head))
    torch.testing.assert_close((hidden.grad, head.grad), expected)


def test_large_logits_stay_finite() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    (logprobs + entropy).sum().backward()
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -2000.0]))
    torch.testing.assert_close(entropy, torch.zeros(2))
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_bfloat16_gives_float32_results_and_bfloat16_gradients() -> None:
    hidden64, head64, targets = inputs(40, 30, 16)
    hidden, head = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden64, head64))
    logprobs, entropy = token_logprobs(hidden, head, targets, chunk=16)
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    expected = reference(exact[0], exact[1], targets, 1.0)
    torch.testing.assert_close(torch.stack((logprobs, entropy)).double(), torch.stack(expected), rtol=1e-4, atol=1e-4)
    logprobs.sum().backward()
    expected[0].sum().backward()
    for ours, wanted in ((hidden, exact[0]), (head, exact[1])):
        assert ours.grad is not None and wanted.grad is not None and ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad.double(), wanted.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="half-precision products with float32 results run on a GPU")
def test_bfloat16_on_a_gpu_keeps_float32_logits() -> None:
    hidden64, head64, targets = inputs(300, 512, 64)
    hidden, head = (tensor.detach().bfloat16().cuda().requires_grad_() for tensor in (hidden64, head64))
    logprobs, entropy = token_logprobs(hidden, head, targets.cuda(), chunk=128)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    expected = reference(exact[0], exact[1], targets.cuda(), 1.0)
    torch.testing.assert_close(torch.stack((logprobs, entropy)).double(), torch.stack(expected), rtol=1e-3, atol=1e-3)
    (logprobs + entropy).sum().backward()
    (expected[0] + expected[1]).sum().backward()
    for ours, wanted in ((hidden, exact[0]), (head, exact[1])):
        assert ours.grad is not None and wanted.grad is not None
        scale = wanted.grad.abs().max()
        torch.testing.assert_close(ours.grad.double() / scale, wanted.grad / scale, rtol=0, atol=2e-2)
