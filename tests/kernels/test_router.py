"""The router: the reference against one that goes through the tokens one by one, the kernels against the reference."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.errors import UserError
from kernels.router import SMALLEST_SUM, Routing, Scores, route

SCORES = get_args(Scores)
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PLAIN: dict[str, Any] = {"scores": "softmax", "renormalize": True, "scale": 1.0, "bias_E": None, "valid_T": None}


def score(logits: list[float], scores: str) -> list[float]:
    if scores == "softmax":
        total = sum(map(math.exp, logits))
        return [math.exp(x) / total for x in logits]
    return [1 / (1 + math.exp(-x)) if scores == "sigmoid" else math.sqrt(math.log1p(math.exp(x))) for x in logits]


def selection(biased: list[float], top_k: int, num_groups: int, top_groups: int) -> list[int]:
    size = len(biased) // num_groups
    groups = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
    kept = sorted(range(num_groups), key=lambda g: (-groups[g], g))[:top_groups]
    return sorted((e for e in range(len(biased)) if e // size in kept), key=lambda e: (-biased[e], e))[:top_k]


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 100), st.sampled_from(SCORES), st.data())
def test_route_equals_the_reference(tokens: int, experts: int, seed: int, scores: Scores, data: st.DataObject) -> None:
    renormalize, biased, grouped = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    num_groups = (
        data.draw(st.sampled_from([g for g in range(1, experts) if experts % g == 0])) if grouped and experts > 1 else 1
    )
    if num_groups * 2 > experts:
        num_groups = 1
    top_groups = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, top_groups * experts // num_groups))
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, dtype=torch.float64, generator=generator)
    bias_E = torch.randn(experts, dtype=torch.float64, generator=generator) if biased else None
    valid_T = torch.rand(tokens, generator=generator) < 0.7
    options: dict[str, Any] = {"renormalize": renormalize, "scale": 2.5, "bias_E": bias_E, "valid_T": valid_T}
    groups = {"num_groups": num_groups, "top_groups": top_groups}
    routing = route(logits_TE, top_k=top_k, scores=scores, auxiliary=True, **options, **groups)
    sums, squares = [0.0] * experts, []
    for t, logits in enumerate(logits_TE.tolist()):
        s = score(logits, scores)
        chosen = selection([s[e] + (0 if bias_E is None else bias_E[e].item()) for e in range(experts)], top_k, **groups)
        assert routing.experts_TK[t].tolist() == chosen
        total = sum(s[e] for e in chosen) if renormalize else 1.0
        assert routing.weights_TK[t].tolist() == pytest.approx([2.5 * s[e] / total for e in chosen])
        if valid_T[t]:
            sums = [old + new / sum(s) for old, new in zip(sums, s, strict=True)]
            squares.append(math.log(sum(map(math.exp, logits))) ** 2)
    assert routing.counts_E.tolist() == routing.experts_TK[valid_T].flatten().bincount(minlength=experts).tolist()
    assert routing.score_sums_E is not None and routing.z_loss is not None
    assert routing.score_sums_E.tolist() == pytest.approx(sums)
    assert routing.z_loss.item() == pytest.approx(sum(squares) / max(1, len(squares)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_are_float32_and_ties_go_to_the_lower_expert(dtype: torch.dtype) -> None:
    routing = route(torch.zeros(3, 5, dtype=dtype), top_k=2, **(PLAIN | {"renormalize": False}))
    assert routing.experts_TK.tolist() == [[0, 1]] * 3
    assert routing.weights_TK.dtype == torch.float32
    torch.testing.assert_close(routing.weights_TK, torch.full((3, 2), 0.2))
    assert routing.counts_E.tolist() == [3, 3, 0, 0, 0]
    assert routing.score_sums_E is None and routing.z_loss is None


def test_the_bias_moves_the_selection_but_not_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    options = PLAIN | {"scores": "sigmoid", "renormalize": False, "bias_E": torch.tensor([0.0, 0.0, 9.0])}
    routing = route(logits, top_k=1, **options)
    assert routing.experts_TK.tolist() == [[2]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.5]]))


def test_the_best_expert_is_out_of_reach_in_a_group_that_is_not_kept() -> None:
    logits = torch.tensor([[5.0, -9.0, 3.0, 3.0]])
    options = PLAIN | {"scores": "sigmoid"}
    assert route(logits, top_k=2, num_groups=2, top_groups=1, **options).experts_TK.tolist() == [[2, 3]]
    assert route(logits, top_k=2, num_groups=2, top_groups=2, **options).experts_TK.tolist() == [[0, 2]]


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("renormalize", [True, False])
def test_everything_is_differentiable(scores: Scores, renormalize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    logits[0] *= 50  # both branches of sqrt_softplus
    valid_T = torch.tensor([True, True, False, True, True])
    options = PLAIN | {"scores": scores, "renormalize": renormalize, "scale": 1.5, "valid_T": valid_T}

    def outputs(logits_TE: Tensor) -> tuple[Tensor, ...]:
        routing = route(logits_TE, top_k=3, num_groups=2, top_groups=2, auxiliary=True, **options)
        assert routing.score_sums_E is not None and routing.z_loss is not None
        return routing.weights_TK, routing.score_sums_E, routing.z_loss

    assert torch.autograd.gradcheck(outputs, (logits.requires_grad_(),))


@pytest.mark.parametrize(
    ("top_k", "groups", "message"),
    [
        (2, (5, 1), r"12 experts do not divide into num_groups=5 groups; choose a divisor of 12"),
        (1, (12, 1), r"num_groups=12 leaves 1 expert a group.*at most 6 groups"),
        (2, (3, 4), r"top_groups=4 of num_groups=3 groups cannot be kept; choose 1 to 3"),
        (5, (3, 1), r"top_k=5 cannot be selected from 4 experts \(1 of 3 groups of 4\); choose 1 to 4, or more top_groups"),
        (0, (1, 1), r"top_k=0 cannot be selected from 12 experts"),
    ],
)
def test_impossible_selections_are_refused(top_k: int, groups: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        route(torch.zeros(2, 12), top_k=top_k, num_groups=groups[0], top_groups=groups[1], **PLAIN)


def test_tensors_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"bias_E has shape \(3,\), but there are 4 experts"):
        route(torch.zeros(2, 4), top_k=1, **(PLAIN | {"bias_E": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"valid_T is torch.bool of shape \(3,\).*each of the 2 tokens"):
        route(torch.zeros(2, 4), top_k=1, **(PLAIN | {"valid_T": torch.ones(3, dtype=torch.bool)}))


# The kernels.


def with_kernels(logits_TE: Tensor, **options: Any) -> Routing:
    """`route` by the kernels, on any device that can run them."""
    from kernels.triton_router import route_with_kernels, settings_of

    bias_E, valid_T = options.pop("bias_E"), options.pop("valid_T")
    defaults = {"num_groups": 1, "top_groups": 1, "auxiliary": False, "smallest_sum": SMALLEST_SUM}
    return Routing(*route_with_kernels(logits_TE, bias_E, valid_T, settings_of(logits_TE.shape[1], **(defaults | options))))


def objective(routing: Routing) -> Tensor:
    """A number that depends on every differentiable output."""
    weights_TK = routing.weights_TK
    total = (weights_TK * torch.linspace(-1, 2, weights_TK.numel(), device=weights_TK.device).view_as(weights_TK)).sum()
    if routing.score_sums_E is not None and routing.z_loss is not None:
        total = total + (routing.score_sums_E * torch.linspace(-1, 1, len(routing.score_sums_E), device=total.device)).sum()
        total = total + 0.3 * routing.z_loss
    return total


def case(tokens: int, experts: int, *, biased: bool, masked: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logits, bias, valid) with many equal scores; all others, and sums of two, are apart, so rounding decides nothing."""
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    logits_TE = torch.randint(-12, 13, (tokens, experts), generator=generator) / 4 + 1 / 16  # no sigmoids that add up to 1
    bias_E = torch.randint(0, 2, (experts,), generator=generator) / 2 if biased else None
    return logits_TE, bias_E, (torch.rand(tokens, generator=generator) < 0.7) if masked else None


def assert_same(found: Routing, expected: Routing, rtol: float = 1e-5) -> None:
    assert torch.equal(found.experts_TK.cpu(), expected.experts_TK)
    assert torch.equal(found.counts_E.cpu(), expected.counts_E)
    for ours, theirs in [
        (found.weights_TK, expected.weights_TK),
        (found.score_sums_E, expected.score_sums_E),
        (found.z_loss, expected.z_loss),
    ]:
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=rtol, atol=1e-6)


def compare(logits_TE: Tensor, device: str, top_k: int, **options: Any) -> None:
    """Outputs and gradients of the kernels equal those of the reference on a CPU."""
    theirs_TE = logits_TE.clone().requires_grad_()
    ours_TE = logits_TE.clone().to(device).requires_grad_()
    moved = options | {
        name: options[name] if options[name] is None else options[name].to(device) for name in ("bias_E", "valid_T")
    }
    expected, found = route(theirs_TE, top_k=top_k, **options), with_kernels(ours_TE, top_k=top_k, **moved)
    assert_same(found, expected)
    objective(expected).backward()
    objective(found).backward()
    assert ours_TE.grad is not None and theirs_TE.grad is not None
    bf16 = logits_TE.dtype == torch.bfloat16
    torch.testing.assert_close(ours_TE.grad.cpu(), theirs_TE.grad, rtol=2**-7 if bf16 else 2e-5, atol=2e-6)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_kernels_equal_the_reference(scores: Scores, renormalize: bool, auxiliary: bool, kernel_device: str) -> None:
    options: dict[str, Any] = {"scores": scores, "renormalize": renormalize, "scale": 2.5, "auxiliary": auxiliary}
    for tokens, experts, top_k in [(20, 128, 8), (130, 6, 2), (17, 40, 5)]:
        logits_TE, bias_E, valid_T = case(tokens, experts, biased=auxiliary, masked=renormalize)
        compare(logits_TE, kernel_device, top_k, bias_E=bias_E, valid_T=valid_T, **options)


@pytest.mark.parametrize(("experts", "num_groups", "top_groups", "top_k"), [(32, 8, 4, 6), (30, 5, 2, 4), (12, 2, 1, 6)])
def test_kernels_limit_the_groups(experts: int, num_groups: int, top_groups: int, top_k: int, kernel_device: str) -> None:
    logits_TE, bias_E, valid_T = case(40, experts, biased=True, masked=True)
    options = PLAIN | {"scores": "sigmoid", "bias_E": bias_E, "valid_T": valid_T, "auxiliary": True}
    compare(logits_TE, kernel_device, top_k, num_groups=num_groups, top_groups=top_groups, **options)


@pytest.mark.parametrize("tokens", [0, 3])
def test_kernels_without_tokens_or_without_valid_ones(tokens: int, kernel_device: str) -> None:
    valid_T = torch.zeros(tokens, dtype=torch.bool)
    compare(torch.zeros(tokens, 8), kernel_device, 2, **(PLAIN | {"valid_T": valid_T, "auxiliary": True}))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter: exp overflows where 1 / inf is meant
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("extreme", [-1000.0, -41.0, -39.0, 0.0, 300.0])
def test_extreme_logits_give_finite_weights_and_gradients(scores: Scores, extreme: float, kernel_device: str) -> None:
    logits_TE = torch.full((1, 5), extreme)
    logits_TE[0, 1] += 1.0
    options = PLAIN | {"scores": scores, "auxiliary": True}
    for function, device in ((route, "cpu"), (with_kernels, kernel_device)):
        own_TE = logits_TE.clone().to(device).requires_grad_()
        routing = function(own_TE, top_k=2, **options)
        objective(routing).backward()
        assert own_TE.grad is not None and own_TE.grad.isfinite().all()
        assert routing.weights_TK.isfinite().all()
    compare(logits_TE, kernel_device, 2, **options)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_kernels_select_different_experts_even_from_nan(kernel_device: str) -> None:
    routing = with_kernels(torch.full((2, 8), float("nan"), device=kernel_device), top_k=3, **PLAIN)
    assert routing.experts_TK.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("columns", [slice(0, 32), slice(3, 35), slice(0, 64, 2)])
def test_kernels_take_logits_in_any_stride(columns: slice, kernel_device: str) -> None:
    wide_TE, bias_E, valid_T = case(20, 64, biased=True, masked=True)
    options: dict[str, Any] = {"scores": "softmax", "renormalize": True, "scale": 1.0, "top_k": 4}
    found = with_kernels(
        wide_TE.to(kernel_device)[:, columns],
        bias_E=None if bias_E is None else bias_E[:32].to(kernel_device),
        valid_T=None if valid_T is None else valid_T.to(kernel_device),
        **options,
    )
    assert_same(found, route(wide_TE[:, columns], bias_E=None if bias_E is None else bias_E[:32], valid_T=valid_T, **options))


@pytest.mark.parametrize("experts", [64, 30])
def test_a_token_is_routed_alone_as_in_a_batch(experts: int, kernel_device: str) -> None:
    logits_TE = torch.randn(40, experts, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    batch = with_kernels(logits_TE, top_k=4, **PLAIN)
    for t in (0, 17, 39):
        alone = with_kernels(logits_TE[t : t + 1], top_k=4, **PLAIN)
        assert torch.equal(alone.experts_TK[0], batch.experts_TK[t])
        assert torch.equal(alone.weights_TK[0], batch.weights_TK[t])


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (256, 8), (1024, 32), (60, 4)])
def test_many_tokens_on_a_gpu(dtype: torch.dtype, experts: int, top_k: int) -> None:
    logits_TE, bias_E, valid_T = case(5000, experts, biased=True, masked=True)
    for scores in SCORES:
        options = PLAIN | {"scores": scores, "bias_E": bias_E, "valid_T": valid_T}
        compare(logits_TE.to(dtype), "cuda", top_k, **options)


@gpu
@needs_gpu
def test_a_gpu_repeats_every_bit() -> None:
    logits_TE = torch.randn(5000, 128, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
    valid_T = torch.rand(5000, generator=torch.Generator().manual_seed(1)).cuda() < 0.9
    runs = []
    for _ in range(3):
        routing = route(logits_TE, top_k=8, auxiliary=True, **(PLAIN | {"valid_T": valid_T}))
        assert routing.weights_TK.grad_fn is not None and routing.weights_TK.grad_fn.name() == "_RouteBackward"  # the kernels
        (grad_TE,) = torch.autograd.grad(objective(routing), logits_TE)
        runs.append([*(value for value in vars(routing).values() if value is not None), grad_TE])
    assert all(torch.equal(first, again) for run in runs[1:] for first, again in zip(runs[0], run, strict=True))


@gpu
@needs_gpu
@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_gpu_does_not_wait_and_replays_in_a_graph(auxiliary: bool) -> None:
    cases = [case(tokens, 128, biased=False, masked=False)[0][:500] for tokens in (500, 501, 502)]
    static_TE = cases[0].cuda().requires_grad_()

    def step() -> tuple[Routing, Tensor]:
        routing = route(static_TE, top_k=8, auxiliary=auxiliary, **PLAIN)
        return routing, torch.autograd.grad(objective(routing), static_TE)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles
        side.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing, grad_TE = step()
    for logits_TE in cases[1:]:
        with torch.no_grad():
            static_TE.copy_(logits_TE)
        graph.replay()
        fresh_TE = logits_TE.clone().requires_grad_()
        expected = route(fresh_TE, top_k=8, auxiliary=auxiliary, **PLAIN)
        assert_same(routing, expected)
        torch.testing.assert_close(grad_TE.cpu(), torch.autograd.grad(objective(expected), fresh_TE)[0], rtol=2e-5, atol=2e-6)
