"""A decoder-only sparse mixture-of-experts transformer.

`Transformer` holds every parameter that is not an expert's; the experts and the attention come in as callables, so one model
serves a single device, expert-parallel ranks and a decoding engine. It keeps no state: positions, the selection bias and the
documents are arguments, the load of the experts is an output. `LanguageModel` puts everything into one process.

Shape letters: B batch, S sequence, T = B * S tokens, D model, F expert hidden, C = 2F, E experts, K top-k, V vocabulary,
L MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.errors import UserError
from kernels.expert_choice import choose_tokens
from kernels.replay import replay
from kernels.router import Routing, Scores, route
from parallel.chunked_experts import Collect
from parallel.moe_layer import LocalExperts, Recomputation
from trainer.config.model import ExpertChoiceRouter, GroupLimitedRouter, ModelConfig
from trainer.model.attention import rope
from trainer.model.gate import Gate, RouterNoise, gate
from trainer.model.initial import fill_normal, initial_expert, residual_std
from trainer.model.layers import Angles, Attend, Attention, Linear, RMSNorm, SwiGLU, linear
from trainer.model.recompute import recomputed


class LayerExperts(Protocol):
    """The experts of one MoE layer, wherever they are."""

    def prepare(self) -> None:
        """Called before the layer's attention, under which weights may travel."""

    def start(self, x_TD: Tensor, routing: Routing, recomputation: Recomputation | None) -> Collect:
        """Until results are on their way; what it returns waits for them and gives y_TD: for every token the sum over k of its
        combine weight times the output of its expert k. Computed again, for the backward pass, they may be left out."""


@dataclass(frozen=True)
class Output:
    hidden_BSD: Tensor  # after the final norm
    counts_LE: Tensor  # int64; entries of every expert from valid tokens
    experts_LTK: tuple[Tensor, ...]  # int64; the experts of every token
    depths_BSD: tuple[Tensor, ...]  # hidden states after the layers that were asked for
    replaced_BS: Tensor | None  # float32; of a replay: the share of a token's experts that its router would not have chosen


class Choice(NamedTuple):
    """What the gate of a layer decided."""

    counts_E: Tensor
    experts_TK: Tensor
    replaced_T: Tensor | None  # of a replay


class Weighing(TypedDict):
    """What `route` and `replay` share."""

    scores: Scores
    renormalize: bool
    scale: float
    valid_T: Tensor


class Selection(TypedDict):
    """Of `route` alone."""

    top_k: int
    num_groups: int
    top_groups: int


class MoE(nn.Module):
    """The dense part of an MoE layer: its gate and its shared experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.gate = gate(config)
        shared = config.num_shared_experts * config.expert_hidden_size
        self.shared = SwiGLU(config.hidden_size, shared) if shared else None

    def forward(
        self,
        x_BSD: Tensor,
        valid_BS: Tensor,
        experts: LayerExperts,
        bias_E: Tensor,
        recorded_TK: Tensor | None,
        noise: RouterNoise | None,
        recomputation: Recomputation | None,
    ) -> tuple[Tensor, Choice]:
        x_TD, valid_T = x_BSD.flatten(0, 1), valid_BS.flatten()
        logits_TE = self.gate(x_TD, self.layer, noise)
        routing, replaced_T = self._route(logits_TE, valid_T, bias_E), None
        if recorded_TK is not None:
            routing, replaced_T = replay(logits_TE, recorded_TK, routing, **self._weighing(valid_T))
        collect = experts.start(x_TD, routing, recomputation)
        shared_TD = None if self.shared is None else self.shared(x_TD)  # while results travel
        y_TD = collect() if shared_TD is None else collect() + shared_TD
        return y_TD.view_as(x_BSD), Choice(routing.counts_E, routing.experts_TK, replaced_T)

    def _weighing(self, valid_T: Tensor) -> Weighing:
        return {
            "scores": self.config.router_scores,
            "renormalize": self.config.renormalize,
            "scale": self.config.routed_scale,
            "valid_T": valid_T,
        }

    def _route(self, logits_TE: Tensor, valid_T: Tensor, bias_E: Tensor) -> Routing:
        config, router = self.config, self.config.router
        if isinstance(router, ExpertChoiceRouter):
            return choose_tokens(logits_TE, top_k=config.top_k, most_experts=router.most_experts, **self._weighing(valid_T))
        bias = bias_E if config.selection_bias else None
        groups, top_groups = (router.groups, router.top_groups) if isinstance(router, GroupLimitedRouter) else (1, 1)
        selection: Selection = {"top_k": config.top_k, "num_groups": groups, "top_groups": top_groups}
        return route(logits_TE, bias_E=bias, **selection, **self._weighing(valid_T))


class Block(nn.Module):
    """Attention, then a dense MLP or an MoE layer, each after a norm and on a residual stream.

    What the MLP adds to the stream is returned beside it, since the next norm can add it on its way.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        dense = layer < config.num_dense_layers
        self.mlp = SwiGLU(config.hidden_size, config.dense_hidden_size) if dense else MoE(config, layer)

    def forward(
        self,
        x_BSD: Tensor,
        update_BSD: Tensor | None,
        angles: Angles,
        attend: Attend,
        valid_BS: Tensor,
        experts: LayerExperts | None,
        bias_E: Tensor | None,
        recorded_TK: Tensor | None,
        noise: RouterNoise | None,
        recomputation: Recomputation | None = None,
    ) -> tuple[Tensor, Tensor, Choice | None]:
        """(the stream, what is added to it, the choice of an MoE layer). `recomputation`: of a block that is computed twice."""
        if experts is not None:
            experts.prepare()
        x_BSD, normed_BSD = self.attention_norm.updated(x_BSD, update_BSD)
        x_BSD, normed_BSD = self.mlp_norm.updated(x_BSD, self.attention(self.layer, normed_BSD, angles, attend))
        if experts is None:
            return x_BSD, self.mlp(normed_BSD), None
        y_BSD, choice = self.mlp(normed_BSD, valid_BS, experts, bias_E, recorded_TK, noise, recomputation)
        return x_BSD, y_BSD, choice


class Transformer(nn.Module):
    """Every parameter that is not an expert's. The weights are unset until `initialize` or `load_state_dict`.

    `batch_invariant`: products take the order of kernels/linear.py, so that with an `Attend` of the same kind a token's result
    depends on nothing but the tokens before it, bit for bit; that of generation and of training are then the same.
    """

    def __init__(self, config: ModelConfig, *, batch_invariant: bool = False) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary size comes from the tokenizer before a model is built"
        self.config = config
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else linear(config.hidden_size, config.vocab_size)
        for module in self.modules():
            if isinstance(module, Linear):
                module.batch_invariant = batch_invariant

    @property
    def head_VD(self) -> Tensor:
        """What turns hidden states into logits: its own weight, or the embedding's when they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def gates(self) -> list[Gate]:
        """Of all MoE layers: what is trained of the router."""
        return [block.mlp.gate for block in self.blocks if isinstance(block.mlp, MoE)]

    def initialize(self, seed: int) -> None:
        """Norms one, biases zero, matrices normal(init_std) from (seed, parameter name): the same on every rank.

        Gates as trainer/model/gate.py says.
        Matrices that write to the residual stream are scaled by 1 / sqrt(2 * num_layers), as in GPT-2.
        """
        for name, module in self.named_modules():
            if isinstance(module, Gate):
                module.initialize(self.config.init_std, seed, name)
        for name, parameter in self.named_parameters():
            if ".gate." in name:
                continue
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                residual = name.endswith(("attention.output.weight", "down.weight"))
                fill_normal(parameter, residual_std(self.config) if residual else self.config.init_std, seed, name)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        valid_BS: Tensor,
        attend: Attend,
        experts: Sequence[LayerExperts],
        bias_LE: Tensor,
        *,
        recorded_BSLK: Tensor | None = None,
        depths: Sequence[int] = (),
        recompute: bool = False,
        noise: RouterNoise | None = None,
    ) -> Output:
        """Hidden states after the final norm, the experts of every token and the load of every expert.

        `valid_BS` (bool) says which tokens count for the load; `experts` has one entry for each MoE layer; `bias_LE` is
        float32. `recorded_BSLK` (kernels/replay.py) are experts to take instead of those that the gates choose.
        The outputs of the layers `depths` are returned beside the last one, which is after the final norm.
        `recompute` keeps only the input of each block for the backward pass. `noise` (B, S) is that of a noisy router.
        """
        noise = None if noise is None else noise.flattened()
        angles = Angles(*rope(positions_BS, self.config))
        x_BSD, update_BSD = self.embedding(tokens_BS), None
        choices, at_depths = list[Choice](), list[Tensor]()
        for layer, block in enumerate(self.blocks):
            moe_layer = layer - self.config.num_dense_layers
            routed: tuple[LayerExperts | Tensor | None, ...] = (None, None, None)
            if moe_layer >= 0:
                recorded_TK = None if recorded_BSLK is None else recorded_BSLK[:, :, moe_layer].flatten(0, 1)
                routed = (experts[moe_layer], bias_LE[moe_layer], recorded_TK)
            if recompute and update_BSD is not None:
                x_BSD, update_BSD = x_BSD + update_BSD, None  # one tensor to keep instead of two
            arguments = (x_BSD, update_BSD, angles, attend, valid_BS, *routed, noise)
            if recompute:
                x_BSD, update_BSD, choice = recomputed(block, *arguments)
            else:
                x_BSD, update_BSD, choice = block(*arguments)
            if choice is not None:
                choices.append(choice)
            if layer in depths:
                at_depths.append(x_BSD if update_BSD is None else x_BSD + update_BSD)
        replaced = [choice.replaced_T for choice in choices if choice.replaced_T is not None]
        return Output(
            self.norm.updated(x_BSD, update_BSD)[1],
            torch.stack([choice.counts_E for choice in choices]),
            tuple(choice.experts_TK for choice in choices),
            tuple(at_depths),
            torch.stack(replaced).mean(dim=0).view_as(tokens_BS) if replaced else None,
        )

    def last_attention(self, positions_BS: Tensor, attend: Attend, dtype: torch.dtype, backward: bool) -> None:
        """That of the last block alone, over hidden states of one, for who times it; leaves no gradients."""
        angles = Angles(*rope(positions_BS, self.config))
        block = self.blocks[-1]
        assert isinstance(block, Block)
        x_BSD = torch.ones(*positions_BS.shape, self.config.hidden_size, dtype=dtype, device=positions_BS.device)
        out_BSD = block.attention(block.layer, x_BSD.requires_grad_(backward), angles, attend)
        if backward:
            torch.autograd.grad(out_BSD, [x_BSD, *block.attention.parameters()], torch.ones_like(out_BSD))


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of all MoE layers."""

    gate_up_LECD: Tensor
    down_LEDF: Tensor

    def layers(self) -> list[LocalExperts]:
        # unbind, whose backward builds one gradient for all layers
        pairs = zip(self.gate_up_LECD.unbind(0), self.down_LEDF.unbind(0), strict=True)
        return [LocalExperts(gate_up_ECD, down_EDF) for gate_up_ECD, down_EDF in pairs]


@dataclass
class LanguageModel:
    """The whole model in one process."""

    config: ModelConfig
    dense: Transformer
    experts: ExpertWeights
    bias_LE: Tensor  # float32, whatever the dtype of the weights

    @classmethod
    def initialize(cls, config: ModelConfig, seed: int, *, batch_invariant: bool = False) -> LanguageModel:
        """Fresh float32 weights on the CPU; the numbers depend on nothing but the arguments."""
        dense = Transformer(config, batch_invariant=batch_invariant)
        dense.initialize(seed)
        gate_up_LECD, down_LEDF = (torch.empty(shape) for shape in expert_shapes(config))
        for layer in range(config.num_moe_layers):
            for expert in range(config.num_experts):
                gate_up_LECD[layer, expert], down_LEDF[layer, expert] = initial_expert(config, seed, layer, expert)
        bias_LE = torch.zeros(config.num_moe_layers, config.num_experts)
        return cls(config, dense, ExpertWeights(gate_up_LECD, down_LEDF), bias_LE)

    @classmethod
    def unset(
        cls, config: ModelConfig, device: torch.device, dtype: torch.dtype, *, batch_invariant: bool = False
    ) -> LanguageModel:
        """Of the right shape, with weights that are still to be loaded."""
        with torch.device("meta"):
            dense = Transformer(config, batch_invariant=batch_invariant)
        dense.to(dtype).to_empty(device=device)
        gate_up_LECD, down_LEDF = (torch.empty(shape, dtype=dtype, device=device) for shape in expert_shapes(config))
        bias_LE = torch.zeros(config.num_moe_layers, config.num_experts, device=device)
        return cls(config, dense, ExpertWeights(gate_up_LECD, down_LEDF), bias_LE)

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, valid_BS: Tensor, attend: Attend) -> Output:
        return self.dense(tokens_BS, positions_BS, valid_BS, attend, self.experts.layers(), self.bias_LE)

    def logits(self, tokens_BS: Tensor, positions_BS: Tensor, valid_BS: Tensor, attend: Attend) -> Tensor:
        """(B, S, V) float32, all at once: for short sequences and comparisons."""
        hidden_BSD = self.forward(tokens_BS, positions_BS, valid_BS, attend).hidden_BSD
        return functional.linear(hidden_BSD, self.dense.head_VD).float()

    def to(self, device: torch.device, dtype: torch.dtype) -> LanguageModel:
        """Moves this model, and returns it; the selection bias stays float32."""
        self.dense.to(device, dtype)
        self.experts = ExpertWeights(self.experts.gate_up_LECD.to(device, dtype), self.experts.down_LEDF.to(device, dtype))
        self.bias_LE = self.bias_LE.to(device)
        return self

    def state(self) -> dict[str, Tensor]:
        """Every tensor by name, detached and sharing memory with the model."""
        state = {f"dense.{name}": parameter.detach() for name, parameter in self.dense.named_parameters()}
        state["experts.gate_up"] = self.experts.gate_up_LECD.detach()
        state["experts.down"] = self.experts.down_LEDF.detach()
        state["bias"] = self.bias_LE.detach()
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies the tensors of `state()` into this model. Raises UserError where names or shapes differ."""
        own = self.state()
        if missing := sorted(own.keys() ^ state.keys()):
            raise UserError(f"only one of model and state has these tensors: {', '.join(missing[:8])} ({len(missing)} in all)")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise UserError(f"{name} is {tuple(tensor.shape)} in the model and {tuple(state[name].shape)} in the state")
            tensor.copy_(state[name])


@dataclass(frozen=True)
class ParameterCounts:
    total: int
    active: int  # what one token passes: the dense parameters and K experts a layer
    dense: int  # everything that is not an expert's; a tied embedding counts once
    per_expert: int


@cache
def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Numbers of trained parameters, exact; the selection bias is not trained and not counted."""
    with torch.device("meta"):
        dense = sum(parameter.numel() for parameter in Transformer(config).parameters())
    per_expert = 3 * config.hidden_size * config.expert_hidden_size
    return ParameterCounts(
        total=dense + config.num_moe_layers * config.num_experts * per_expert,
        active=dense + config.num_moe_layers * config.top_k * per_expert,
        dense=dense,
        per_expert=per_expert,
    )


def require_plausible(config: ModelConfig, nbytes: int, where: str) -> None:
    """Before room is made for a model that somebody else describes: its files must hold about so much.

    Raises UserError where `nbytes` bytes of tensors are too few, at half a byte a parameter.
    """
    try:
        total = parameter_counts(config).total
    except (RuntimeError, OverflowError, TypeError) as error:  # PyTorch cannot even write the shapes down
        raise UserError(f"{where} describes a model of impossible size: {str(error).splitlines()[0]}") from error
    if total > 2 * nbytes:
        raise UserError(f"{where} makes a model of {total:,} parameters, but its files have {nbytes:,} bytes")


def expert_shapes(config: ModelConfig) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Of gate_up_LECD and down_LEDF."""
    layers, experts = config.num_moe_layers, config.num_experts
    hidden, size = config.expert_hidden_size, config.hidden_size
    return (layers, experts, 2 * hidden, size), (layers, experts, size, hidden)
