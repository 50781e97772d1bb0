"""Gates in the model: noise while it learns and at no other time, the same when computed again; first values; counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import tiny_model
from trainer.estimate import flops_per_token
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.gate import CosineGate, NoisyGate, RouterNoise, router_noise
from trainer.model.transformer import LanguageModel, Output, parameter_counts

CPU = torch.device("cpu")
NOISY, COSINE = {"kind": "noisy_top_k"}, {"kind": "cosine", "size": 6, "temperature": 0.3}
TOKENS = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.zeros(4, 12, dtype=torch.int32)


def forward(model: LanguageModel, noise: RouterNoise | None, rows: slice = slice(None), **options: Any) -> Output:
    documents = DOCUMENTS[rows]
    attend, layers = PackedAttention(documents, documents.device), model.experts.layers()
    inputs = TOKENS[rows], positions_of(documents), documents >= 0, attend, layers, model.bias_LE
    output: Output = model.dense(*inputs, noise=noise, **options)
    return output


def noise(update: int = 0, rows: range = range(4), seed: int = 3) -> RouterNoise:
    return router_noise(seed, update, rows, 12, CPU)


def test_without_noise_a_noisy_router_is_the_plain_one() -> None:
    model, plain = (LanguageModel.initialize(tiny_model(router=r), seed=0) for r in (NOISY, {"kind": "top_k"}))
    found, expected = forward(model, None), forward(plain, None)
    assert torch.equal(found.hidden_BSD, expected.hidden_BSD) and torch.equal(found.counts_LE, expected.counts_LE)


def test_noise_follows_seed_update_and_row_and_not_how_rows_are_dealt_out() -> None:
    model = LanguageModel.initialize(tiny_model(router=NOISY), seed=0)
    whole = forward(model, noise())
    assert torch.equal(forward(model, noise()).hidden_BSD, whole.hidden_BSD)
    for other in (None, noise(update=1), noise(seed=4), noise(rows=range(4, 8))):
        assert not torch.equal(forward(model, other).counts_LE, whole.counts_LE)
    parts = [forward(model, noise(rows=range(first, first + 2)), slice(first, first + 2)) for first in (0, 2)]
    assert torch.equal(torch.stack([part.counts_LE for part in parts]).sum(dim=0), whole.counts_LE)
    torch.testing.assert_close(torch.cat([part.hidden_BSD for part in parts]), whole.hidden_BSD)
    normal = [noise().flattened().normal(layer, 8) for layer in (1, 2)]
    assert not torch.equal(*normal), "each layer has noise of its own"


def test_recomputed_activations_draw_the_same_noise() -> None:
    results = []
    for recompute in (False, True):
        model = LanguageModel.initialize(tiny_model(router=NOISY), seed=0)
        output = forward(model, noise(), recompute=recompute)
        output.hidden_BSD.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.dense.named_parameters()}
        results.append({"hidden": output.hidden_BSD.detach(), "counts": output.counts_LE} | gradients)
    assert all(value is not None and bool(value.any()) for name, value in results[0].items() if ".gate." in name)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_gates_begin_as_their_papers_say() -> None:
    noisy, cosine = (LanguageModel.initialize(tiny_model(router=router), seed=0).dense.gates() for router in (NOISY, COSINE))
    for gate in noisy:
        assert isinstance(gate, NoisyGate) and gate.weight.any() and not gate.noise.any()
    for gate in cosine:
        assert isinstance(gate, CosineGate) and float(gate.log_temperature.detach().exp()) == pytest.approx(0.3)
        assert float(gate.projection.detach().std()) == pytest.approx(0.2, rel=0.2)
    assert not torch.equal(noisy[0].weight, noisy[1].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(("router", "in_products", "beside"), [(NOISY, 8 * 32, 0), (COSINE, 6 * 32 + 6 * 8 - 8 * 32, 1)])
def test_their_parameters_and_flops_are_counted(router: dict[str, Any], in_products: int, beside: int) -> None:
    model, plain = tiny_model(router=router), tiny_model()
    more = 2 * (in_products + beside)  # of two MoE layers
    assert parameter_counts(model).dense - parameter_counts(plain).dense == more
    assert flops_per_token(model, 64) - flops_per_token(plain, 64) == 6 * more
