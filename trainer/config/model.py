"""Options of the model and its router."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config.record import Record


class TopKRouter(Record):
    """A token goes to the K experts of the largest score + bias; its logits are a linear map of it."""

    kind: Literal["top_k"]


class NoisyTopKRouter(Record):
    """The same, with learned noise on the logits during pretraining (Shazeer et al. 1701.06538), but not in evaluation,
    generation and RL."""

    kind: Literal["noisy_top_k"]


class CosineRouter(Record):
    """The logits are cosines between tokens and experts, divided by a learned temperature (X-MoE, 2204.09179)."""

    kind: Literal["cosine"]
    size: int = Field(gt=0)  # R, dimensions of the comparison; the paper uses half the number of experts
    temperature: float = Field(gt=0)  # initial; the paper uses 0.3 for softmax scores and 0.07 for sigmoid scores


class GroupLimitedRouter(Record):
    """As top_k, but only among the experts of a token's best groups of neighbours; a group's score is the sum of its two best
    (DeepSeek-V3, 2412.19437, section 2.1.2, with sigmoid scores)."""

    kind: Literal["group_limited"]
    groups: int = Field(gt=1)
    top_groups: int = Field(gt=0)  # of a token


class ExpertChoiceRouter(Record):
    """Each expert takes the same number of tokens of a micro-batch; a token has top_k experts on average (2202.09368). A
    token's experts depend on later tokens, so such a model cannot generate and cannot be used in RL."""

    kind: Literal["expert_choice"]
    most_experts: int = Field(gt=0)  # of a token; the paper allows all


RouterConfig = Annotated[
    TopKRouter | NoisyTopKRouter | CosineRouter | GroupLimitedRouter | ExpertChoiceRouter, Field(discriminator="kind")
]


class ModelConfig(Record):
    """A decoder-only sparse mixture-of-experts model. Letters: D model, F expert hidden, E experts, K top-k, V vocabulary."""

    hidden_size: int = Field(gt=0)  # D
    num_layers: int = Field(gt=0, le=10_000)
    num_dense_layers: int = Field(ge=0)  # the first layers have one plain SwiGLU MLP and no experts
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    dense_hidden_size: int = Field(gt=0)  # hidden size of the plain MLP of a dense layer
    num_experts: int = Field(gt=0)  # E
    top_k: int = Field(gt=0)  # K
    expert_hidden_size: int = Field(gt=0)  # F
    num_shared_experts: int = Field(ge=0)  # every token passes them; one MLP of hidden size n * F
    router: RouterConfig  # where logits come from
    router_scores: Literal["softmax", "sigmoid"]
    renormalize: bool  # combine weights of a token sum to one before `routed_scale`
    routed_scale: float = Field(gt=0)
    selection_bias: bool  # a bias that moves the selection, never the combine weights (Wang et al. 2408.15664)
    # RMSNorm of queries and keys: true: over head_dim; all_heads: over all heads of a token together (OLMoE)
    qk_norm: bool | Literal["all_heads"]
    attention_bias: bool  # biases of the query, key and value projections
    tie_embeddings: bool
    rope_theta: float = Field(gt=0)
    rotary_share: float = Field(default=1.0, gt=0, le=1)  # part of head_dim that is rotated with the position; GLM: 0.5
    norm_eps: float = Field(gt=0)
    init_std: float = Field(gt=0)
    max_positions: int = Field(gt=0)
    vocab_size: int | None = None  # V; taken from the tokenizer when the run starts

    @model_validator(mode="after")
    def consistent(self) -> ModelConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k ({self.top_k}) is larger than num_experts ({self.num_experts}); lower top_k or add experts"
            )
        if isinstance(self.router, ExpertChoiceRouter):
            self._consistent_with_expert_choice(self.router)
        if isinstance(self.router, GroupLimitedRouter):
            self._consistent_with_groups(self.router)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is not divisible by num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) is odd; rotary embeddings need an even one")
        if self.rotary_dim % 2 or self.rotary_dim == 0:
            raise ValueError(
                f"rotary_share ({self.rotary_share}) of head_dim ({self.head_dim}) is {self.rotary_dim} features, which "
                "make no pairs; choose a share of an even number"
            )
        if self.num_dense_layers >= self.num_layers:
            raise ValueError(
                f"num_dense_layers ({self.num_dense_layers}) leaves no MoE layer of num_layers ({self.num_layers}); lower it"
            )
        return self

    def _consistent_with_expert_choice(self, router: ExpertChoiceRouter) -> None:
        if not self.top_k <= router.most_experts <= self.num_experts:
            raise ValueError(
                f"router.most_experts ({router.most_experts}) has to lie between top_k ({self.top_k}), which a token has on "
                f"average, and num_experts ({self.num_experts})"
            )
        if self.selection_bias:
            raise ValueError(
                "router.kind=expert_choice fills all experts alike and has no use for a selection bias; set "
                "model.selection_bias=false and balance=frozen"
            )

    def _consistent_with_groups(self, router: GroupLimitedRouter) -> None:
        if self.num_experts % router.groups or self.num_experts < 2 * router.groups:
            raise ValueError(
                f"router.groups ({router.groups}) has to divide num_experts ({self.num_experts}) into groups of two or more"
            )
        kept = router.top_groups * (self.num_experts // router.groups)
        if router.top_groups > router.groups or self.top_k > kept:
            raise ValueError(
                f"router.top_groups ({router.top_groups}) has to be at most router.groups ({router.groups}) and to leave top_k "
                f"({self.top_k}) experts to choose from; it leaves {kept}"
            )

    @property
    def rotary_dim(self) -> int:
        """How many features of a head turn with the position."""
        return int(self.head_dim * self.rotary_share)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers
