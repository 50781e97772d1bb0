"""The experts' MLPs against one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.expert_mlp import expert_mlp

COUNTS = {
    "even": [2, 2, 2],
    "some without rows": [0, 5, 0, 1, 0],
    "all on one": [0, 0, 7],
    "one row": [0, 1],
    "one expert": [4],
    "no rows": [0, 0],
}


def weights(experts: int, size: int, hidden: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(experts, 2 * hidden, size, dtype=torch.float64, generator=generator, requires_grad=True)
    return gate_up, torch.randn(experts, size, hidden, dtype=torch.float64, generator=generator, requires_grad=True)


def reference(x_RD: Tensor, counts: list[int], gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = []
    for x, expert in zip(x_RD, experts, strict=True):
        gate, up = (gate_up_ECD[expert] @ x).chunk(2)
        rows.append(down_EDF[expert] @ (gate * torch.sigmoid(gate) * up))
    return torch.stack(rows) if rows else x_RD * 1.0


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_forward_and_gradients_equal_the_reference(counts: list[int]) -> None:
    gate_up, down = weights(len(counts), 4, 3)
    x = torch.randn(sum(counts), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ours = expert_mlp(x, torch.tensor(counts), gate_up, down)
    expected = reference(x, counts, gate_up, down)
    torch.testing.assert_close(ours, expected)
    pull = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours_grads = torch.autograd.grad(ours, (x, gate_up, down), pull)
    expected_grads = torch.autograd.grad(expected, (x, gate_up, down), pull, allow_unused=True, materialize_grads=True)
    for ours_grad, expected_grad in zip(ours_grads, expected_grads, strict=True):
        torch.testing.assert_close(ours_grad, expected_grad)


def test_gradcheck_with_non_contiguous_rows() -> None:
    gate_up, down = weights(3, 4, 2)
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    counts = torch.tensor([3, 0, 2])
    assert torch.autograd.gradcheck(lambda x, g, d: expert_mlp(x.t(), counts, g, d), (x, gate_up, down))


def test_experts_without_rows_get_zero_gradients_not_none() -> None:
    gate_up, down = weights(3, 4, 2)
    x = torch.ones(2, 4, dtype=torch.float64)
    expert_mlp(x, torch.tensor([0, 2, 0]), gate_up, down).sum().backward()
    for grad in (gate_up.grad, down.grad):
        assert grad is not None
        assert (grad[0] == 0).all() and (grad[2] == 0).all() and (grad[1] != 0).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="grouped products run on a GPU")
@pytest.mark.parametrize("counts", [[40, 0, 3, 85], [0, 0, 0, 128], [128, 0, 0, 0], [1, 0, 0, 0]])
def test_grouped_products_equal_the_loop_within_bfloat16(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in ((sum(counts), 64), (4, 96, 64), (4, 64, 48))
    ]
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        inputs = [tensor.bfloat16().to(device, dtype).requires_grad_() for tensor in tensors]
        y = expert_mlp(inputs[0], torch.tensor(counts, device=device), inputs[1], inputs[2])
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(ours.float().cpu() / scale, expected / scale, rtol=0, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="grouped products run on a GPU")
@pytest.mark.parametrize("hidden", [16, 12])
def test_any_gradient_layout_and_size_on_a_gpu(hidden: int) -> None:
    gate_up, down = (tensor.detach().bfloat16().cuda().requires_grad_() for tensor in weights(3, 16, hidden))
    x = torch.ones(16, 9, dtype=torch.bfloat16, device="cuda").t().requires_grad_()
    y = expert_mlp(x, torch.tensor([4, 0, 5], device="cuda"), gate_up, down)
    of_sum = torch.autograd.grad(y.sum(), (x, gate_up, down), retain_graph=True)
    of_ones = torch.autograd.grad(y, (x, gate_up, down), torch.ones_like(y))
    for ours, expected in zip(of_sum, of_ones, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
