"""The experts' MLPs: the reference against one row at a time, the Hopper kernels against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.errors import UserError
from kernels.expert_mlp import expert_mlp
from kernels.expert_order import ExpertOrder, expert_order
from kernels.rows import COPIED_FROM
from tests.kernels.capture import captured

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
gpu = pytest.mark.gpu
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


@dataclass(frozen=True)
class Case:
    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    gate_up_ECD: Tensor
    down_EDF: Tensor

    @classmethod
    def draw(cls, experts_TK: Tensor, experts: int, size: int, hidden: int, seed: int = 0) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        weights_TK = torch.rand(experts_TK.shape, generator=generator, dtype=torch.float64) + 0.1
        gate_up_ECD, down_EDF = normal(experts, 2 * hidden, size) / size**0.5, normal(experts, size, hidden) / hidden**0.5
        return cls(normal(experts_TK.shape[0], size), experts_TK, weights_TK, gate_up_ECD, down_EDF)

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """Rounded to bfloat16 first where the dtype is not float64, so that all devices start from the same numbers."""
        rounded = [t.bfloat16().to(device, dtype) for t in (self.x_TD, self.gate_up_ECD, self.down_EDF)]
        weights = self.weights_TK.bfloat16().to(device, torch.promote_types(dtype, torch.float32))
        return Case(rounded[0], self.experts_TK.to(device), weights, rounded[1], rounded[2])

    @property
    def order(self) -> ExpertOrder:
        return expert_order(self.experts_TK, self.down_EDF.shape[0])

    def results(self, pull: int = 1) -> list[Tensor]:
        """y and the gradients of x, the weights, gate_up and down, for an upstream gradient drawn from the seed `pull`."""
        inputs = [t.requires_grad_() for t in (self.x_TD, self.weights_TK, self.gate_up_ECD, self.down_EDF)]
        y = expert_mlp(inputs[0], self.order, *inputs[1:])
        return [y.detach(), *torch.autograd.grad(y, inputs, self.pull(pull).to(y.device, y.dtype))]

    def pull(self, seed: int) -> Tensor:
        """An upstream gradient, float64; bfloat16 holds its numbers."""
        return torch.randn(self.x_TD.shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def different_experts(tokens: int, experts: int, top_k: int, seed: int, skew: float = 0.0) -> Tensor:
    """K different experts a token; `skew` 1 is Zipf's law."""
    likely_E = (1.0 / torch.arange(1, experts + 1) ** skew).expand(max(tokens, 1), experts)
    return torch.multinomial(likely_E, top_k, generator=torch.Generator().manual_seed(seed))[:tokens]


def by_hand(case: Case) -> Tensor:
    rows = []
    for x, experts, weights in zip(case.x_TD, case.experts_TK, case.weights_TK, strict=True):
        y = x * 0.0
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (case.gate_up_ECD[expert] @ x).chunk(2)
            y = y + weight * (case.down_EDF[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(y)
    return torch.stack(rows) if rows else case.x_TD * 1.0


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 6), st.integers(0, 50), st.data())
def test_the_reference_by_hand(tokens: int, experts: int, seed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    case = Case.draw(different_experts(tokens, experts, top_k, seed, skew=1.0), experts, size=4, hidden=3, seed=seed)
    inputs = [t.requires_grad_() for t in (case.x_TD, case.weights_TK, case.gate_up_ECD, case.down_EDF)]
    ours, expected = expert_mlp(inputs[0], case.order, *inputs[1:]), by_hand(case)
    torch.testing.assert_close(ours, expected)
    pull = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(ours, inputs, pull, allow_unused=True, materialize_grads=True)
    for grad, wanted in zip(
        grads, torch.autograd.grad(expected, inputs, pull, allow_unused=True, materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(grad, wanted)


def test_gradcheck_with_non_contiguous_tokens() -> None:
    case = Case.draw(different_experts(5, 3, 2, 0), 3, size=4, hidden=2)
    order = case.order
    inputs = [t.requires_grad_() for t in (case.x_TD.t().contiguous(), case.weights_TK, case.gate_up_ECD, case.down_EDF)]
    assert torch.autograd.gradcheck(lambda x, w, g, d: expert_mlp(x.t(), order, w, g, d), inputs)


def test_experts_without_tokens_get_zero_gradients_not_none() -> None:
    case = Case.draw(torch.tensor([[1], [1]]), 3, size=4, hidden=2)
    _, _, _, gate_up, down = case.results()
    for grad in (gate_up, down):
        assert (grad[0] == 0).all() and (grad[2] == 0).all() and (grad[1] != 0).any()


def check_slots(device: str, dtype: torch.dtype) -> None:
    """Experts anywhere in a larger arena whose slots hold other things too: the same numbers, in place."""
    case = Case.draw(different_experts(150, 4, 2, 0), 4, size=128, hidden=64).to(device, dtype)
    expected = case.results()
    slots_E = torch.tensor([6, 0, 3, 5], dtype=torch.int32, device=device)
    arena = torch.full((7, 3 * 128 * 64), 7.0, device=device, dtype=dtype)
    gate_up_SCD, down_SDF = arena[:, : 2 * 64 * 128].view(7, 128, 128), arena[:, 2 * 64 * 128 :].view(7, 128, 64)
    gate_up_SCD[slots_E], down_SDF[slots_E] = case.gate_up_ECD.detach(), case.down_EDF.detach()
    inputs = [case.x_TD, case.weights_TK, gate_up_SCD.requires_grad_(), down_SDF.requires_grad_()]
    y = expert_mlp(inputs[0], case.order, *inputs[1:], slots_E=slots_E)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.device, y.dtype)
    grads = torch.autograd.grad(y, inputs, pull)
    for ours, wanted in zip([y, *grads[:2], grads[2][slots_E], grads[3][slots_E]], expected, strict=True):
        assert torch.equal(ours, wanted)
    unused = torch.tensor([1, 2, 4], device=device)
    assert not grads[2][unused].any() and not grads[3][unused].any()


def test_experts_in_slots_of_an_arena() -> None:
    check_slots("cpu", torch.float32)


def without(case: Case, absent_TK: Tensor) -> Case:
    """The same with these entries absent and weights there that would be noticed."""
    return replace(
        case,
        experts_TK=case.experts_TK.masked_fill(absent_TK, -1),
        weights_TK=case.weights_TK.detach().masked_fill(absent_TK, torch.nan),
    )


ABSENCES = {"some": 0.4, "many": 0.9, "all": 1.1}


def check_absent_entries_and_an_arena(device: str, dtype: torch.dtype, share: float) -> None:
    """Absent entries are entries of weight zero; gradients of an arena that its owner writes to meanwhile go to the caller."""
    full = Case.draw(different_experts(150, 6, 3, 0), 6, size=128, hidden=64).to(device, dtype)
    absent_TK = (torch.rand(150, 3, generator=torch.Generator().manual_seed(1)) < share).to(device)
    expected = replace(full, weights_TK=full.weights_TK.masked_fill(absent_TK, 0)).results()
    case = without(full, absent_TK)
    slots_E = torch.tensor([6, 0, 3, 5, 8, 1], dtype=torch.int32, device=device)
    arena = [torch.full((9, *part.shape[1:]), 7.0, device=device, dtype=dtype) for part in (case.gate_up_ECD, case.down_EDF)]
    for rows, part in zip(arena, (case.gate_up_ECD, case.down_EDF), strict=True):
        rows[slots_E.long()] = part.detach()
    found: list[tuple[Tensor, Tensor]] = []
    order = expert_order(case.experts_TK, 6, num_entries=int((~absent_TK).sum()))
    x, weights = case.x_TD.detach().requires_grad_(), case.weights_TK.requires_grad_()

    def experts(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        return expert_mlp(x_TD, order, weights_TK, *arena, slots_E=slots_E, gradients=lambda *parts: found.append(parts))

    for recompute in (False, True):
        y = checkpoint(experts, x, weights, use_reentrant=False) if recompute else experts(x, weights)
        for rows in arena:
            rows[[2, 4, 7]] += 1.0  # of other layers
        pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.device, y.dtype)
        d_x, d_weights = torch.autograd.grad(y, (x, weights), pull)
        assert len(found) == 1 + recompute, "the caller is given the gradients once"
        d_gate_up, d_down = found[-1]
        names = ["y", "x", "weights", "gate_up", "down"]
        expected_weights = expected[2].masked_fill(absent_TK, 0)
        wanted = [expected[0], expected[1], expected_weights, expected[3], expected[4]]
        for name, ours, theirs in zip(names, (y.detach(), d_x, d_weights, d_gate_up, d_down), wanted, strict=True):
            assert ours.shape == theirs.shape and torch.isfinite(ours).all(), name
            assert relative(ours, theirs) < (1e-5 if dtype == torch.float32 else 1e-2) or not theirs.any(), name
            assert theirs.any() or not ours.any(), name
    with torch.no_grad():
        experts(x, weights)
    assert len(found) == 2


@pytest.mark.parametrize("share", ABSENCES.values(), ids=ABSENCES.keys())
def test_absent_entries_and_gradients_to_the_caller(share: float) -> None:
    check_absent_entries_and_an_arena("cpu", torch.float32, share)


@gpu
@needs_hopper
@pytest.mark.parametrize("share", ABSENCES.values(), ids=ABSENCES.keys())
def test_kernels_leave_absent_entries_out_and_give_gradients_to_the_caller(share: float) -> None:
    check_absent_entries_and_an_arena("cuda", torch.bfloat16, share)


def test_no_weights_are_weights_of_one() -> None:
    case = Case.draw(different_experts(6, 4, 2, 0), 4, size=4, hidden=2)
    ones = torch.ones_like(case.weights_TK)
    arguments = (case.x_TD, case.order)
    torch.testing.assert_close(
        expert_mlp(*arguments, None, case.gate_up_ECD, case.down_EDF),
        expert_mlp(*arguments, ones, case.gate_up_ECD, case.down_EDF),
    )


# ---------------------------------------------------------------- on a GPU


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def torch_bfloat16(case: Case, pull: int = 1) -> list[Tensor]:
    """What plain torch makes of the same numbers in bfloat16."""
    inputs = [t.detach().requires_grad_() for t in (case.x_TD, case.weights_TK, case.gate_up_ECD, case.down_EDF)]
    x, weights, gate_up, down = inputs
    y = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(down.shape[0]):
        token, choice = (case.experts_TK == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].t()).chunk(2, dim=-1)
        rows = (torch.nn.functional.silu(gate) * up) @ down[expert].t()
        y = y.index_add(0, token, rows * weights[token, choice, None])
    y = y.to(x.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, case.pull(pull).to(y.device, y.dtype))]


SHAPES = [
    (1, 4, 1, 64, 64),
    (77, 8, 2, 320, 64),
    (128, 2, 2, 64, 192),
    (500, 16, 4, 256, 128),
    (1000, 16, 4, 2048, 768),
    (300, 128, 8, 192, 320),
    (2048, 1, 1, 512, 1024),
    (257, 8, 2, 128, 96),
    (300, 4, 2, 64, 32),
    (400, 8, 2, 192, 224),
    (300, 4, 2, 128, COPIED_FROM),
]


@gpu
@needs_hopper
@pytest.mark.parametrize(("tokens", "experts", "top_k", "size", "hidden"), SHAPES)
@pytest.mark.parametrize("skew", [0.0, 1.0, 4.0])
def test_kernels_are_as_exact_as_torch(tokens: int, experts: int, top_k: int, size: int, hidden: int, skew: float) -> None:
    case = Case.draw(different_experts(tokens, experts, top_k, 3, skew), experts, size, hidden)
    exact = case.to("cuda", torch.float32).results()
    ours = case.to("cuda", torch.bfloat16).results()
    torch_results = torch_bfloat16(case.to("cuda", torch.bfloat16))
    for name, found, theirs, wanted in zip(["y", "x", "weights", "gate_up", "down"], ours, torch_results, exact, strict=True):
        assert torch.isfinite(found).all(), name
        luck = 2**-8 / found.numel() ** 0.5  # a few numbers may happen to round well in the other's hands
        assert relative(found, wanted) <= 2 * relative(theirs, wanted) + luck, name


@gpu
@needs_hopper
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 400), st.integers(1, 40), st.integers(1, 5), st.integers(1, 10), st.integers(0, 99), st.data())
def test_any_legal_routing(tokens: int, experts: int, sizes: int, hiddens: int, seed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, min(experts, 8)))
    chosen = different_experts(tokens, experts, top_k, seed, data.draw(st.floats(0, 3)))
    case = Case.draw(chosen, experts, 64 * sizes, 32 * hiddens, seed)
    exact, ours = case.to("cuda", torch.float32).results(), case.to("cuda", torch.bfloat16).results()
    for name, found, wanted in zip(["y", "x", "weights", "gate_up", "down"], ours, exact, strict=True):
        assert found.shape == wanted.shape and torch.isfinite(found).all(), name
        if name == "weights":  # <dy, y>: one or two of them may cancel out, so what such products usually come to counts too
            usual = (case.pull(1).norm(dim=1) * exact[0].cpu().double().norm(dim=1)).norm() / (64 * sizes) ** 0.5
            assert (found.cpu() - wanted.cpu()).norm() <= 2e-2 * max(wanted.cpu().norm(), usual), name
        else:
            assert relative(found, wanted) < 2e-2 or not wanted.any(), name


@gpu
@needs_hopper
def test_kernels_in_slots_of_an_arena() -> None:
    check_slots("cuda", torch.bfloat16)


@gpu
@needs_hopper
def test_runs_repeat_bit_for_bit_whatever_lay_in_memory() -> None:
    case = Case.draw(different_experts(900, 16, 4, 3, 1.0), 16, 256, 192).to("cuda", torch.bfloat16)
    first = case.results()
    for _ in range(5):
        junk = [torch.full((1 << 22,), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(8)]
        del junk
        for ours, before in zip(case.results(), first, strict=True):
            assert torch.equal(ours, before)


@gpu
@needs_hopper
@pytest.mark.parametrize(("size", "hidden"), [(320, 96), (2048, 768)])
@pytest.mark.parametrize("skew", [0.0, 4.0])
def test_gathered_rows_and_copied_ones_give_the_same_bits(
    size: int, hidden: int, skew: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case.draw(different_experts(700, 16, 4, 3, skew), 16, size, hidden).to("cuda", torch.bfloat16)
    gathered = case.results()
    monkeypatch.setattr("kernels.rows.COPIED_FROM", 1)
    for one, other in zip(gathered, case.results(), strict=True):
        assert torch.equal(one, other)


@gpu
@needs_hopper
def test_a_token_does_not_depend_on_its_batch() -> None:
    case = Case.draw(different_experts(700, 16, 4, 3, 1.0), 16, 256, 192).to("cuda", torch.bfloat16)
    whole = expert_mlp(case.x_TD, case.order, case.weights_TK, case.gate_up_ECD, case.down_EDF)
    for part in (slice(0, 1), slice(5, 6), slice(3, 40), slice(200, 700)):
        order = expert_order(case.experts_TK[part], 16)
        alone = expert_mlp(case.x_TD[part], order, case.weights_TK[part], case.gate_up_ECD, case.down_EDF)
        assert torch.equal(alone, whole[part])


@gpu
@needs_hopper
def test_computed_again_results_are_left_out_and_gradients_are_the_same() -> None:
    case = Case.draw(different_experts(700, 16, 4, 3, 1.0), 16, 256, 192).to("cuda", torch.bfloat16)
    inputs = [t.requires_grad_() for t in (case.x_TD, case.weights_TK, case.gate_up_ECD, case.down_EDF)]
    pull = torch.randn_like(case.x_TD)
    ahead, again = (expert_mlp(inputs[0], case.order, *inputs[1:], again=again) for again in (False, True))
    assert ahead.any() and not again.any()
    for one, other in zip(torch.autograd.grad(ahead, inputs, pull), torch.autograd.grad(again, inputs, pull), strict=True):
        assert torch.equal(one, other)


@gpu
@needs_hopper
def test_no_wait_for_the_gpu_and_replays_in_a_graph() -> None:
    case = Case.draw(different_experts(300, 8, 2, 3), 8, 128, 64).to("cuda", torch.bfloat16)
    other = Case.draw(different_experts(300, 8, 2, 9, 2.0), 8, 128, 64, seed=5).to("cuda", torch.bfloat16)
    inputs = [t.requires_grad_() for t in (case.x_TD, case.weights_TK, case.gate_up_ECD, case.down_EDF)]
    pull = torch.ones_like(case.x_TD)

    def step() -> list[Tensor]:
        y = expert_mlp(inputs[0], expert_order(case.experts_TK, 8), *inputs[1:])
        return [y.detach(), *torch.autograd.grad(y, inputs, pull)]

    graph, replays = captured(step)
    with torch.no_grad():
        case.experts_TK.copy_(other.experts_TK)
        for mine, new in zip(inputs, (other.x_TD, other.weights_TK, other.gate_up_ECD, other.down_EDF), strict=True):
            mine.copy_(new)
    graph.replay()
    for replayed, fresh in zip(replays, step(), strict=True):
        assert torch.equal(replayed, fresh)


@gpu
@needs_hopper
def test_what_is_kept_for_backward() -> None:
    tokens, experts, top_k, size, hidden = 4096, 16, 8, 512, 256
    case = Case.draw(different_experts(tokens, experts, top_k, 0), experts, size, hidden).to("cuda", torch.bfloat16)
    inputs = [t.requires_grad_() for t in (case.x_TD, case.weights_TK, case.gate_up_ECD, case.down_EDF)]
    order = case.order
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = expert_mlp(inputs[0], order, *inputs[1:])
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    assert kept <= 4 * tokens * top_k * hidden + 2 * 64 * 2 * hidden + 4096  # the pre-activations; x is the caller's


@gpu
@needs_hopper
def test_gradients_only_where_they_are_wanted_and_in_any_layout() -> None:
    case = Case.draw(different_experts(200, 4, 2, 0), 4, 128, 64).to("cuda", torch.bfloat16)
    inputs = [case.x_TD, case.weights_TK, case.gate_up_ECD, case.down_EDF]
    everything = [t.detach().clone().requires_grad_() for t in inputs]
    y = expert_mlp(everything[0], case.order, *everything[1:])
    wanted = torch.autograd.grad(y, everything, torch.ones_like(y))
    for index in range(4):
        some = [t.detach().clone().requires_grad_(i == index) for i, t in enumerate(inputs)]
        expert_mlp(some[0], case.order, *some[1:]).sum().backward()  # an expanded gradient
        assert [t.grad is not None for t in some] == [i == index for i in range(4)]
        grad = some[index].grad
        assert grad is not None and torch.equal(grad, wanted[index])
    wide = torch.cat([case.x_TD[:, :4], case.x_TD, case.x_TD], dim=1)
    for view in (
        wide[:, 4:132],
        wide[:, 132:].contiguous(),
        torch.cat([wide[:, 4:]] * 2)[:200, :128],
        case.x_TD.t().contiguous().t(),
    ):
        assert torch.equal(view, case.x_TD)
        assert torch.equal(expert_mlp(view, case.order, *inputs[1:]), y.detach()), (view.stride(), view.data_ptr() % 16)


@gpu
@needs_hopper
def test_more_than_2_to_the_31_numbers() -> None:
    tokens, top_k, size, hidden = 150_000, 8, 2048, 64
    torch.manual_seed(0)
    x = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.randn(8, 2 * hidden, size, device="cuda", dtype=torch.bfloat16) / size**0.5
    down = torch.randn(8, size, hidden, device="cuda", dtype=torch.bfloat16) / hidden**0.5
    experts_TK = torch.arange(8, device="cuda").expand(tokens, top_k).contiguous()
    weights = torch.rand(tokens, top_k, device="cuda")
    last = slice(tokens - 50, tokens)
    with torch.no_grad():
        whole = expert_mlp(x, expert_order(experts_TK, 8), weights, gate_up, down)
        tail = expert_mlp(x[last], expert_order(experts_TK[last], 8), weights[last], gate_up, down)
    assert torch.equal(whole[last], tail)


@gpu
@needs_hopper
@pytest.mark.parametrize(
    ("size", "hidden", "dtype", "message"),
    [
        (96, 64, torch.bfloat16, "hidden_size=96 is not a multiple of 64"),
        (64, 48, torch.bfloat16, "expert_hidden_size=48 is not a multiple of 32.*use 64"),
        (64, 64, torch.float16, "take bfloat16"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(size: int, hidden: int, dtype: torch.dtype, message: str) -> None:
    case = Case.draw(different_experts(4, 2, 1, 0), 2, size, hidden).to("cuda", dtype)
    with pytest.raises(UserError, match=message):
        expert_mlp(case.x_TD, case.order, case.weights_TK, case.gate_up_ECD, case.down_EDF)
