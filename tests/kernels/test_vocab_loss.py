"""Log-probabilities and entropy against the plain formula over all logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.errors import UserError
from kernels.vocab_loss import chunked_logprobs, token_logprobs
from tests.kernels.capture import captured


def reference(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (hidden @ head.t() / temperature).log_softmax(dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)


def inputs(tokens: int, vocabulary: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, dtype=torch.float64, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, size, dtype=torch.float64, generator=generator, requires_grad=True)
    return hidden, head, torch.randint(0, vocabulary, (tokens,), generator=generator)


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 12), st.integers(1, 30), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 50))
def test_values_and_gradients_equal_the_reference(
    tokens: int, vocabulary: int, chunk: int, temperature: float, seed: int
) -> None:
    hidden, head, targets = inputs(tokens, vocabulary, 5, seed)
    ours = chunked_logprobs(hidden, head, targets, temperature, chunk)
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
    assert torch.autograd.gradcheck(lambda h, w: chunked_logprobs(h, w, targets, 0.7, 3)[which], (hidden, head))


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
    logprobs, entropy = chunked_logprobs(hidden, head, targets, 1.0, 16)
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    expected = reference(exact[0], exact[1], targets, 1.0)
    torch.testing.assert_close(torch.stack((logprobs, entropy)).double(), torch.stack(expected), rtol=1e-4, atol=1e-4)
    logprobs.sum().backward()
    expected[0].sum().backward()
    for ours, wanted in ((hidden, exact[0]), (head, exact[1])):
        assert ours.grad is not None and wanted.grad is not None and ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad.double(), wanted.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("tokens", "tiles"), [(1, 1), (45, 3), (33, 70)])
def test_statistics_of_tiles_add_up(tokens: int, tiles: int, kernel_device: str) -> None:
    from kernels.hopper.vocabulary import REDUCE_TILES, REDUCE_TOKENS, reduce_kernel

    generator = torch.Generator().manual_seed(tokens)
    z_TNW = 3 * torch.randn(tokens, tiles, 8, generator=generator) + 50 * torch.randn(tokens, 1, 1, generator=generator)
    largest_TN = z_TNW.max(dim=-1).values
    below_TNW = z_TNW - largest_TN[..., None]
    partials = torch.stack([largest_TN, below_TNW.exp2().sum(-1), (below_TNW * below_TNW.exp2()).sum(-1)]).transpose(1, 2)
    found = torch.full((3, tokens), float("nan"), device=kernel_device)
    arguments = [partials.contiguous().to(kernel_device), z_TNW[:, -1, 0].contiguous().to(kernel_device), *found]
    grid = (-(-tokens // REDUCE_TOKENS),)
    reduce_kernel[grid](*arguments, tokens, tiles, TOKENS=REDUCE_TOKENS, TILES=REDUCE_TILES)
    log_p = (z_TNW.double().flatten(1) * math.log(2)).log_softmax(dim=-1)
    expected = torch.stack([log_p[:, -8], -(log_p.exp() * log_p).sum(dim=-1)])
    torch.testing.assert_close(found[:2].cpu().double(), expected, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- on a GPU

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
gpu = pytest.mark.gpu
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def gpu_inputs(tokens: int, vocabulary: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(tokens + vocabulary)
    options = {"generator": generator, "device": "cuda"}
    hidden = torch.randn(tokens, size, **options).bfloat16().requires_grad_()  # type: ignore[arg-type]
    head = (torch.randn(vocabulary, size, **options) * 2 / size**0.5).bfloat16().requires_grad_()  # type: ignore[arg-type]
    return hidden, head, torch.randint(0, vocabulary, (tokens,), **options)  # type: ignore[call-overload]


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def torch_bfloat16(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = ((hidden @ head.t()).float() / temperature).log_softmax(dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)


SHAPES = [(1, 1000, 64), (77, 257, 320), (130, 256, 64), (1000, 5000, 2048), (300, 151936, 128), (513, 70000, 64)]


@gpu
@needs_hopper
@pytest.mark.parametrize(("tokens", "vocabulary", "size"), SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("pulled", ["both", "logprobs", "entropy"])
def test_kernels_are_as_exact_as_torch(tokens: int, vocabulary: int, size: int, temperature: float, pulled: str) -> None:
    hidden, head, targets = gpu_inputs(tokens, vocabulary, size)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    plain = [tensor.detach().clone().requires_grad_() for tensor in (hidden, head)]
    found = token_logprobs(hidden, head, targets, temperature=temperature)
    expected = reference(exact[0], exact[1], targets, temperature)
    theirs = torch_bfloat16(plain[0], plain[1], targets, temperature)
    pulls = [torch.randn(tokens, device="cuda", generator=torch.Generator("cuda").manual_seed(n)) for n in range(2)]
    used = {"both": [0, 1], "logprobs": [0], "entropy": [1]}[pulled]
    grads = [
        torch.autograd.grad([outputs[n] for n in used], leaves, [pulls[n].to(outputs[n].dtype) for n in used])
        for outputs, leaves in ((found, (hidden, head)), (expected, exact), (theirs, plain))
    ]
    names = ["logprobs", "entropy", "hidden", "head"]
    for name, ours, wanted, other in zip(names, (*found, *grads[0]), (*expected, *grads[1]), (*theirs, *grads[2]), strict=True):
        assert ours.isfinite().all(), name
        assert relative(ours, wanted) <= 2 * relative(other, wanted) + 2**-8 / ours.numel() ** 0.5, name


@gpu
@needs_hopper
def test_a_token_does_not_depend_on_its_batch_and_runs_repeat() -> None:
    hidden, head, targets = gpu_inputs(700, 30000, 192)
    whole = token_logprobs(hidden, head, targets)
    grads = torch.autograd.grad(whole, (hidden, head), [torch.ones_like(part) for part in whole])
    again = token_logprobs(hidden, head, targets)
    more = torch.autograd.grad(again, (hidden, head), [torch.ones_like(part) for part in again])
    for one, other in zip((*whole, *grads), (*again, *more), strict=True):
        assert torch.equal(one, other)
    for part in (slice(0, 1), slice(5, 6), slice(100, 357), slice(0, 16), slice(7, 519)):  # multiples of 16 too
        alone = token_logprobs(hidden[part], head, targets[part])
        assert all(torch.equal(one, other[part]) for one, other in zip(alone, whole, strict=True))


@gpu
@needs_hopper
def test_strided_hidden_states_no_tokens_and_one_leaf() -> None:
    hidden, head, targets = gpu_inputs(90, 700, 128)
    expected = token_logprobs(hidden, head, targets)
    wanted = torch.autograd.grad(expected[0].sum(), (hidden, head))
    wide = torch.cat([hidden, hidden], dim=1).detach()[:, 128:].requires_grad_()
    ours = token_logprobs(wide, head.detach(), targets)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(torch.autograd.grad(ours[0].sum(), wide)[0], wanted[0])
    only_head = token_logprobs(hidden.detach(), head, targets)[0].sum()
    assert torch.equal(torch.autograd.grad(only_head, head)[0], wanted[1])
    none = token_logprobs(hidden[:0], head, targets[:0])
    assert none[0].shape == none[1].shape == (0,)
    assert not torch.autograd.grad(none[0].sum(), head)[0].any()


@gpu
@needs_hopper
def test_unaligned_and_repeated_rows_are_copied_and_targets_out_of_range_show() -> None:
    hidden, head, targets = (tensor.detach() for tensor in gpu_inputs(90, 700, 128))
    expected = token_logprobs(hidden, head, targets)
    unaligned = torch.cat([hidden.new_zeros(1), hidden.flatten()])[1:].view(90, 128)
    assert torch.equal(token_logprobs(unaligned, head, targets)[0], expected[0])
    odd = torch.cat([hidden, hidden[:, :3]], dim=1)[:1, :128]  # one row, so contiguous whatever its stride
    assert torch.equal(token_logprobs(odd, head, targets[:1])[0], expected[0][:1])
    repeated = token_logprobs(hidden[:1].expand(5, -1), head, targets[:1].expand(5))
    assert torch.equal(repeated[0], expected[0][:1].expand(5))
    outside = token_logprobs(hidden[:3], head, torch.tensor([-100, 700, 5], device="cuda"))[0]
    assert outside.isnan().tolist() == [True, True, False]


@gpu
@needs_hopper
def test_no_wait_for_the_gpu_and_replays_in_a_graph() -> None:
    hidden, head, targets = gpu_inputs(200, 900, 64)
    pulls = [torch.ones(200, device="cuda"), torch.full((200,), 0.1, device="cuda")]

    def step() -> list[Tensor]:
        outputs = token_logprobs(hidden, head, targets)
        return [*(part.detach() for part in outputs), *torch.autograd.grad(outputs, (hidden, head), pulls)]

    graph, replays = captured(step)
    with torch.no_grad():
        hidden.mul_(-0.5)
        targets.copy_(targets.flip(0))
    graph.replay()
    for replayed, fresh in zip(replays, step(), strict=True):
        assert torch.equal(replayed, fresh)


@gpu
@needs_hopper
def test_memory_beside_the_gradients_is_bounded() -> None:
    hidden, head, targets = gpu_inputs(8192, 151936, 2048)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(token_logprobs(hidden, head, targets)[0].sum(), (hidden, head))
    extra = torch.cuda.max_memory_allocated() - before - sum(grad.nbytes for grad in grads)
    assert extra <= 0.8e9


@gpu
@needs_hopper
def test_what_the_kernels_do_not_take_is_said() -> None:
    hidden, head, targets = gpu_inputs(4, 10, 64)
    with pytest.raises(UserError, match=r"hidden_size=32 is not a multiple of 64.*use 64"):
        token_logprobs(hidden[:, :32], head[:, :32].contiguous(), targets)
    with pytest.raises(UserError, match="take bfloat16"):
        token_logprobs(hidden.half(), head.half(), targets)
    with pytest.raises(UserError, match=r"expected \(T, D\), \(V, D\)"):
        token_logprobs(hidden, head[:, :32], targets)
