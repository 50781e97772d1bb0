"""The competing implementations, with one signature per benchmark. Plain torch always takes part, packages if installed.

Shape letters: T tokens, D model, F expert hidden, E experts, K top-k, N = T * K, C = 2F (gate rows, then up
rows), V vocabulary.

    experts     (x_TD, experts_TK, weights_TK, gate_up_ECD, down_EDF) -> y_TD; from routing to output, sorting included
    vocab_loss  (hidden_TD, head_VD, targets_T) -> negative log-likelihood of every target, (T,)
    router      (logits_TE, bias_E, top_k) -> weights_TK
    generation  (model, Generation, device) -> tokens a second

Each gets the same inputs as Tessera's functions (int64 expert numbers, float32 combine weights) and converts them itself if it
must. The packages were read at the versions named beside them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.config.model import ModelConfig
from trainer.estimate import vocab_size

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Package:
    """Where a peer comes from."""

    modules: tuple[str, ...]  # what must be importable
    distribution: str  # what pip calls it

    def installed(self) -> bool:
        return all(importlib.util.find_spec(module) is not None for module in self.modules)

    def version(self) -> str:
        return importlib.metadata.version(self.distribution)


LIGER = Package(("liger_kernel", "triton"), "liger-kernel")
PACKAGES = {
    "liger": LIGER,
    "liger_sm90": Package(("liger_kernel", "cutlass", "tvm_ffi"), "liger-kernel"),
    "scattermoe": Package(("scattermoe",), "scattermoe"),
    "sonicmoe": Package(("sonicmoe", "quack", "cutlass"), "sonic-moe"),
    "cce": Package(("cut_cross_entropy",), "cut-cross-entropy"),
    "transformers": Package(("transformers",), "transformers"),
    "cce_exact": Package(("cut_cross_entropy",), "cut-cross-entropy"),
}


# ---------------------------------------------------------------- experts


def torch_experts(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
    """The usual way in plain torch: sort, gather, two grouped products, back into token order, weighted sum.

    Grouped products take bfloat16 on a GPU; elsewhere a loop over the experts does the same.
    """
    if not x_TD.is_cuda:
        return _looped(x_TD, experts_TK, weights_TK, gate_up_ECD, down_EDF)
    (tokens, top_k), num_experts = experts_TK.shape, down_EDF.shape[0]
    sorted_N, entry_N = experts_TK.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(sorted_N, torch.arange(num_experts, device=x_TD.device), right=True).int()
    place_N = torch.empty_like(entry_N).scatter_(0, entry_N, torch.arange(entry_N.numel(), device=x_TD.device))
    x_ND = x_TD.index_select(0, entry_N // top_k)
    gate_NF, up_NF = functional.grouped_mm(x_ND, gate_up_ECD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    y_ND = functional.grouped_mm(functional.silu(gate_NF) * up_NF, down_EDF.transpose(1, 2), offs=ends_E)
    y_TKD = y_ND.index_select(0, place_N).view(tokens, top_k, -1)
    return (y_TKD * weights_TK.to(y_TKD.dtype)[..., None]).sum(dim=1)


def _looped(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for expert, (gate_up_CD, down_DF) in enumerate(zip(gate_up_ECD.unbind(0), down_EDF.unbind(0), strict=True)):
        token_R, choice_R = (experts_TK == expert).nonzero(as_tuple=True)
        gate_RF, up_RF = functional.linear(x_TD[token_R], gate_up_CD).chunk(2, dim=-1)
        y_RD = functional.linear(functional.silu(gate_RF) * up_RF, down_DF)
        y_TD = y_TD.index_add(0, token_R, y_RD * weights_TK[token_R, choice_R, None].to(y_RD.dtype))
    return y_TD


def liger_experts() -> Callable[..., Tensor]:
    """Liger 0.8.5: Triton kernels, pre-activations saved."""
    from liger_kernel.ops import LigerFusedMoEFunction

    def work(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x_TD, gate_up_ECD, down_EDF, experts_TK.int(), weights_TK)

    return work


def scattermoe_experts() -> Callable[..., Tensor]:
    """ScatterMoE 0.3.0: Triton products that gather on the way in or scatter on the way out."""
    from scattermoe import flatten_sort_count, parallel_linear

    def work(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
        order = flatten_sort_count(experts_TK, num_experts=down_EDF.shape[0])
        gate_up_NC = parallel_linear(x_TD, gate_up_ECD.transpose(1, 2), experts_TK.shape[1], *order, grouped_out=True)
        gate_NF, up_NF = gate_up_NC.chunk(2, dim=-1)
        act_NF = functional.silu(gate_NF) * up_NF
        return parallel_linear(act_NF, down_EDF.transpose(1, 2), 1, *order, gates=weights_TK.to(x_TD.dtype), grouped_in=True)

    return work


def sonicmoe_experts() -> Callable[..., Tensor]:
    """SonicMoE 0.1.2 through its entry for routings that were made elsewhere; gate rows before up rows, as ours lie."""
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    def work(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_ECD: Tensor, down_EDF: Tensor) -> Tensor:
        tokens, top_k = experts_TK.shape
        token_N = torch.arange(tokens, device=x_TD.device, dtype=torch.int32).repeat_interleave(top_k)
        y_TD, _ = moe_general_routing_inputs(
            x_TD,
            weights_TK.reshape(-1),
            token_N,
            experts_TK.reshape(-1).int(),
            gate_up_ECD.permute(1, 2, 0),
            None,
            down_EDF.permute(1, 2, 0),
            None,
            down_EDF.shape[0],
            torch.cuda.current_stream().cuda_stream,
            ActivationType.SWIGLU,
            concat_layout=True,
        )
        return y_TD

    return work


# ---------------------------------------------------------------- vocabulary


def naive_vocab_loss(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """All logits at once, the softmax in float32."""
    return functional.cross_entropy(functional.linear(hidden_TD, head_VD).float(), targets_T, reduction="none")


def chunked_vocab_loss(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """The same for 1,024 tokens at a time, computed again in the backward pass."""
    pieces = zip(hidden_TD.split(CHUNK_TOKENS), targets_T.split(CHUNK_TOKENS), strict=True)
    return torch.cat([_recomputed(hidden, head_VD, targets) for hidden, targets in pieces])


def _recomputed(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    return checkpoint(naive_vocab_loss, hidden_TD, head_VD, targets_T, use_reentrant=False, preserve_rng_state=False)


def cce_vocab_loss() -> Callable[..., Tensor]:
    """Cut cross-entropy 25.1.1 as it comes: gradients below 2^-12 are skipped."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden_TD, head_VD, targets_T: linear_cross_entropy(hidden_TD, head_VD, targets_T, reduction="none")


def cce_exact_vocab_loss() -> Callable[..., Tensor]:
    """Cut cross-entropy 25.1.1 without skipping."""
    from cut_cross_entropy import linear_cross_entropy

    def work(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_TD, head_VD, targets_T, reduction="none", filter_eps=None)

    return work


def liger_vocab_loss() -> Callable[..., Tensor]:
    """Liger 0.8.5, Triton, a loss per token: its gradients are then computed in the backward pass."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    def work(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
        # bias, class weights, ignored index, z-loss, label smoothing, reduction
        return LigerFusedLinearCrossEntropyFunction.apply(hidden_TD, head_VD, targets_T, None, None, -100, 0.0, 0.0, "none")[0]

    return work


def liger_sm90_vocab_loss() -> Callable[..., Tensor]:
    """Liger 0.8.5, CuTe DSL for Hopper."""
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    return lambda hidden_TD, head_VD, targets_T: LigerFusedScaledCrossEntropySM90Function.apply(hidden_TD, head_VD, targets_T)


# ---------------------------------------------------------------- router


def torch_router(logits_TE: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    """softmax, topk of score + bias, renormalised weights; then the order and the counts that dispatch needs."""
    scores_TE = logits_TE.softmax(dim=-1)
    experts_TK = (scores_TE + bias_E).topk(top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    experts_N = experts_TK.reshape(-1)
    entry_N = experts_N.argsort(stable=True)
    torch.empty_like(entry_N).scatter_(0, entry_N, torch.arange(entry_N.numel(), device=entry_N.device))
    counts_E = torch.zeros(logits_TE.shape[1], dtype=torch.int64, device=experts_N.device)  # bincount would wait for the GPU
    counts_E.scatter_add_(0, experts_N, torch.ones_like(experts_N)).cumsum(0)
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True)


# ---------------------------------------------------------------- whole models


def transformers_model(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers 5: Qwen3MoE in the sizes of `model`, all layers MoE layers, random weights, its own grouped products."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.top_k,
        "moe_intermediate_size": model.expert_hidden_size,
        "max_position_embeddings": model.max_positions,
        "norm_topk_prob": model.renormalize,
        "tie_word_embeddings": model.tie_embeddings,
        "eos_token_id": None,
    }
    with device:
        return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes), dtype=dtype, experts_implementation="grouped_mm")


# ---------------------------------------------------------------- generation


@dataclass(frozen=True)
class Generation:
    """Sequences that all get `response` tokens after `prompt` random ones."""

    sequences: int
    prompt: int
    response: int
    seed: int


GenerationPeer = Callable[[ModelConfig, Generation, torch.device], float]


def transformers_generation() -> GenerationPeer:
    """transformers' generate over grouped products, in bfloat16."""

    def work(model: ModelConfig, asked: Generation, device: torch.device) -> float:
        peer = transformers_model(model, device, torch.bfloat16).eval()
        generator = torch.Generator().manual_seed(asked.seed)
        ids = torch.randint(vocab_size(model), (asked.sequences, asked.prompt), generator=generator)
        ids, times = ids.to(device), []
        for _ in range(3):
            started = time.perf_counter()
            peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=asked.response,
                max_new_tokens=asked.response,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            ).cpu()
            times.append(time.perf_counter() - started)
        return asked.sequences * asked.response / median(times[1:])

    return work


GENERATION_PEERS: Mapping[str, Callable[[], GenerationPeer]] = {"transformers": transformers_generation}


def generation_rates(
    contenders: Mapping[str, Callable[[], GenerationPeer]], model: ModelConfig, asked: Generation, device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Of each peer its tokens a second, or why there are none. What it took of a GPU's memory is free again."""
    rates, failures = {}, {}
    for peer, load in contenders.items():
        try:
            rates[peer] = load()(model, asked, device)
        except Exception as error:  # a peer that cannot do it is a result
            failures[peer] = f"{type(error).__name__}: {error}"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rates, failures
