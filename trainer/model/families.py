"""Our models in the Hugging Face layout: config.json and the names of tensors.

Four families cover what we train: Qwen3-MoE, Mixtral and OLMoE (softmax router; they differ in the norms of queries and keys),
and GLM-4-MoE (sigmoid router, selection bias, shared experts).
Shape letters: D model, F expert hidden, C = 2F, E experts, L MoE layers, H heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kernels.errors import UserError
from trainer.config.model import GroupLimitedRouter, ModelConfig

OUR_KEY = "tessera"  # in config.json: what the architecture has no word for; also the mark of a folder that we wrote

# config.json key -> field, the same for all families
COMMON_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "num_experts_per_tok": "top_k",
    "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
}
# What transformers assumes when config.json does not say.
COMMON_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
}
DEFAULT_THETA = 10000.0
MOST_FURTHER_TOKENS = 100  # that a model may predict beside the next one; published ones have one to three layers for it
# Rows of these tensors are features of a head, in an order of their own where only a share of them turns.
TURNED = tuple(f"self_attn.{part}" for part in ("q_proj.weight", "q_proj.bias", "q_norm.weight")) + tuple(
    f"self_attn.{part}" for part in ("k_proj.weight", "k_proj.bias", "k_norm.weight")
)


@dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    architecture: str
    model_type: str
    keys: Mapping[str, str]  # config.json key -> field, beyond COMMON_KEYS
    fixed: Mapping[str, Any]  # field -> the only value that the architecture expresses
    demands: Mapping[str, Any]  # config.json key -> the only value that we express
    defaults: Mapping[str, Any]
    theta: float = DEFAULT_THETA  # of rotary positions, if config.json does not say
    moe: str = "mlp"  # the module of router and experts in an MoE layer
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # the matrices of an expert


SOFTMAX: dict[str, Any] = {
    "router_scores": "softmax",
    "selection_bias": False,
    "num_shared_experts": 0,
    "routed_scale": 1.0,
    "attention_bias": False,  # that of Qwen3-MoE and OLMoE has a fourth part, on the output projection
    "rotary_share": 1.0,
}

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    keys={
        "num_experts": "num_experts",
        "intermediate_size": "dense_hidden_size",
        "moe_intermediate_size": "expert_hidden_size",
        "norm_topk_prob": "renormalize",
    },
    fixed=SOFTMAX | {"qk_norm": True},
    demands={
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    },
    defaults=COMMON_DEFAULTS
    | {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
)

GLM4_MOE = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    keys={
        "n_routed_experts": "num_experts",
        "intermediate_size": "dense_hidden_size",
        "moe_intermediate_size": "expert_hidden_size",
        "norm_topk_prob": "renormalize",
        "n_shared_experts": "num_shared_experts",
        "first_k_dense_replace": "num_dense_layers",
        "routed_scaling_factor": "routed_scale",
        "use_qk_norm": "qk_norm",
        "attention_bias": "attention_bias",
    },
    fixed={"router_scores": "sigmoid"},
    demands={"hidden_act": "silu", "attention_dropout": 0.0},
    defaults=COMMON_DEFAULTS
    | {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
    },
)

OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    keys={"num_experts": "num_experts", "intermediate_size": "expert_hidden_size", "norm_topk_prob": "renormalize"},
    fixed=SOFTMAX | {"qk_norm": "all_heads", "num_dense_layers": 0},
    demands={"attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "attention_dropout": 0.0},
    defaults=COMMON_DEFAULTS
    | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "norm_topk_prob": False, "clip_qkv": None},
)

MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    keys={"num_local_experts": "num_experts", "intermediate_size": "expert_hidden_size"},
    fixed=SOFTMAX | {"qk_norm": False, "num_dense_layers": 0, "renormalize": True},
    demands={"sliding_window": None, "hidden_act": "silu", "attention_dropout": 0.0},
    defaults=COMMON_DEFAULTS | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "sliding_window": None},
    theta=1e6,
    moe="block_sparse_moe",
    parts=("w1", "w3", "w2"),
)

FAMILIES = (QWEN3_MOE, GLM4_MOE, OLMOE, MIXTRAL)
GROUPS = ("n_group", "topk_group")  # config.json keys of GLM
EXPRESSED_ROUTERS = ("top_k", "noisy_top_k", "group_limited")


# ---------------------------------------------------------------- config.json


def family_of(config: ModelConfig) -> Family:
    """The family that expresses what a model computes in generation, where a noisy router has no noise.

    Raises UserError naming the fields that stand in the way.
    """
    if config.router.kind not in EXPRESSED_ROUTERS:
        raise UserError(
            f"no Hugging Face architecture expresses this model: model.router.kind={config.router.kind}, and theirs have one "
            f"matrix for a router, as {', '.join(EXPRESSED_ROUTERS)}; go on from its checkpoint, or train with one of these"
        )
    obstacles = []
    for family in FAMILIES:
        values = config.model_dump()
        wrong = [f"{name}={wanted} (is {values[name]})" for name, wanted in family.fixed.items() if values[name] != wanted]
        if family is not GLM4_MOE and isinstance(config.router, GroupLimitedRouter):
            wrong.append("router.kind=top_k (is group_limited)")
        if family is GLM4_MOE and config.num_experts < 2:
            wrong.append(f"num_experts of at least 2 (is {config.num_experts})")
        if family is GLM4_MOE and config.qk_norm == "all_heads":
            wrong.append("qk_norm=True or False (is all_heads)")
        if family is OLMOE and config.head_dim * config.num_heads != config.hidden_size:
            wrong.append(f"head_dim * num_heads = hidden_size (is {config.head_dim} * {config.num_heads})")
        if not wrong:
            return family
        obstacles.append(f"{family.architecture} needs {', '.join(wrong)}")
    raise UserError(f"no Hugging Face architecture expresses this model: {'; '.join(obstacles)}")


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What config.json says about the model."""
    family = family_of(config)
    fields = config.model_dump()
    content: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    content |= {key: fields[field] for key, field in (COMMON_KEYS | dict(family.keys)).items()}
    content |= family.demands
    # rope_theta stands where transformers 5 reads it and where earlier readers do.
    rotary = {"rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_share}
    content |= rotary | {"rope_parameters": {"rope_type": "default"} | rotary}
    if family is QWEN3_MOE:
        content["mlp_only_layers"] = list(range(config.num_dense_layers))
    elif family is GLM4_MOE:
        content["num_nextn_predict_layers"] = 0
        router = config.router
        groups = (router.groups, router.top_groups) if isinstance(router, GroupLimitedRouter) else (1, 1)
        content |= dict(zip(GROUPS, groups, strict=True))
    return content | {OUR_KEY: {"selection_bias": config.selection_bias}}


def parse_config(content: Mapping[str, Any], path: Path) -> tuple[Family, ModelConfig]:
    """The reverse of `config_json`, also for files that others wrote. Raises UserError for what we do not have."""
    try:
        return _parsed(content, path)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} has a setting of a wrong kind: {error}") from error


def _parsed(content: Mapping[str, Any], path: Path) -> tuple[Family, ModelConfig]:
    family = _family_named(content, path)
    known = {**family.defaults, **{key: value for key, value in content.items() if value is not None}}
    if "num_local_experts" in known:  # transformers 5 writes this name for all
        known |= {"num_experts": known["num_local_experts"], "n_routed_experts": known["num_local_experts"]}
    if "head_dim" not in known and known.get("num_attention_heads"):
        known["head_dim"] = known.get("hidden_size", 0) // known["num_attention_heads"]
    keys = COMMON_KEYS | dict(family.keys)
    if missing := [key for key in keys if key not in known]:
        raise UserError(f"{path} does not say {', '.join(missing)}")
    wrong = [f"{key}={known[key]} (only {wanted})" for key, wanted in family.demands.items() if known[key] != wanted]
    wrong += [f"{key}={content[key]}" for key in ("quantization_config",) if content.get(key)]
    theta, share, unsupported = _rotary(family, known)
    if wrong := wrong + unsupported:
        raise UserError(f"{path} asks for what Tessera does not support: {', '.join(wrong)}")
    fields = (
        dict(family.fixed)
        | {"router": _router(family, known)}
        | {field: known[key] for key, field in keys.items()}
        | {"rope_theta": theta, "rotary_share": share}
    )
    fields.setdefault("dense_hidden_size", fields["expert_hidden_size"])  # of no layer
    if family is QWEN3_MOE:
        fields["num_dense_layers"] = _num_first_layers(known["mlp_only_layers"], path)
    elif family is GLM4_MOE:
        fields["selection_bias"] = known.get(OUR_KEY, {}).get("selection_bias", True)
    try:
        return family, ModelConfig.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise UserError(f"{path} describes no valid model: {problems}") from None


def _router(family: Family, known: Mapping[str, Any]) -> dict[str, Any]:
    """Of GLM, whose experts may stand in groups; all of them are one."""
    groups, top_groups = (known[key] for key in GROUPS) if family is GLM4_MOE else (1, 1)
    if groups == top_groups:
        return {"kind": "top_k"}
    return {"kind": "group_limited", "groups": groups, "top_groups": top_groups}


def unused_layers(content: Mapping[str, Any], config: ModelConfig) -> tuple[str, ...]:
    """How names of tensors begin that predict tokens further ahead (multi-token prediction) and are no part of the model."""
    extra = content.get("num_nextn_predict_layers")
    if not isinstance(extra, int):
        return ()
    return tuple(f"model.layers.{config.num_layers + place}." for place in range(min(extra, MOST_FURTHER_TOKENS)))


def _family_named(content: Mapping[str, Any], path: Path) -> Family:
    architectures = content.get("architectures") or []
    for family in FAMILIES:
        if family.architecture in architectures or (not architectures and content.get("model_type") == family.model_type):
            return family
    found = ", ".join(architectures) or content.get("model_type") or "none"
    raise UserError(f"{path}: architecture {found} is not supported; {', '.join(f.architecture for f in FAMILIES)} are")


def _rotary(family: Family, known: Mapping[str, Any]) -> tuple[float, float, list[str]]:
    """theta, the share of a head that turns, and the settings of the rotary embedding that we do not have."""
    rotary = known.get("rope_scaling") or known.get("rope_parameters") or {}  # in the order that transformers has
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    usual_share = 0.5 if family is GLM4_MOE else 1.0
    share = rotary.get("partial_rotary_factor", known.get("partial_rotary_factor", usual_share))
    unsupported = [] if kind == "default" else [f"rope_type={kind} (only default)"]
    if family is not GLM4_MOE and share != 1.0:
        unsupported.append(f"partial_rotary_factor={share} (only 1.0)")
    return rotary.get("rope_theta", known.get("rope_theta", family.theta)), share, unsupported


def _num_first_layers(mlp_only_layers: list[int], path: Path) -> int:
    if sorted(mlp_only_layers) != list(range(len(mlp_only_layers))):
        raise UserError(f"{path}: mlp_only_layers={mlp_only_layers}, but only the first layers of a model can be dense here")
    return len(mlp_only_layers)


# ---------------------------------------------------------------- tensors


def tensors_by_name(family: Family, config: ModelConfig, state: Mapping[str, Tensor], *, fused: bool) -> dict[str, Tensor]:
    """Every tensor of the Hugging Face layout as a view into `state` (names and shapes of LanguageModel.state()).

    Reading through the views exports a model, copying into them imports one. Expert matrices stand one by one, as on the
    hub, or with `fused` as (E, C, D) and (E, D, F).
    """
    tensors = {"model.embed_tokens.weight": state["dense.embedding.weight"], "model.norm.weight": state["dense.norm.weight"]}
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = state["dense.head.weight"]
    for layer in range(config.num_layers):
        ours, theirs = f"dense.blocks.{layer}.", f"model.layers.{layer}."
        tensors[theirs + "input_layernorm.weight"] = state[ours + "attention_norm.weight"]
        tensors[theirs + "post_attention_layernorm.weight"] = state[ours + "mlp_norm.weight"]
        tensors |= _attention(config, state, ours + "attention.", theirs + "self_attn.")
        if layer < config.num_dense_layers:
            tensors |= _swiglu(state[ours + "mlp.gate_up.weight"], state[ours + "mlp.down.weight"], theirs + "mlp.")
            continue
        moe = "mlp" if fused else family.moe
        tensors[f"{theirs}{moe}.gate.weight"] = state[ours + "mlp.gate.weight"]
        moe_layer = layer - config.num_dense_layers
        gate_up_ECD, down_EDF = state["experts.gate_up"][moe_layer], state["experts.down"][moe_layer]
        if fused:
            tensors |= {theirs + "mlp.experts.gate_up_proj": gate_up_ECD, theirs + "mlp.experts.down_proj": down_EDF}
        else:
            for expert, (gate_up_CD, down_DF) in enumerate(zip(gate_up_ECD, down_EDF, strict=True)):
                tensors |= _swiglu(gate_up_CD, down_DF, f"{theirs}{moe}.experts.{expert}.", family.parts)
        if family is GLM4_MOE:
            tensors |= _glm_extras(config, state, layer)
    return tensors


def _attention(config: ModelConfig, state: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    tensors = {theirs + "o_proj.weight": state[ours + "output.weight"]}
    for our_name, their_name in (("query", "q"), ("key", "k"), ("value", "v")):
        tensors[f"{theirs}{their_name}_proj.weight"] = state[f"{ours}{our_name}.weight"]
        if config.attention_bias:
            tensors[f"{theirs}{their_name}_proj.bias"] = state[f"{ours}{our_name}.bias"]
    if config.qk_norm:
        tensors[theirs + "q_norm.weight"] = state[ours + "query_norm.weight"]
        tensors[theirs + "k_norm.weight"] = state[ours + "key_norm.weight"]
    return tensors


def _swiglu(
    gate_up_CD: Tensor, down_DF: Tensor, theirs: str, parts: tuple[str, str, str] = QWEN3_MOE.parts
) -> dict[str, Tensor]:
    matrices = (*gate_up_CD.chunk(2), down_DF)
    return {f"{theirs}{part}.weight": matrix for part, matrix in zip(parts, matrices, strict=True)}


def _glm_extras(config: ModelConfig, state: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The selection bias (zeros where ours has none) and the shared experts (matrices without elements where ours has none)."""
    ours, theirs = f"dense.blocks.{layer}.mlp.shared.", f"model.layers.{layer}.mlp."
    bias_E = state["bias"][layer - config.num_dense_layers]
    tensors = {theirs + "gate.e_score_correction_bias": bias_E if config.selection_bias else torch.zeros_like(bias_E)}
    if config.num_shared_experts:
        gate_up_CD, down_DF = state[ours + "gate_up.weight"], state[ours + "down.weight"]
    else:
        like = state["dense.norm.weight"]
        gate_up_CD, down_DF = like.new_empty(0, config.hidden_size), like.new_empty(config.hidden_size, 0)
    return tensors | _swiglu(gate_up_CD, down_DF, theirs + "shared_experts.")


# ---------------------------------------------------------------- features of a head


def our_features(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """A tensor of theirs with the features of heads in our order; `name` is that of the layout."""
    return _ordered(tensor, _feature_order(config)) if _has_an_order(name, config) else tensor


def their_features(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The reverse of `our_features`."""
    return _ordered(tensor, _feature_order(config).argsort()) if _has_an_order(name, config) else tensor


def _has_an_order(name: str, config: ModelConfig) -> bool:
    return config.rotary_dim < config.head_dim and name.endswith(TURNED)


def _ordered(tensor: Tensor, order_d: Tensor) -> Tensor:
    """Reordered along the first dim, which is that of all heads or of the features of one."""
    return tensor.unflatten(0, (-1, len(order_d)))[:, order_d].flatten(0, 1)


def _feature_order(config: ModelConfig) -> Tensor:
    """(d,) places in their order. Theirs are the first of each turning pair, the second ones, and then those that do not turn;
    ours, in which i and i + d/2 are a pair, put half of these after the first ones and half after the second ones."""
    first_d, second_d = torch.arange(config.rotary_dim).chunk(2)
    still_d = torch.arange(config.rotary_dim, config.head_dim).chunk(2)
    return torch.cat((first_d, still_d[0], second_d, still_d[1]))
