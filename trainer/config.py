"""Every option of Tessera, typed, frozen and validated once.

Hydra composes the files under conf/; `launch.cli.load` turns the composed mapping into one of the roots below:
`PretrainConfig`, `RLConfig` or `PlanConfig`. Nothing past the entry point sees a Hydra object. A field's unit is in its name
or its comment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from parallel.schedule.pipeline import MOST_CHUNKS


class Record(BaseModel):
    """Frozen; an unknown key is an error, a wrong type is never silently accepted (`"2"` for an integer is)."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------- what is trained


class TopKRouter(Record):
    """A token goes to the K experts of the largest score + bias; its logits are a linear map of it."""

    kind: Literal["top_k"]


class NoisyTopKRouter(Record):
    """The same, with learned noise on the logits while it is pretrained (Shazeer et al. 1701.06538): none in evaluation, in
    generation and in RL, which learns what was generated."""

    kind: Literal["noisy_top_k"]


class CosineRouter(Record):
    """The logits are cosines between tokens and experts, over a learned temperature (X-MoE, 2204.09179)."""

    kind: Literal["cosine"]
    size: int = Field(gt=0)  # R, dimensions in which they are compared; the paper takes half the number of experts
    temperature: float = Field(gt=0)  # at the start; the paper takes 0.3 for softmax scores and 0.07 for sigmoid ones


class ExpertChoiceRouter(Record):
    """Experts take tokens, each equally many of a micro-batch, and a token has top_k experts on average (2202.09368). A token's
    experts depend on the tokens behind it: what is trained so cannot generate, and cannot go into RL."""

    kind: Literal["expert_choice"]
    most_experts: int = Field(gt=0)  # of a token; the paper takes all


RouterConfig = Annotated[TopKRouter | NoisyTopKRouter | CosineRouter | ExpertChoiceRouter, Field(discriminator="kind")]


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
    qk_norm: bool  # RMSNorm over head_dim of queries and keys
    attention_bias: bool  # biases of the query, key and value projections
    tie_embeddings: bool
    rope_theta: float = Field(gt=0)
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
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is not divisible by num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) is odd; rotary embeddings need an even one")
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

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers


class TokenizerConfig(Record):
    vocab_size: int = Field(ge=260)  # 256 bytes and the special tokens are always in it
    train_mib: float = Field(gt=0)  # how much text the tokenizer is trained on
    file: Path | None = None  # an existing tokenizer.json; then nothing is trained


class Source(Record):
    """What every source of text has."""

    validation_share: float = Field(gt=0, lt=1)  # documents held out, chosen by a hash of their text
    max_mib: float | None = Field(default=None, gt=0)  # stop reading after so much text; null reads everything
    cache_dir: Path  # token arrays and trained tokenizers, keyed by what they were made from


class StdlibSource(Source):
    """The source text of the running Python's standard library: real text, on every machine."""

    kind: Literal["stdlib"]


class TextSource(Source):
    """Text files, folders (every file below) and globs; one document a file."""

    kind: Literal["text"]
    paths: tuple[str, ...] = Field(min_length=1)


class JsonlSource(Source):
    """JSON lines; one document a line, its text under `field`."""

    kind: Literal["jsonl"]
    paths: tuple[str, ...] = Field(min_length=1)
    field: str


class ParquetSource(Source):
    """Parquet files; one document a row, its text in column `field`."""

    kind: Literal["parquet"]
    paths: tuple[str, ...] = Field(min_length=1)
    field: str


DataConfig = Annotated[StdlibSource | TextSource | JsonlSource | ParquetSource, Field(discriminator="kind")]


# ---------------------------------------------------------------- how it is trained


class OptimizerConfig(Record):
    """AdamW. The learning rate warms up linearly, then follows the schedule down to `final_lr_share * lr`."""

    lr: float = Field(gt=0)
    schedule: Literal["cosine", "wsd", "constant"]  # wsd: warm-up, stable, then a linear decay over the last `decay_share`
    warmup_steps: int = Field(ge=0)
    decay_share: float = Field(ge=0, le=1)
    final_lr_share: float = Field(ge=0, le=1)
    betas: tuple[float, float]
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    clip_norm: float = Field(gt=0)  # of the one global gradient norm over dense and expert parameters


class BalanceConfig(Record):
    """Auxiliary-loss-free balancing: once per global batch, the selection bias moves against the load."""

    rule: Literal["sign", "proportional"]
    rate: float = Field(ge=0)  # 0 freezes the bias


class ParallelConfig(Record):
    """An expert is owned by one rank and copied, step by step, to where its tokens are (FSSDP); the dense parameters are data
    parallel under DeepSpeed ZeRO. Without copies this is plain expert parallelism."""

    zero_stage: Literal[1, 2]
    policy: Literal["cost", "hecate", "eplb", "laer", "faster_moe", "llep", "plain"]  # who gets copies; parallel/policies.py
    # auto: ranks read each other's memory where all can, as on one node; else two_level, where several nodes have several ranks
    # each: a token crosses to a node once; else messages, in which it goes to every rank that serves it.
    transport: Literal["auto", "messages", "two_level", "peer_memory"]
    # In how many chunks an MoE layer runs whose tokens travel as messages (parallel/chunked_experts.py); off: one; auto: as
    # many, forward and backward apart, as measured parts of the layer let expect to be the fastest, one with other transports.
    schedule: Literal["auto", "off"] | Annotated[int, Field(ge=1, le=MOST_CHUNKS)]
    overlap: Literal["auto"] | Annotated[int, Field(ge=0)]  # t of hecate: the hottest experts of a layer that may be copied
    memory: Literal["auto"] | Annotated[int, Field(ge=0)]  # m: copies of others' experts that a rank has room for in each layer
    rematerialise: bool  # keep copies of one layer at a time and fetch them again for the backward pass
    reshard_every: int = Field(ge=0)  # steps between two looks at who should own what; 0: the first owners stay
    calibrate: bool  # plan a layer's copies again once its gate has decided, where the gain pays for the wait
    # Experts' masters, gradients and moments. cpu: in the memory of the host, stepped there; nvme: gradients there, the rest on
    # its disk.
    offload: Literal["none", "cpu", "nvme"]
    nvme_dir: Path | None  # of offload=nvme: a folder on a local disk of every node; its files go with the run

    @model_validator(mode="after")
    def consistent(self) -> ParallelConfig:
        if self.policy == "plain" and self.memory != 0:
            raise ValueError(
                f"policy=plain makes no copies, but memory ({self.memory}) keeps room for them; set memory=0, as parallel=ep "
                "does, or choose another policy"
            )
        if self.offload == "nvme" and self.nvme_dir is None:
            raise ValueError("offload=nvme needs nvme_dir, a folder on a local disk: set parallel.nvme_dir=FOLDER")
        if self.nvme_dir is not None and not self.nvme_dir.is_absolute():
            raise ValueError(f"nvme_dir ({self.nvme_dir}) is looked for on every rank's node; write the whole path, from / on")
        return self

    def copies_kept(self, layers: int, ranks: int) -> int:
        """For how many copies of experts a rank keeps room; those that only a running rank can tell are not counted."""
        in_a_layer = 0 if ranks == 1 or self.memory == "auto" else self.memory
        return in_a_layer * (1 if self.rematerialise else layers)


class TrainConfig(Record):
    """One optimizer step takes `batch_rows` rows of `sequence_length` tokens, all ranks together."""

    steps: int = Field(gt=0)
    sequence_length: int = Field(gt=1)  # S
    batch_rows: int = Field(gt=0)
    micro_rows: int = Field(gt=0)  # rows that one rank takes through the model at once
    dtype: Literal["auto", "float32", "bfloat16"]  # auto: bfloat16 on GPUs, float32 on CPUs
    recompute: bool  # recompute activations in the backward pass
    eval_every: int = Field(gt=0)  # steps
    eval_rows: int = Field(gt=0)
    checkpoint_every: int = Field(gt=0)  # steps; the last step is always kept
    keep_checkpoints: int = Field(gt=0)
    skip_nonfinite: int = Field(ge=0)  # updates in a row that may be left out because their gradient is not finite; 0: stop
    spike_zscore: float | None = Field(gt=0)  # a loss so many deviations above the mean of the window is a spike; null: none is
    spike_window: int = Field(gt=1)  # losses; it starts anew when a run is resumed
    on_spike: Literal["skip", "stop"]


class SlurmConfig(Record):
    """What `launch.submit` asks SLURM for. Nodes are the run's own; a Ray node runs on each for as long as the job."""

    nodes: int = Field(gt=0)
    gpus_per_node: int = Field(ge=0)  # 0: ranks on CPUs, one a node
    time_limit: str = Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")  # as sbatch takes it
    partition: str | None
    account: str | None
    stop_before_s: int = Field(gt=0)  # so long before the limit the run writes a checkpoint and queues again
    max_requeues: int = Field(ge=0)
    sbatch: tuple[Annotated[str, Field(pattern=r"^-[^\n]+$")], ...]  # further options of sbatch: ['--qos=high']
    shell: tuple[str, ...]  # lines before Python starts: module load cuda


class ClusterConfig(Record):
    """Where the processes run. What this run starts on its own machine binds to `host`."""

    address: str | None  # of a running Ray cluster; null starts one on this machine, for this run only
    nodes: tuple[str, ...] | None  # Ray's names of the nodes that must all take part, equally; null: any
    ranks: Literal["auto"] | Annotated[int, Field(gt=0)]  # auto: one per GPU, at most 2; 2 on a CPU
    min_ranks: int | None = Field(gt=0)  # as many are enough where lost nodes leave no place for all; null: it waits for them
    shrink_after_s: float = Field(ge=0)  # so long a place for all is waited for before it goes on with fewer
    gpu_type: str | None  # Ray's name of the GPUs that ranks run on: H100; null: any
    threads_per_rank: Literal["auto"] | Annotated[int, Field(gt=0)]
    max_restarts: int = Field(ge=0)  # attempts after the first one, each from the last checkpoint; of an engine: in a row
    start_timeout_s: float = Field(gt=0)
    collective_timeout_s: float = Field(gt=0)
    engine_timeout_s: float = Field(gt=0)  # without an answer, after which an engine of RL is replaced
    object_store_mib: int = Field(ge=80)
    host: str
    dashboard: bool
    dashboard_port: int = Field(gt=0, lt=65536)
    dollars_per_gpu_hour: float | None = Field(gt=0)  # of each rank's GPU; null: no metric tells costs
    slurm: SlurmConfig | None

    @model_validator(mode="after")
    def consistent(self) -> ClusterConfig:
        if self.min_ranks is not None and self.ranks != "auto" and self.min_ranks > self.ranks:
            raise ValueError(f"min_ranks ({self.min_ranks}) is larger than ranks ({self.ranks}); lower it")
        if self.min_ranks is not None and (self.nodes is not None or self.slurm is not None):
            raise ValueError(
                f"min_ranks ({self.min_ranks}) goes on without a lost node, and nodes says that all of them take part, as in a "
                "SLURM job, which is queued again; set min_ranks=null"
            )
        return self


class LoggerConfig(Record):
    wandb: Literal["auto", "online", "offline", "off"]  # auto: online when WANDB_API_KEY is set, else offline
    project: str
    entity: str | None


class TraceConfig(Record):
    """Steps that the profiler watches; trainer/tracing.py. `python -m launch.trace` asks for others while a run goes on."""

    range: tuple[int, int] | None  # the first and the last step or round; null: none
    ranks: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...]
    memory: bool  # also what the allocators of GPUs did

    @model_validator(mode="after")
    def consistent(self) -> TraceConfig:
        if self.range is not None and not 1 <= self.range[0] <= self.range[1] < self.range[0] + 100:
            raise ValueError(f"trace.range {list(self.range)} should be the first and the last of 1 to 100 steps")
        return self


class RunConfig(Record):
    """What the two roots share."""

    seed: int = Field(ge=0)
    dry_run: bool  # print the resolved configuration and the estimates, then stop
    resume: Literal["never", "auto"]  # auto: continue `run_name`, or the newest unfinished run of this kind
    runs_dir: Path
    run_name: str | None  # null: kind, date and time
    optimizer: OptimizerConfig
    balance: BalanceConfig
    parallel: ParallelConfig
    cluster: ClusterConfig
    logger: LoggerConfig
    trace: TraceConfig


class PretrainConfig(RunConfig):
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    train: TrainConfig

    @model_validator(mode="after")
    def consistent(self) -> PretrainConfig:
        if self.train.sequence_length > self.model.max_positions:
            raise ValueError(
                f"train.sequence_length ({self.train.sequence_length}) is larger than model.max_positions "
                f"({self.model.max_positions}); shorten the rows or raise max_positions"
            )
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) exceeds train.steps ({self.train.steps})")
        if self.balance.rate > 0 and not self.model.selection_bias:
            raise ValueError(
                f"balance.rate ({self.balance.rate}) moves a selection bias that the model does not have; "
                "set model.selection_bias=true or choose balance=frozen"
            )
        return self


# ---------------------------------------------------------------- reinforcement learning


class TaskConfig(Record):
    """Prompts and a verifiable reward: `name` of rl/rewards/tasks.py, or an import path `package.module:Class`."""

    name: str
    options: dict[str, int | float | str | bool]  # keyword arguments of the task's class
    eval_prompts: int = Field(gt=0)  # held-out prompts, one sample each at the rollout temperature


class RewardConfig(Record):
    """Where rewards are computed: in child processes of the driver, which may hang or die without harm to the run."""

    workers: int = Field(gt=0)  # processes
    timeout_s: float = Field(gt=0)  # of one score; a scorer that takes longer is killed, and its sample has no reward
    memory_gib: float = Field(gt=0)  # that a process may have


class WarmupConfig(Record):
    """A short supervised warm-up on the task's demonstrations, before the first rollout round."""

    steps: int = Field(ge=0)
    batch_rows: int = Field(gt=0)
    lr: float = Field(gt=0)


class RolloutConfig(Record):
    """APRIL: submit `over_provision * groups` groups, stop at `groups` finished ones, recycle the rest."""

    groups: int = Field(gt=0)  # N finished groups end a round
    samples_per_group: int = Field(gt=1)  # n
    over_provision: float = Field(ge=1)  # N' / N; 1 waits for every sample
    refills: int = Field(ge=0)  # draws of more prompts for groups of equal rewards (DAPO's dynamic sampling); 0: keeps them
    max_new_tokens: int = Field(gt=0)  # of a response, the environment's answers included
    max_turns: int = Field(gt=0)  # of the model, where the task is a conversation
    max_staleness: int = Field(ge=0)  # rounds; an older unfinished group starts anew
    temperature: float = Field(gt=0)
    top_k: int | None = Field(gt=0)  # only the k likeliest tokens are drawn; null: all
    top_p: float = Field(gt=0, le=1)  # only the likeliest tokens that make up this share
    min_p: float = Field(ge=0, lt=1)  # only tokens at least this likely relative to the likeliest
    stop: tuple[Annotated[str, Field(min_length=1)], ...]  # strings that end a response, or a turn of it, as <eos> does
    include_stop: bool  # whether the task sees the string that ended the text
    replay_routing: bool  # the engines record the experts of every token, and the trainer takes them; kernels/replay.py
    engines: int = Field(gt=0)
    engine_slots: int = Field(gt=0)  # sequences that one engine decodes at once
    cache_tokens: int | None = Field(gt=0)  # that an engine's cache holds; null: loop.sequence_length for every slot
    advance_tokens: int = Field(gt=0)  # tokens decoded between two looks at who has finished
    overlap: bool  # the engines go on generating while the ranks learn
    metrics_port: int = Field(ge=0, lt=65536)  # where engine 0 answers Prometheus, the others behind it; 0: none does
    server: str | None = Field(pattern="^https?://")  # of vLLM or SGLang, up to and with /v1, instead of our engines; or null
    server_reload: str | None = Field(pattern="^https?://")  # takes {"model_path": FOLDER}: SGLang's /update_weights_from_disk
    server_timeout_s: float = Field(gt=0)  # without a byte of an answer
    server_retries: int = Field(ge=0)  # requests in a row that bring no token


class SyncConfig(Record):
    """How new weights reach the engines.

    store: rank 0 puts them into Ray's object store (trainer/weight_sync.py). direct: ranks show their memory to engines on the
    same GPU and broadcast to the others (trainer/weight_links.py). auto: direct on GPUs, unless only changes are sent.
    """

    transport: Literal["auto", "store", "direct"]
    anchor_every: int = Field(gt=0)  # syncs; the others send only what changed. 1: all of it, every time
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


class AlgorithmConfig(Record):
    """How rewards become an update; the formulas are in rl/advantages.py, rl/algorithms.py and rl/off_policy.py."""

    advantage: Estimator
    uncertainty_focus: float = Field(ge=0)  # weighs groups by how uncertain their outcome is (MGPO, 2511.06221); 0: all alike
    discount: float = Field(gt=0, le=1)  # gae, reinforce_pp: of a reward, for each token before it
    gae_lambda: float = Field(ge=0, le=1)  # gae: 1 trusts rewards alone, 0 the next value
    value_lambda: float = Field(ge=0, le=1)  # gae: gae_lambda of the returns that the value head learns (VC-PPO, 2503.01491)
    value_decay: float = Field(gt=0, le=1)  # gae: what an update's returns still count in the value head's next fit
    value_coefficient: float = Field(ge=0)  # gae: weight of the value loss in the trunk that policy and value head share
    value_clip: float | None = Field(gt=0)  # gae: this loss trusts values that moved by at most so much
    value_warmup_rounds: int = Field(ge=0)  # gae: rounds in which the value head alone learns
    overlong_margin: int = Field(ge=0)  # tokens before rollout.max_new_tokens that cost reward (DAPO); 0: none do
    overlong_factor: float = Field(ge=0)  # what a response of max_new_tokens loses
    loss: Literal["ppo", "gspo", "cispo", "sapo", "dppo"]
    clip_low: float = Field(ge=0, le=1)  # ratios stay above 1 - clip_low; of dppo: by how much a probability may fall
    clip_high: float = Field(gt=0)  # ratios stay below 1 + clip_high; of dppo: by how much a probability may rise
    dual_clip: float | None = Field(gt=1)  # ppo: a token of negative advantage counts as if its ratio were at most so much
    sapo_temperatures: tuple[float, float]  # sapo: of positive and of other advantages
    entropy_bonus: float = Field(ge=0)  # weight of the entropy that the update also raises
    kl_coefficient: float = Field(ge=0)  # weight of the divergence from the policy at the start of RL; 0: that is not kept
    kl_estimator: Literal["k1", "k2", "k3", "unbiased"]  # k1 is taken off the reward, the others are losses; rl/kl.py
    aggregation: Literal["token", "sequence", "constant"]  # mean over tokens, over responses, or sum / (responses * longest)
    updates_per_round: int = Field(gt=0)  # optimizer steps, each on its share of the round's responses
    off_policy: Literal["recompute", "mask", "bypass", "decoupled", "staged"]
    truncation: float = Field(gt=0)  # cap of the importance weight of decoupled
    token_band: Band | None  # IcePop: learns tokens whose proximal / behaviour probability is in it
    sequence_band: Band | None  # the same for whole responses, of the geometric mean
    sequence_delta: float | None = Field(gt=0)  # OPSM: drops bad responses that became so many nats a token less likely

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


class LoopConfig(Record):
    rounds: int = Field(gt=0)
    sequence_length: int = Field(gt=1)  # samples are packed into rows of so many tokens
    micro_rows: int = Field(gt=0)
    dtype: Literal["auto", "float32", "bfloat16"]
    recompute: bool
    freeze_router: bool  # the gates keep their weights; the selection bias follows `balance`
    eval_every: int = Field(gt=0)  # rounds
    checkpoint_every: int = Field(gt=0)  # rounds
    keep_checkpoints: int = Field(gt=0)
    skip_nonfinite: int = Field(ge=0)  # updates in a row that may be left out because their gradient is not finite; 0: stop


class RLConfig(RunConfig):
    checkpoint: Path  # a run folder, one of its checkpoints, or a folder in the Hugging Face layout
    task: TaskConfig
    reward: RewardConfig
    warmup: WarmupConfig
    rollout: RolloutConfig
    sync: SyncConfig
    algorithm: AlgorithmConfig
    loop: LoopConfig

    @model_validator(mode="after")
    def consistent(self) -> RLConfig:
        if self.rollout.max_new_tokens >= self.loop.sequence_length:
            raise ValueError(
                f"rollout.max_new_tokens ({self.rollout.max_new_tokens}) leaves no room for a prompt in a row of "
                f"loop.sequence_length ({self.loop.sequence_length}) tokens; lower the one or raise the other"
            )
        if self.algorithm.overlong_margin > self.rollout.max_new_tokens:
            raise ValueError(
                f"algorithm.overlong_margin ({self.algorithm.overlong_margin}) is larger than rollout.max_new_tokens "
                f"({self.rollout.max_new_tokens}); lower it"
            )
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
        whole = self.rollout.top_k is None and self.rollout.top_p == 1 and self.rollout.min_p == 0
        if not whole and self.algorithm.off_policy in ("recompute", "mask", "staged"):
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

    def _consistent_with_server(self) -> None:
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


# ---------------------------------------------------------------- planning for a cluster


class LinkConfig(Record):
    latency_s: float = Field(ge=0)  # of a message
    gbytes: float = Field(gt=0)  # GB/s that a GPU sends, and at the same time receives


class MachineConfig(Record):
    """What one GPU and its links reach: published, or better measured."""

    gpus_per_node: int = Field(gt=0)
    memory_gib: float = Field(gt=0)
    product_tflops: float = Field(gt=0)  # TFLOP/s of grouped products in bfloat16
    memory_tbytes: float = Field(gt=0)  # TB/s read
    within: LinkConfig  # to the other GPUs of the node
    across: LinkConfig  # to other nodes
    exchange_s: float = Field(ge=0)  # that tokens of an MoE layer take beside their way: sizes, plan, the host's part
    host_gbytes: float = Field(gt=0)  # GB/s of the host's memory that the optimizer of one rank reaches
    host_link_gbytes: float = Field(gt=0)  # GB/s each way between a GPU and its host


class PlanConfig(Record):
    """A pretraining that is predicted and not run."""

    model: ModelConfig
    machine: MachineConfig
    gpus: int = Field(gt=1)
    sequence_length: int = Field(gt=1)
    batch_rows: int = Field(gt=0)  # of all ranks together, in one update
    loads: Literal["even", "zipf", "drift", "burst", "settling"]  # of the experts; launch/benchmarks/traces.py
    profile: Path | None  # a file of measured times that replace what the machine is said to reach
    picture: Path | None  # an .svg or .png of one layer's timeline
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def consistent(self) -> PlanConfig:
        if self.gpus > self.machine.gpus_per_node and self.gpus % self.machine.gpus_per_node:
            raise ValueError(
                f"gpus ({self.gpus}) do not fill nodes of {self.machine.gpus_per_node}; "
                "give a multiple, or machine.gpus_per_node"
            )
        if self.batch_rows % self.gpus:
            raise ValueError(f"batch_rows ({self.batch_rows}) does not divide over {self.gpus} gpus; change either")
        if self.sequence_length > self.model.max_positions:
            raise ValueError(
                f"sequence_length ({self.sequence_length}) is larger than model.max_positions ({self.model.max_positions})"
            )
        if self.picture is not None and self.picture.suffix not in (".svg", ".png"):
            raise ValueError(f"picture ({self.picture}) should end in .svg or .png")
        return self
