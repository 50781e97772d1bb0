"""Options of reinforcement learning."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from trainer.config.record import Record
from trainer.config.run import RunConfig, TraceConfig, UserPath

LEAST_TEMPERATURE = 1e-3  # logits over much less are infinite in float32
TEXT = "{text}"  # stands for the text in a template
MOST_TRACED_TOKENS = 1000  # decoding steps; a trace has thousands of events for each


def _address(url: str) -> str:
    """Refuses secrets, because configurations are in run folders, checkpoints and reports, and at W&B."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("should begin with http:// or https://")
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError("has a name or password in it, and options are no secret; give a key in TESSERA_SERVER_KEY")
    return url


Address = Annotated[str, AfterValidator(_address)]


class TaskConfig(Record):
    """Prompts and a verifiable reward: `name` of rl/rewards/tasks.py, or an import path `package.module:Class`."""

    name: str
    options: dict[str, int | float | str | bool]  # keyword arguments of the task's class
    eval_prompts: int = Field(gt=0)  # held-out prompts, one sample each at the rollout temperature


class ChatConfig(Record):
    """The model's chat template: what surrounds the texts of a task; rl/chat.py."""

    prompt: str
    reply: str  # of the environment, after the end of the model's turn
    bos: bool  # whether <bos> comes before everything
    eos: str | None  # the special token that ends the model's turn; null: the tokenizer's <eos>

    @model_validator(mode="after")
    def consistent(self) -> Self:
        for name, template in (("prompt", self.prompt), ("reply", self.reply)):
            if template.count(TEXT) != 1:
                raise ValueError(f"{name} ({template!r}) has {TEXT} {template.count(TEXT)} times; write it once, for the text")
        return self


class RewardConfig(Record):
    """Where rewards are computed: in child processes of the driver, which may hang or die without harm to the run."""

    workers: int = Field(gt=0)  # processes
    timeout_s: float = Field(gt=0)  # for one score; a scorer that takes longer is killed, and its sample has no reward
    memory_gib: float = Field(gt=0)  # that a process may use


class WarmupConfig(Record):
    """A short supervised warm-up on the task's demonstrations, before the first rollout round."""

    steps: int = Field(ge=0)
    batch_rows: int = Field(gt=0)
    lr: float = Field(gt=0)


def is_whole(top_k: int | None, top_p: float, min_p: float) -> bool:
    """Whether these leave nothing out of the distribution that tokens are drawn from."""
    return top_k is None and top_p == 1 and min_p == 0


class RolloutConfig(Record):
    """APRIL: submit `over_provision * groups` groups, stop at `groups` finished ones, recycle the rest."""

    groups: int = Field(gt=0)  # N finished groups end a round
    samples_per_group: int = Field(gt=0, lt=1 << 16)  # n; 1 if samples are not compared within their group
    over_provision: float = Field(ge=1)  # N' / N; 1 waits for every sample
    refills: int = Field(ge=0)  # draws of prompts for groups of equal rewards (DAPO's dynamic sampling); 0: keep such groups
    max_new_tokens: int = Field(gt=0)  # of a response, the environment's replies included
    max_turns: int = Field(gt=0)  # of the model, if the task is a conversation
    max_staleness: int = Field(ge=0)  # in rounds; what happens to older groups is `stale`
    stale: Literal["regenerate", "drop"]  # start them again, or drop them and their prompts
    temperature: float = Field(ge=LEAST_TEMPERATURE)  # of the softmax
    top_k: int | None = Field(gt=0)  # sample only from the k most likely tokens; null: from all
    top_p: float = Field(gt=0, le=1)  # only the most likely tokens that together have this probability
    min_p: float = Field(ge=0, lt=1)  # only tokens with at least this probability relative to the most likely one
    stop: tuple[Annotated[str, Field(min_length=1)], ...]  # strings that end a response, or a turn, as <eos> does
    stop_tokens: tuple[Annotated[str, Field(min_length=1)], ...]  # tokens that do the same, by name, such as <|im_end|>
    include_stop: bool  # whether the task sees the string that ended the text
    replay_routing: bool  # engines record the experts of every token, and the trainer uses the same; kernels/replay.py
    engines: int = Field(gt=0)
    # Separate engines with which the run starts; the others, up to `engines`, join while it runs, when the cluster has room.
    # null: it starts with all of them.
    min_engines: int | None = Field(gt=0)
    # colocated: engines share the ranks' GPUs; separate: each has a GPU of its own, so that ranks and engines do not compete
    # for time or memory, best with rollout.overlap.
    placement: Literal["colocated", "separate"]
    engine_slots: int = Field(gt=0)  # sequences that one engine decodes at once
    cache_tokens: int | None = Field(gt=0)  # capacity of an engine's cache; null: loop.sequence_length for every slot
    advance_tokens: int = Field(gt=0)  # tokens decoded between two checks for finished samples
    overlap: bool  # engines keep generating while the ranks learn
    metrics_port: int = Field(ge=0, lt=65536)  # of engine 0, for Prometheus; the next ports are the other engines'; 0: none
    server: Address | None  # URL of vLLM or SGLang, including /v1, that replaces our engines; or null
    server_reload: Address | None  # URL that takes {"model_path": FOLDER}: SGLang's /update_weights_from_disk
    server_timeout_s: float = Field(gt=0)  # without receiving a byte, and that it may ask to be left alone (Retry-After)
    server_retries: int = Field(ge=0)  # requests in a row that return no token

    @model_validator(mode="after")
    def _others_join_from_places_of_their_own(self) -> Self:
        if self.min_engines is None:
            return self
        if self.min_engines > self.engines:
            raise ValueError(f"min_engines ({self.min_engines}) is larger than engines ({self.engines}); lower it")
        if self.placement == "colocated":
            raise ValueError(
                f"min_engines ({self.min_engines}) lets engines join that find a GPU of their own, and placement=colocated has "
                "them on the ranks' GPUs; set placement=separate, or min_engines=null"
            )
        return self

    @property
    def whole(self) -> bool:
        return is_whole(self.top_k, self.top_p, self.min_p)

    @property
    def engines_apart(self) -> int:
        """Engines that have GPUs of their own."""
        return self.engines if self.placement == "separate" else 0


class SyncConfig(Record):
    """How new weights reach the engines.

    store: rank 0 puts them into Ray's object store (trainer/weight_sync.py). direct: ranks show their memory to engines on the
    same GPU and broadcast to the others (trainer/weight_links.py). auto: direct on GPUs, unless only changes are sent.
    """

    transport: Literal["auto", "store", "direct"]
    anchor_every: int = Field(gt=0)  # every n-th sync sends all weights, the others only what changed; 1: always all
    check: bool  # each engine hashes what it holds and compares with the trainer's hash

    @model_validator(mode="after")
    def _changes_need_the_store(self) -> Self:
        if self.transport == "direct" and self.anchor_every > 1:
            raise ValueError(
                f"transport=direct sends all weights every time, but anchor_every = {self.anchor_every} asks for changes in "
                "between; use anchor_every=1 (sync=full), or transport=store"
            )
        return self

    def is_direct(self, on_gpu: bool) -> bool:
        return self.transport == "direct" or (self.transport == "auto" and on_gpu and self.anchor_every == 1)


Band = tuple[float, float]  # lowest and highest ratio
Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gae"]
PER_TOKEN: tuple[Estimator, ...] = ("reinforce_pp", "reinforce_pp_baseline", "gae")  # a token has an advantage of its own
WITHOUT_GROUP: tuple[Estimator, ...] = ("reinforce_pp", "gae")  # no sample is compared with others of its prompt


class AlgorithmConfig(Record):
    """How rewards become an update. The formulas are in rl/advantages.py, returns.py, losses.py, kl.py and off_policy.py."""

    advantage: Estimator
    uncertainty_focus: float = Field(ge=0)  # weights groups by the uncertainty of their outcome (MGPO, 2511.06221); 0: equally
    discount: float = Field(gt=0, le=1)  # gae, reinforce_pp: of a reward, per token before it
    gae_lambda: float = Field(ge=0, le=1)  # gae: 1 trusts rewards alone, 0 the next value
    value_lambda: float = Field(ge=0, le=1)  # gae: gae_lambda of the returns that the value head learns (VC-PPO, 2503.01491)
    value_decay: float = Field(gt=0, le=1)  # gae: weight of earlier returns in the value head's next fit, per update
    value_coefficient: float = Field(ge=0)  # gae: weight of the value loss in the trunk that policy and value head share
    value_clip: float | None = Field(gt=0)  # gae: that loss trusts values that moved by at most this much
    value_warmup_rounds: int = Field(ge=0)  # gae: rounds in which only the value head learns
    overlong_margin: int = Field(ge=0)  # last tokens before rollout.max_new_tokens that cost reward (DAPO); 0: none
    overlong_factor: float = Field(ge=0)  # reward that a response of max_new_tokens loses
    loss: Literal["ppo", "gspo", "cispo", "sapo", "dppo"]
    clip_low: float = Field(ge=0, le=1)  # ratios are clipped below 1 - this; dppo: how much a probability may fall
    clip_high: float = Field(
        gt=0, allow_inf_nan=True
    )  # ratios are clipped above 1 + this; dppo: how much a probability may rise
    dual_clip: float | None = Field(gt=1)  # ppo: with a negative advantage, the ratio counts as at most this
    sapo_temperatures: tuple[float, float]  # sapo: for positive and for other advantages
    entropy_bonus: float = Field(ge=0)  # weight of an entropy term that the update maximises
    kl_coefficient: float = Field(ge=0)  # weight of the KL from the policy at the start of RL; 0: no reference is kept
    kl_estimator: Literal["k1", "k2", "k3", "unbiased"]  # k1 is subtracted from the reward, the others are losses; rl/kl.py
    aggregation: Literal["token", "sequence", "constant"]  # mean over tokens, over responses, or sum / (responses * longest)
    updates_per_round: int = Field(gt=0)  # optimizer steps, each on its share of the round's responses
    off_policy: Literal["recompute", "mask", "bypass", "decoupled", "staged"]
    truncation: float = Field(gt=0, allow_inf_nan=True)  # cap of the importance weight of decoupled
    token_band: Band | None  # IcePop: learn only tokens whose proximal / behaviour probability is in it
    sequence_band: Band | None  # the same for whole responses, by the geometric mean
    sequence_delta: float | None = Field(gt=0)  # OPSM: drop bad responses that became this many nats per token less likely

    @model_validator(mode="after")
    def consistent(self) -> AlgorithmConfig:
        for name, band in (("token_band", self.token_band), ("sequence_band", self.sequence_band)):
            if band is not None and not 0 <= band[0] <= 1 <= band[1]:
                raise ValueError(f"{name} ({band[0]}, {band[1]}) does not contain the ratio 1 of equal probabilities; widen it")
        if self.kl_in_reward and self.advantage not in PER_TOKEN:
            raise ValueError(
                f"kl_estimator=k1 stands in the rewards of single tokens, and advantage={self.advantage} has one reward for a "
                f"response; choose kl_estimator=k3, k2 or unbiased, or advantage={', '.join(PER_TOKEN)}"
            )
        if self.uncertainty_focus > 0 and self.advantage in PER_TOKEN:
            raise ValueError(
                f"uncertainty_focus ({self.uncertainty_focus}) weighs groups, and advantage={self.advantage} compares tokens "
                "of all groups; set uncertainty_focus=0, or choose advantage=grpo"
            )
        if self.dual_clip is not None and self.loss != "ppo":
            raise ValueError(f"dual_clip ({self.dual_clip}) is a part of loss=ppo; set dual_clip=null for loss={self.loss}")
        if min(self.sapo_temperatures) <= 0:
            raise ValueError(f"sapo_temperatures {self.sapo_temperatures} must both be positive; published are 1.0 and 1.05")
        return self

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coefficient > 0 and self.kl_estimator == "k1"

    @property
    def newest_only(self) -> bool:
        """Whether nothing is learned but tokens of the newest weights."""
        return self.off_policy == "mask"


class LoopConfig(Record):
    rounds: int = Field(gt=0)
    sequence_length: int = Field(gt=1)  # samples are packed into rows of this many tokens
    micro_rows: int = Field(gt=0)
    dtype: Literal["auto", "float32", "bfloat16"]
    recompute: bool
    freeze_router: bool  # do not train the gates; the selection bias follows `balance`
    eval_every: int = Field(gt=0)  # rounds
    checkpoint_every: int = Field(gt=0)  # rounds
    keep_checkpoints: int = Field(gt=0)
    memory_checkpoint_every: int = Field(ge=0)  # rounds between two that stay in the memory of the nodes; 0: none
    skip_nonfinite: int = Field(ge=0)  # updates in a row that may be left out because their gradient is not finite; 0: stop


class EngineTraceConfig(TraceConfig):
    """Traces of engines too; trainer/tracing.py."""

    engines: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...]
    tokens: int = Field(gt=0, le=MOST_TRACED_TOKENS)  # first decoding steps of each engine in the traced rounds


class RLConfig(RunConfig):
    checkpoint: UserPath  # a run folder, one of its checkpoints, or a folder in the Hugging Face layout
    task: TaskConfig
    chat: ChatConfig
    reward: RewardConfig
    warmup: WarmupConfig
    rollout: RolloutConfig
    sync: SyncConfig
    algorithm: AlgorithmConfig
    loop: LoopConfig
    trace: EngineTraceConfig

    @model_validator(mode="after")
    def consistent(self) -> RLConfig:
        if self.rollout.max_new_tokens >= self.loop.sequence_length:
            raise ValueError(
                f"rollout.max_new_tokens ({self.rollout.max_new_tokens}) leaves no room for a prompt in a row of "
                f"loop.sequence_length ({self.loop.sequence_length}) tokens; lower the one or raise the other"
            )
        self.check_memory_checkpoints("loop.memory_checkpoint_every", self.loop.memory_checkpoint_every)
        self.check_trace("loop.rounds", self.loop.rounds)
        if self.rollout.min_engines is not None and (self.cluster.nodes is not None or self.cluster.slurm is not None):
            raise ValueError(
                f"rollout.min_engines ({self.rollout.min_engines}) lets engines join when the cluster gets room, and "
                "cluster.nodes says which nodes there are, as in a SLURM job; set rollout.min_engines=null"
            )
        if self.algorithm.overlong_margin > self.rollout.max_new_tokens:
            raise ValueError(
                f"algorithm.overlong_margin ({self.algorithm.overlong_margin}) is larger than rollout.max_new_tokens "
                f"({self.rollout.max_new_tokens}); lower it"
            )
        self._consistent_groups()
        if self.rollout.overlap and self.rollout.max_staleness == 0:
            raise ValueError(
                "rollout.overlap generates under weights that are old when a round takes the tokens, and rollout.max_staleness "
                "(0) throws all of them away; raise it, or choose rollout=april"
            )
        if self.rollout.overlap and self.algorithm.off_policy == "staged":
            raise ValueError(
                "algorithm.off_policy=staged asks the trainer about all samples before it learns, and with rollout.overlap the "
                "engines have some of them; choose algorithm.off_policy=decoupled, or rollout=april"
            )
        if not self.rollout.whole and self.algorithm.off_policy in ("recompute", "mask", "staged"):
            raise ValueError(
                f"algorithm.off_policy={self.algorithm.off_policy} takes the trainer's log-probabilities for those sampled at, "
                "and rollout.top_k, top_p and min_p leave tokens out that the trainer does not; choose "
                "algorithm.off_policy=decoupled or bypass, or set them to null, 1.0 and 0.0"
            )
        if self.rollout.server is not None:
            self._consistent_with_server()
        elif self.rollout.server_reload is not None:
            raise ValueError("rollout.server_reload tells a server to load weights, but there is none; set rollout.server")
        elif self.rollout.metrics_port + self.rollout.engines > 65536:
            raise ValueError(
                f"rollout.metrics_port ({self.rollout.metrics_port}) leaves no ports for {self.rollout.engines} engines; "
                "lower it"
            )
        return self

    def _consistent_groups(self) -> None:
        if self.rollout.samples_per_group == 1 and self.algorithm.advantage not in WITHOUT_GROUP:
            raise ValueError(
                f"algorithm.advantage={self.algorithm.advantage} compares the samples of a prompt, and "
                "rollout.samples_per_group is 1; raise it, or choose algorithm=reinforce_pp or ppo_gae"
            )
        if self.rollout.samples_per_group == 1 and self.rollout.refills:
            raise ValueError(
                f"rollout.refills ({self.rollout.refills}) replaces groups whose rewards are all equal, which those of one "
                "sample are (rollout.samples_per_group is 1); set refills=0"
            )

    def _consistent_with_server(self) -> None:
        if self.rollout.placement == "separate":
            raise ValueError(
                "rollout.placement=separate gives GPUs to our engines, and rollout.server is another; set "
                "rollout.placement=colocated"
            )
        if self.rollout.metrics_port:
            raise ValueError(
                "rollout.metrics_port is of our engines, and rollout.server is another, with an endpoint of its own; "
                "set rollout.metrics_port=0"
            )
        if self.algorithm.off_policy in ("recompute", "mask"):
            raise ValueError(
                f"algorithm.off_policy={self.algorithm.off_policy} takes the trainer's log-probabilities for those sampled at, "
                "which holds for our engines only, and rollout.server is another one; choose algorithm.off_policy=decoupled "
                "or bypass"
            )
        if self.algorithm.off_policy == "bypass" and not self.rollout.whole:
            raise ValueError(
                "algorithm.off_policy=bypass clips the ratio to the policy that sampled, before rollout.top_k, top_p and min_p "
                "leave tokens out, and a completion server tells the log-probability after them only; choose "
                "algorithm.off_policy=decoupled, or set them to null, 1.0 and 0.0"
            )
        if self.rollout.server_reload is None and self.algorithm.off_policy == "staged":
            raise ValueError(
                "algorithm.off_policy=staged needs engines with the trainer's weights, and rollout.server keeps its own "
                "without rollout.server_reload; name it, or choose algorithm.off_policy=decoupled"
            )
        if self.rollout.server_reload is None and (self.rollout.over_provision > 1 or self.rollout.overlap):
            raise ValueError(
                "rollout.server keeps its weights without rollout.server_reload, so what a round leaves unfinished is too old "
                "for the next one, and long samples would never end; set rollout=sync, or name rollout.server_reload"
            )
        if self.rollout.replay_routing:
            raise ValueError(
                "rollout.replay_routing needs the experts of every token, those of interrupted samples too, and completion "
                "servers send them in no agreed form, if at all; generate with our engines, or set replay_routing=false and "
                "let algorithm.token_band drop the tokens whose probabilities differ"
            )
        if self.sync.anchor_every > 1 or self.sync.check:
            raise ValueError(
                "sync.anchor_every and sync.check are of our engines, and rollout.server is another; set sync=full"
            )
