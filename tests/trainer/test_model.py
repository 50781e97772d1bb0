"""The model: equal to transformers' models, independent documents, recomputation, initialisation and parameter counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.errors import UserError
from tests.trainer.tiny_models import PLAIN, TINY, glm, mixtral, olmoe, qwen, tokens
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.families import family_of, tensors_by_name, their_features
from trainer.model.hf import load_pretrained
from trainer.model.initial import initial_expert
from trainer.model.transformer import ExpertWeights, LanguageModel, Output, parameter_counts


def forward(model: LanguageModel, tokens_BS: Tensor, documents_BS: Tensor | None = None) -> Output:
    documents_BS = torch.zeros_like(tokens_BS) if documents_BS is None else documents_BS
    return model.forward(
        tokens_BS, positions_of(documents_BS), documents_BS >= 0, PackedAttention(documents_BS, documents_BS.device)
    )


def trainable(model: LanguageModel) -> LanguageModel:
    model.experts.gate_up_LECD.requires_grad_()
    model.experts.down_LEDF.requires_grad_()
    return model


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    """By the names of `state`."""
    found = {f"dense.{name}": parameter.grad for name, parameter in model.dense.named_parameters()}
    found |= {"experts.gate_up": model.experts.gate_up_LECD.grad, "experts.down": model.experts.down_LEDF.grad}
    found["bias"] = torch.zeros_like(model.bias_LE)
    assert all(grad is not None for grad in found.values())
    return {name: grad for name, grad in found.items() if grad is not None}


def assert_near(ours: Tensor, theirs: Tensor, name: str) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= 1e-5, f"{name} differs by {error:.1e} of its largest value"


@pytest.mark.parametrize(
    "theirs",
    [
        pytest.param(lambda: qwen(), id="qwen"),
        pytest.param(lambda: qwen(tie_word_embeddings=True, norm_topk_prob=False, mlp_only_layers=[]), id="qwen-tied"),
        pytest.param(lambda: olmoe(), id="olmoe"),
        pytest.param(lambda: mixtral(), id="mixtral"),
        pytest.param(lambda: glm(), id="glm"),
        pytest.param(lambda: glm(tie_word_embeddings=True, n_shared_experts=2, partial_rotary_factor=1.0), id="glm-tied-whole"),
        pytest.param(lambda: glm(use_qk_norm=False, norm_topk_prob=False, first_k_dense_replace=0), id="glm-plain"),
    ],
)
def test_forward_and_every_gradient_equal_transformers(theirs: Any, tmp_path: Path) -> None:
    reference = theirs()
    reference.save_pretrained(tmp_path)
    model = trainable(load_pretrained(tmp_path, torch.float32))
    inputs = tokens(2, 12)
    logits = model.dense.head_VD @ forward(model, inputs).hidden_BSD.transpose(1, 2)
    expected = reference(inputs).logits.transpose(1, 2)
    assert_near(logits, expected, "logits")
    torch.nn.functional.cross_entropy(logits[..., :-1], inputs[:, 1:]).backward()
    torch.nn.functional.cross_entropy(expected[..., :-1], inputs[:, 1:]).backward()
    ours = tensors_by_name(family_of(model.config), model.config, gradients(model), fused=True)
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert wanted.keys() == {name for name in ours if not name.endswith("e_score_correction_bias")}
    for name, grad in wanted.items():
        assert grad is not None, name
        assert_near(their_features(name, ours[name], model.config), grad, f"gradient of {name}")


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["everything", "plain"])
def test_packed_documents_give_what_they_give_alone(changes: dict[str, Any]) -> None:
    model = LanguageModel.initialize(TINY.model_copy(update=changes), seed=0)
    inputs = tokens(2, 16)
    documents = torch.tensor([[0] * 5 + [1] * 11, [2] * 3 + [3] * 6 + [-1] * 7], dtype=torch.int32)
    output = forward(model, inputs, documents)
    assert output.hidden_BSD.isfinite().all()
    counts = torch.zeros_like(output.counts_LE)
    for document in range(4):
        inside = documents == document
        alone = forward(model, inputs[inside][None])
        torch.testing.assert_close(output.hidden_BSD[inside], alone.hidden_BSD[0], rtol=1e-5, atol=1e-5)
        counts += alone.counts_LE
    assert torch.equal(output.counts_LE, counts), "padding counts for the load, or a document is routed differently"


def test_padding_gives_finite_gradients() -> None:
    model = trainable(LanguageModel.initialize(TINY, seed=0))
    documents = torch.tensor([[0] * 4 + [-1] * 4, [-1] * 8])
    forward(model, tokens(2, 8), documents).hidden_BSD[documents >= 0].sum().backward()
    for name, grad in gradients(model).items():
        assert grad.isfinite().all(), name


def test_positions_restart_at_every_document() -> None:
    documents = torch.tensor([[4, 4, 4, 7, 7, 4, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    assert positions_of(documents).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_recompute_gives_the_same_output_counts_and_gradients() -> None:
    documents = torch.tensor([[0] * 6 + [1] * 6])
    results = []
    for recompute in (False, True):
        model = trainable(LanguageModel.initialize(TINY, seed=0))
        output = model.dense(
            tokens(1, 12),
            positions_of(documents),
            documents >= 0,
            PackedAttention(documents, documents.device),
            model.experts.layers(),
            model.bias_LE,
            recompute=recompute,
        )
        output.hidden_BSD.square().sum().backward()
        results.append({"hidden": output.hidden_BSD.detach(), "counts": output.counts_LE} | gradients(model))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert results[0]["counts"].sum() == 2 * 12 * TINY.top_k


def test_the_selection_bias_moves_the_load() -> None:
    model = LanguageModel.initialize(TINY, seed=0)
    model.bias_LE[:, 3] = 10.0
    counts = forward(model, tokens(1, 12)).counts_LE
    assert counts[:, 3].tolist() == [12, 12]


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["everything", "plain"])
def test_parameter_counts_are_those_of_the_modules(changes: dict[str, Any]) -> None:
    config = TINY.model_copy(update=changes)
    model = LanguageModel.initialize(config, seed=0)
    counts = parameter_counts(config)
    experts = model.experts.gate_up_LECD.numel() + model.experts.down_LEDF.numel()
    assert counts.dense == sum(parameter.numel() for parameter in model.dense.parameters())
    assert counts.total == counts.dense + experts
    assert counts.per_expert * config.num_experts * config.num_moe_layers == experts
    assert counts.active == counts.dense + experts // config.num_experts * config.top_k
    assert forward(model, tokens(1, 4)).counts_LE.shape == (config.num_moe_layers, config.num_experts)


def test_a_rank_draws_the_experts_that_the_whole_model_has() -> None:
    whole = LanguageModel.initialize(TINY, seed=5).experts
    for layer in range(TINY.num_moe_layers):
        for expert in (1, 2):
            gate_up, down = initial_expert(TINY, 5, layer, expert)
            assert torch.equal(gate_up, whole.gate_up_LECD[layer, expert])
            assert torch.equal(down, whole.down_LEDF[layer, expert])
    matrices = [matrix for layer in whole.gate_up_LECD for matrix in layer]
    assert not any(torch.equal(a, b) for place, a in enumerate(matrices) for b in matrices[:place]), "two experts are equal"


def test_initial_values_follow_seed_and_scale() -> None:
    config = TINY.model_copy(update={"hidden_size": 128, "init_std": 0.02})
    first, again, other = (LanguageModel.initialize(config, seed).state() for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        if tensor.dim() > 1 and name != "bias":
            assert not torch.equal(tensor, other[name]), name
            residual = name.endswith(("attention.output.weight", "down.weight", "experts.down"))
            expected = 0.02 / (2 * 3) ** 0.5 if residual else 0.02
            assert tensor.std().item() == pytest.approx(expected, rel=0.1), name


def test_state_round_trip_and_its_errors() -> None:
    model, other = (LanguageModel.initialize(TINY, seed) for seed in (0, 1))
    state = {name: tensor.clone() for name, tensor in model.state().items()}
    other.load_state(state)
    torch.testing.assert_close(other.state(), state, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"only one of model and state has these tensors: bias \(1 in all\)"):
        other.load_state({name: tensor for name, tensor in state.items() if name != "bias"})
    with pytest.raises(UserError, match=r"experts.down is \(2, 4, 32, 16\) in the model and \(2, 4, 16, 32\) in the state"):
        other.load_state(state | {"experts.down": state["experts.down"].transpose(2, 3)})


def test_moving_to_bfloat16_keeps_the_bias_in_float32() -> None:
    model = LanguageModel.initialize(TINY, seed=0)
    inputs, documents = tokens(1, 8), torch.zeros(1, 8)
    arguments = (inputs, positions_of(documents), documents >= 0, PackedAttention(documents, documents.device))
    exact = model.logits(*arguments)
    model.to(torch.device("cpu"), torch.bfloat16)
    assert model.bias_LE.dtype == torch.float32 and model.experts.down_LEDF.dtype == torch.bfloat16
    rough = model.logits(*arguments)
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rough.flatten(), exact.flatten(), dim=0) > 0.95


def test_layers_share_memory_with_the_whole_tensor() -> None:
    weights = ExpertWeights(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 5, 2))
    weights.layers()[1].gate_up_ECD.fill_(1.0)
    assert weights.gate_up_LECD[1].eq(1.0).all() and weights.gate_up_LECD[0].eq(0.0).all()
