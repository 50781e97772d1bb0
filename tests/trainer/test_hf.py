"""The Hugging Face layout: what goes out loads in transformers, what transformers writes loads here, mistakes are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels.errors import UserError
from tests.trainer.tiny_models import PLAIN, TINY, glm, mixtral, olmoe, qwen, tokens
from trainer.config.model import CosineRouter, GroupLimitedRouter, NoisyTopKRouter
from trainer.config.run import TokenizerConfig
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.hf import load_pretrained, save_pretrained
from trainer.model.transformer import LanguageModel
from trainer.tokenizer import Tokenizer, train_tokenizer

QWEN = {
    "router_scores": "softmax",
    "selection_bias": False,
    "num_shared_experts": 0,
    "routed_scale": 1.0,
    "attention_bias": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen": QWEN | {"tie_embeddings": False, "rope_theta": 5000.0},
    "qwen tied": QWEN | {"renormalize": False, "num_dense_layers": 0},
    "olmoe": QWEN | {"qk_norm": "all_heads", "num_dense_layers": 0, "dense_hidden_size": TINY.expert_hidden_size},
    "mixtral": QWEN | {"qk_norm": False, "num_dense_layers": 0, "dense_hidden_size": TINY.expert_hidden_size},
    "glm": {"tie_embeddings": False, "rope_theta": 5000.0, "num_dense_layers": 2},
    "glm tied": {"num_shared_experts": 3, "qk_norm": False},
    "glm no shared": {"num_shared_experts": 0, "attention_bias": False, "renormalize": False},
    "glm half": {"rotary_share": 0.5, "tie_embeddings": False},
    "glm quarter": {"rotary_share": 0.25, "qk_norm": False},
    "glm no bias": PLAIN | {"selection_bias": False},
    "glm in groups": {"router": GroupLimitedRouter(kind="group_limited", groups=2, top_groups=1), "num_experts": 8},
}


def some_model(changes: dict[str, Any]) -> LanguageModel:
    model = LanguageModel.initialize(TINY.model_copy(update=changes), seed=0)
    if model.config.selection_bias:
        model.bias_LE.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    for name, tensor in model.state().items():
        if tensor.dim() == 1:  # norms and biases, which start as ones and zeros
            tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) / 4
    return model


def logits(model: LanguageModel, inputs: Tensor) -> Tensor:
    documents = torch.zeros_like(inputs)
    with torch.no_grad():
        return model.logits(inputs, positions_of(documents), documents >= 0, PackedAttention(documents, documents.device))


def assert_same_logits(ours: LanguageModel, theirs: Any) -> None:
    inputs = tokens(2, 12)
    with torch.no_grad():
        expected = theirs(inputs).logits
    assert (logits(ours, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # GLM without shared experts has empty matrices
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_exports_load_in_transformers_and_come_back_unchanged(changes: dict[str, Any], tmp_path: Path) -> None:
    model = some_model(changes)
    save_pretrained(model, tmp_path / "out", None)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    theirs, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same_logits(model, theirs)
    back = load_pretrained(tmp_path / "out", torch.float32)
    assert back.config == model.config
    torch.testing.assert_close(back.state(), model.state(), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen", "olmoe", "mixtral", "glm half"])
def test_a_model_survives_a_detour_through_transformers(family: str, tmp_path: Path) -> None:
    model = some_model(CONFIGS[family])
    save_pretrained(model, tmp_path / "out", None)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    back = load_pretrained(tmp_path / "theirs", torch.float32)
    assert back.config == model.config
    torch.testing.assert_close(back.state(), model.state(), rtol=0, atol=0)


@pytest.mark.parametrize("build", [qwen, olmoe, mixtral, glm], ids=["qwen", "olmoe", "mixtral", "glm"])
@pytest.mark.parametrize("original", [True, False], ids=["per expert", "fused"])
def test_what_transformers_saves_loads_here(build: Callable[..., Any], original: bool, tmp_path: Path) -> None:
    theirs = build()
    theirs.save_pretrained(tmp_path, save_original_format=original)
    assert_same_logits(load_pretrained(tmp_path, torch.float32), theirs)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    theirs = glm(num_nextn_predict_layers=1)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    further = {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in state.items() if "layers.2." in name}
    save_file(state | further | {"model.layers.3.eh_proj.weight": torch.zeros(2, 4)}, tmp_path / "model.safetensors")
    assert_same_logits(load_pretrained(tmp_path, torch.float32), theirs)


def test_large_models_are_sharded(tmp_path: Path) -> None:
    model = some_model(CONFIGS["qwen"])
    save_pretrained(model, tmp_path / "out", None, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for name, tensor in model.state().items() if name != "bias")
    assert_same_logits(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(load_pretrained(tmp_path / "out", torch.float32).state(), model.state(), rtol=0, atol=0)
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(UserError, match=f"lacks {files[1]}, which model.safetensors.index.json names"):
        load_pretrained(tmp_path / "out", torch.float32)


def test_bfloat16_is_kept_and_the_bias_stays_float32(tmp_path: Path) -> None:
    model = some_model(CONFIGS["glm"]).to(torch.device("cpu"), torch.bfloat16)
    save_pretrained(model, tmp_path / "out", None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    back = load_pretrained(tmp_path / "out", torch.bfloat16)
    assert back.bias_LE.dtype == torch.float32 and back.experts.down_LEDF.dtype == torch.bfloat16
    torch.testing.assert_close(back.state(), model.state(), rtol=0, atol=0)


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    config = TokenizerConfig(vocab_size=280, train_mib=1)
    tokenizer = train_tokenizer(iter(["def f(x): return x + 12\n" * 20]), config, folder, lambda line: None)
    tokenizer.save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


@pytest.mark.parametrize("changes", [CONFIGS["qwen"], CONFIGS["glm"]], ids=["qwen", "glm"])
def test_auto_tokenizer_gives_our_ids(changes: dict[str, Any], tokenizer_file: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(tokenizer_file)
    save_pretrained(some_model(changes | {"vocab_size": 300}), tmp_path / "out", ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("def g(y):\n\treturn y - 345", "  Grüße  \n\n x=1 "):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (ours.bos, ours.eos)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.json has \d+ tokens, the model only 96"):
        save_pretrained(some_model(CONFIGS["glm"]), tmp_path / "out", Tokenizer.load(tokenizer_file))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the folder


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    save_pretrained(some_model(CONFIGS["glm"]), out, None)
    save_pretrained(some_model(CONFIGS["qwen"]), out, None)
    assert load_pretrained(out, torch.float32).config.router_scores == "softmax"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="mine is not empty and holds no earlier export"):
        save_pretrained(some_model(CONFIGS["qwen"]), tmp_path / "mine", None)
    qwen().save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="theirs is not empty and holds no earlier export"):
        save_pretrained(some_model(CONFIGS["qwen"]), tmp_path / "theirs", None)
    with pytest.raises(UserError, match=r"thesis\.txt is a file"):
        save_pretrained(some_model(CONFIGS["qwen"]), tmp_path / "mine" / "thesis.txt", None)


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(some_model(CONFIGS["glm"]), tmp_path / "out", None)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.model.hf.save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(some_model(CONFIGS["qwen"]), tmp_path / "out", None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_pretrained(tmp_path / "out", torch.float32).config.router_scores == "sigmoid"


# ---------------------------------------------------------------- what cannot be


def test_a_model_that_no_architecture_expresses_is_refused_with_its_fields(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"router_scores": "softmax", "attention_bias": False})
    with pytest.raises(UserError) as caught:
        save_pretrained(LanguageModel.initialize(config, seed=0), tmp_path / "out", None)
    assert str(caught.value) == (
        "no Hugging Face architecture expresses this model: Qwen3MoeForCausalLM needs selection_bias=False (is True), "
        "num_shared_experts=0 (is 1), routed_scale=1.0 (is 1.5); Glm4MoeForCausalLM needs router_scores=sigmoid (is softmax); "
        "OlmoeForCausalLM needs selection_bias=False (is True), num_shared_experts=0 (is 1), routed_scale=1.0 (is 1.5), "
        "qk_norm=all_heads (is True), num_dense_layers=0 (is 1); MixtralForCausalLM needs selection_bias=False (is True), "
        "num_shared_experts=0 (is 1), routed_scale=1.0 (is 1.5), qk_norm=False (is True), num_dense_layers=0 (is 1)"
    )


def test_a_noisy_router_goes_out_as_what_it_is_without_noise(tmp_path: Path) -> None:
    noisy = some_model(CONFIGS["glm"] | {"router": NoisyTopKRouter(kind="noisy_top_k")})
    save_pretrained(noisy, tmp_path / "out", None)
    found = load_pretrained(tmp_path / "out", torch.float32)
    assert found.config.router == TINY.router
    documents = torch.zeros(2, 12, dtype=torch.int32)
    inputs = tokens(2, 12), positions_of(documents), documents >= 0, PackedAttention(documents, documents.device)
    assert torch.equal(found.logits(*inputs), noisy.logits(*inputs))


def test_a_cosine_router_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"router": CosineRouter(kind="cosine", size=2, temperature=0.07)})
    with pytest.raises(
        UserError, match=r"router\.kind=cosine, .* as top_k, noisy_top_k, group_limited; go on from its checkpoint"
    ):
        save_pretrained(LanguageModel.initialize(config, seed=0), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("qwen", {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not supported; Qwen3MoeForCausalLM, Glm4Moe"),
        ("qwen", {"architectures": None, "model_type": "jamba"}, "architecture jamba is not supported"),
        ("qwen", {"use_sliding_window": True, "sliding_window": 4}, r"use_sliding_window=True \(only False\)"),
        ("qwen", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type=yarn"),
        ("qwen", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type=linear"),
        ("qwen", {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_type=yarn"),
        ("qwen", {"attention_bias": True}, "attention_bias=True"),
        ("qwen", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\], but only the first layers"),
        ("qwen", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("qwen", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("qwen", {"hidden_size": None}, "does not say hidden_size"),
        ("qwen", {"num_experts_per_tok": 9}, r"top_k \(9\) is larger than num_experts \(4\)"),
        ("qwen", {"num_hidden_layers": "three"}, "describes no valid model: num_layers"),
        ("glm", {"n_group": 3, "topk_group": 1}, r"router\.groups \(3\) has to divide num_experts"),
        ("qwen", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("glm", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4}}, r"is 3 features, which make no"),
        ("glm half", {"num_hidden_layers": 2, "num_nextn_predict_layers": "x"}, "does not have: model.layers.2"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
        ("qwen", {"hidden_size": 16, "head_dim": 8}, r"lm_head.weight is \(96, 32\), but config.json makes it \(96, 16\)"),
        ("qwen", {"num_hidden_layers": 2}, "tensors that the model of its config.json does not have: model.layers.2"),
        ("qwen", {"num_hidden_layers": 4}, "lacks model.layers.3"),
    ],
)
def test_configurations_that_we_do_not_have_are_named(base: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_pretrained(some_model(CONFIGS[base]), tmp_path / "out", None)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "out", torch.float32)


def test_older_files_name_theta_and_head_dim_their_way(tmp_path: Path) -> None:
    model = some_model(CONFIGS["qwen"])
    save_pretrained(model, tmp_path / "out", None)
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    del content["rope_parameters"], content["head_dim"], content["tessera"]
    path.write_text(json.dumps(content | {"rope_scaling": None}))
    assert load_pretrained(tmp_path / "out", torch.float32).config == model.config


@pytest.fixture
def export(tmp_path: Path) -> Path:
    save_pretrained(some_model(CONFIGS["qwen"]), tmp_path / "out", None)
    return tmp_path / "out"


def damage_tensors(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_a_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")


def quantize_a_tensor(folder: Path, dtype: torch.dtype) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(dtype)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: quantize_a_tensor(folder, torch.int8), "model.norm.weight is int8, as of a quantized model"),
        (lambda folder: quantize_a_tensor(folder, torch.float8_e4m3fn), "model.norm.weight is float8_e4m3fn, as of a"),
        (damage_tensors, "model.safetensors is damaged: "),
        (lose_a_tensor, "lacks model.norm.weight"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "has neither model.safetensors nor model.safetensors.index.json",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is damaged: "),
        (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
        (lambda folder: (folder / "config.json").write_text('{"hidden_size": 3'), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json does not hold a JSON object"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index.json has no weight_map"),
    ],
)
def test_damaged_folders_are_named(damage: Callable[[Path], Any], message: str, export: Path) -> None:
    damage(export)
    with pytest.raises(UserError, match=message):
        load_pretrained(export, torch.float32)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_pretrained(tmp_path / "nowhere", torch.float32)
