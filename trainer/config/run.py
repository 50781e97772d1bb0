"""Options of every run: data, optimizer, parallelism, cluster, logging; and those of pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from parallel.schedule.pipeline import MOST_CHUNKS
from trainer.config.model import ModelConfig
from trainer.config.record import Record


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"({path}) is in a home that this machine does not know; write the whole path") from None


UserPath = Annotated[Path, AfterValidator(_expanded)]  # may begin with ~, which no shell replaces after a name with a dot


class TokenizerConfig(Record):
    vocab_size: int = Field(ge=260)  # includes the 256 bytes and the special tokens
    train_mib: float = Field(gt=0)  # how much text the tokenizer is trained on
    file: Path | None = None  # an existing tokenizer.json; then nothing is trained


class Source(Record):
    """Options of every source of text."""

    validation_share: float = Field(gt=0, lt=1)  # documents held out, chosen by a hash of their text
    max_mib: float | None = Field(default=None, gt=0)  # stop reading after this much text; null reads everything
    cache_dir: UserPath  # token arrays and trained tokenizers, keyed by what they were made from


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


class OptimizerConfig(Record):
    """AdamW. The learning rate warms up linearly, then follows the schedule down to `final_lr_share * lr`."""

    lr: float = Field(gt=0)
    schedule: Literal["cosine", "wsd", "constant"]  # wsd: warm-up, stable, then a linear decay over the last `decay_share`
    warmup_steps: int = Field(ge=0)
    decay_share: float = Field(ge=0, le=1)
    final_lr_share: float = Field(ge=0, le=1)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    clip_norm: float = Field(gt=0, allow_inf_nan=True)  # of the global gradient norm of dense and expert parameters together


class BalanceConfig(Record):
    """Auxiliary-loss-free balancing: once per global batch, the selection bias moves against the load."""

    rule: Literal["sign", "proportional"]
    rate: float = Field(ge=0)  # 0 freezes the bias


class ParallelConfig(Record):
    """Each expert is owned by one rank and copied, step by step, to where its tokens are (FSSDP); dense parameters are data
    parallel under DeepSpeed ZeRO. Without copies this is plain expert parallelism."""

    zero_stage: Literal[1, 2]
    policy: Literal["cost", "hecate", "eplb", "laer", "faster_moe", "llep", "plain"]  # who gets copies; parallel/policies.py
    # peer_memory: ranks read each other's memory. messages: a token is sent to every rank that serves it. two_level: it crosses
    # to a node once. auto: peer_memory if all ranks can, as on one node; else messages; with several nodes of several ranks,
    # the faster of messages and two_level by measured plans if schedule=auto (schedule/transports.py), else two_level.
    transport: Literal["auto", "messages", "two_level", "peer_memory"]
    # To which dtype rows of tokens are rounded in messages; auto: not rounded (parallel/hooks.py)
    message_dtype: Literal["auto", "bfloat16", "float8"]
    # Number of chunks of an MoE layer whose tokens travel as messages, over one level or two (parallel/chunked_experts.py).
    # off: one, and nothing overlaps. auto: separately for forward and backward, the number that measurements predict to be the
    # fastest; one where ranks read each other's memory.
    # Unless it is off, dense gradients travel in slices under the backward pass (parallel/gradient_slices.py).
    schedule: Literal["auto", "off"] | Annotated[int, Field(ge=1, le=MOST_CHUNKS)]
    overlap: Literal["auto"] | Annotated[int, Field(ge=0)]  # hecate's t: how many of a layer's hottest experts may be copied
    memory: Literal["auto"] | Annotated[int, Field(ge=0)]  # m: copies of others' experts that a rank has memory for, per layer
    rematerialise: bool  # keep copies of one layer at a time and fetch them again for the backward pass
    reshard_every: int = Field(ge=0)  # steps between two decisions about owners; 0: the first owners stay
    calibrate: bool  # plan a layer's copies again after its gate, if the gain pays for the wait
    # Where experts' masters, gradients and moments are. none: on the device. cpu: in the host's memory, where AdamW runs. nvme:
    # gradients in the host's memory, masters and moments on its disk.
    offload: Literal["none", "cpu", "nvme"]
    nvme_dir: Path | None  # for offload=nvme: a folder on a local disk of every node; its files end with the run

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
    micro_rows: int = Field(gt=0)  # rows of one rank's forward pass
    dtype: Literal["auto", "float32", "bfloat16"]  # auto: bfloat16 on GPUs, float32 on CPUs
    # Keep the input of each block and compute activations again in the backward pass, but not what experts give (docs/fsmoe.md)
    recompute: bool
    eval_every: int = Field(gt=0)  # steps
    eval_rows: int = Field(gt=0)
    checkpoint_every: int = Field(gt=0)  # steps; the last step is always kept
    keep_checkpoints: int = Field(gt=0)
    memory_checkpoint_every: int = Field(ge=0)  # steps between two checkpoints in the memory of the nodes; 0: none
    skip_nonfinite: int = Field(ge=0)  # updates in a row that may be left out because their gradient is not finite; 0: stop
    spike_zscore: float | None = Field(gt=0)  # a loss this many deviations above the window's mean is a spike; null: none is
    spike_window: int = Field(gt=1)  # number of losses; starts empty when a run is resumed
    on_spike: Literal["skip", "stop"]


EARLY_S = 60  # SLURM's signals may come this much too early, says sbatch's manual


class SlurmConfig(Record):
    """What `launch.submit` asks SLURM for. Nodes are exclusive to the run; a Ray node runs on each as long as the job."""

    nodes: int = Field(gt=0)
    gpus_per_node: int = Field(ge=0)  # 0: ranks on CPUs, one per node
    time_limit: str = Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")  # as sbatch takes it
    partition: Annotated[str, Field(pattern=r"^[^\n]+$")] | None
    account: Annotated[str, Field(pattern=r"^[^\n]+$")] | None
    stop_before_s: int = Field(gt=0)  # time before the limit at which the run writes a checkpoint and requeues
    max_requeues: int = Field(ge=0)
    sbatch: tuple[Annotated[str, Field(pattern=r"^-[^\n]+$")], ...]  # further options of sbatch: ['--qos=high']
    shell: tuple[str, ...]  # lines before Python starts: module load cuda

    @property
    def limit_s(self) -> int:
        """Seconds of `time_limit`, minutes[:seconds], hours:minutes:seconds or days-hours[:minutes[:seconds]]; 0: no limit."""
        days, dash, rest = self.time_limit.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
        return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))

    @model_validator(mode="after")
    def leaves_time(self) -> SlurmConfig:
        if 0 < self.limit_s <= self.stop_before_s + EARLY_S:
            raise ValueError(
                f"time_limit ({self.time_limit}, {self.limit_s} s) leaves a run no time: stop_before_s ({self.stop_before_s}) "
                f"before it, and up to {EARLY_S} s earlier, SLURM tells it to stop; raise time_limit, or lower stop_before_s"
            )
        return self


class ClusterConfig(Record):
    """Where the processes run. What this run starts on its own machine binds to `host`."""

    address: str | None  # of a running Ray cluster; null starts one on this machine, for this run only
    nodes: tuple[str, ...] | None  # Ray's names of nodes that must all take part, equally; null: any nodes
    ranks: Literal["auto"] | Annotated[int, Field(gt=0)]  # auto: one per GPU, at most 2; 2 on a CPU
    min_ranks: int | None = Field(gt=0)  # enough until lost nodes are replaced; null: wait for all
    shrink_after_s: float = Field(ge=0)  # wait this long for places for all before going on with fewer
    gpu_type: str | None  # Ray's name of the GPUs that ranks run on: H100; null: any
    threads_per_rank: Literal["auto"] | Annotated[int, Field(gt=0)]
    max_restarts: int = Field(ge=0)  # in a row without a newer checkpoint; for an engine: starts in a row
    start_timeout_s: float = Field(gt=0)
    collective_timeout_s: float = Field(gt=0)
    engine_timeout_s: float = Field(gt=0)  # without an answer; then an engine of RL is replaced
    object_store_mib: int = Field(ge=80)
    host: str
    dashboard: bool
    dashboard_port: int = Field(gt=0, lt=65536)
    dollars_per_gpu_hour: float | None = Field(gt=0)  # per GPU of the run; null: no metric of costs
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
    """Steps that the profiler records; trainer/tracing.py. `python -m launch.trace` asks for others during a run."""

    range: tuple[int, int] | None  # the first and the last step or round; null: none
    ranks: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...]
    memory: bool  # also record the allocators of GPUs

    @model_validator(mode="after")
    def consistent(self) -> TraceConfig:
        if self.range is not None and not 1 <= self.range[0] <= self.range[1] < self.range[0] + 100:
            raise ValueError(f"trace.range {list(self.range)} should be the first and the last of 1 to 100 steps")
        return self


LONGEST_NAME = 200  # bytes; file systems have 255, and the names of links and temporary files are longer


def _folder_name(name: str) -> str:
    if not name or Path(name).name != name or name.startswith(("latest-", ".")) or not name.isprintable():
        raise ValueError(f"({name!r}) should be a plain folder name, not empty, a path, hidden or latest-...; see runs_dir")
    if (size := len(name.encode())) > LONGEST_NAME:
        raise ValueError(f"is a folder name of {size} bytes, and {LONGEST_NAME} are the most; shorten it")
    return name


class RunConfig(Record):
    """Options of both pretraining and RL."""

    seed: int = Field(ge=0, lt=2**63)
    dry_run: bool  # print the resolved configuration and the estimates, then stop
    resume: Literal["never", "auto"]  # auto: continue `run_name`, or the newest unfinished run of this kind
    runs_dir: UserPath
    run_name: Annotated[str, AfterValidator(_folder_name)] | None  # null: kind, date and time
    optimizer: OptimizerConfig
    balance: BalanceConfig
    parallel: ParallelConfig
    cluster: ClusterConfig
    logger: LoggerConfig
    trace: TraceConfig

    def check_trace(self, option: str, last: int) -> None:
        if self.trace.range is not None and self.trace.range[0] > last:
            raise ValueError(
                f"trace.range {list(self.trace.range)} begins after the last step ({option} = {last}), so nothing would be "
                f"traced; lower it, or set trace.range=null"
            )

    def check_memory_checkpoints(self, option: str, every: int) -> None:
        if every and self.parallel.offload == "nvme":
            raise ValueError(
                f"{option}={every} keeps what the experts' optimizer holds in the memory of the nodes several times, and "
                f"parallel.offload=nvme says that it has no room there; set {option}=0, or choose another offload"
            )


class PretrainConfig(RunConfig):
    BRINGS: ClassVar[Mapping[str, tuple[str, ...]]] = {"checkpoint": ("model", "tokenizer")}

    # Start from its weights, model and tokenizer: a run folder, one of its checkpoints, or a folder in the Hugging Face layout;
    # null: random weights of `model`.
    checkpoint: UserPath | None
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    train: TrainConfig

    @model_validator(mode="after")
    def consistent(self) -> PretrainConfig:
        self.check_memory_checkpoints("train.memory_checkpoint_every", self.train.memory_checkpoint_every)
        self.check_trace("train.steps", self.train.steps)
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) exceeds train.steps ({self.train.steps})")
        if self.checkpoint is None:
            self.check_model()
            if self.model.vocab_size is not None:
                raise ValueError(
                    f"model.vocab_size ({self.model.vocab_size}) comes from the tokenizer when pretraining begins with random "
                    "weights; set tokenizer.vocab_size, or tokenizer.file, instead"
                )
        return self

    def check_model(self) -> None:
        """Raises ValueError if the model cannot be trained with these options."""
        if self.train.sequence_length > self.model.max_positions:
            raise ValueError(
                f"train.sequence_length ({self.train.sequence_length}) is larger than model.max_positions "
                f"({self.model.max_positions}); shorten the rows or raise max_positions"
            )
        if self.balance.rate > 0 and not self.model.selection_bias:
            raise ValueError(
                f"balance.rate ({self.balance.rate}) moves a selection bias that the model does not have; "
                "set model.selection_bias=true or choose balance=frozen"
            )
