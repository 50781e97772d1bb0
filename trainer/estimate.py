"""What a run will need, before anything is allocated: parameters, tokens, FLOPs, memory. Pure arithmetic.

Activations are estimated from the tensors that the backward pass keeps. Allocators, communication buffers and libraries are not
included (about 0.5 GiB per process).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from kernels.vocab_loss import CPU_CHUNK_LOGITS, GRADIENT_BYTES
from parallel.expert_arena import ExpertShape
from parallel.nvme import IN_FLIGHT, expert_bytes
from parallel.offload import UNDER_WAY_BYTES
from trainer.config.model import CosineRouter, ModelConfig, NoisyTopKRouter
from trainer.config.rl import RLConfig, SyncConfig
from trainer.config.run import ParallelConfig, PretrainConfig
from trainer.model.transformer import parameter_counts

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
FLOAT32 = 4


LABELS = {"optimizer_state": "optimizer", "backward_weights": "backward"}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: on its device, and of its host's memory and disk what offloading puts there."""

    parameters: int  # what the model computes with
    copies: int  # of experts that other ranks own
    backward_weights: int  # the reference that CPUs compute experts with keeps theirs for the backward pass
    reference: int  # the frozen policy of an RL run that is held to it
    gradients: int
    optimizer_state: int  # AdamW's two moments and float32 master weights
    activations: int  # of one micro-batch
    exchange: int  # where ranks show each other tokens and results
    logits: int  # what exists at once of the logits and of what is made of them
    host: int  # beside a GPU
    disk: int

    @property
    def on_device(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("host", "disk")}

    @property
    def total(self) -> int:
        return sum(self.on_device.values())


def memory_per_rank(
    model: ModelConfig,
    ranks: int,
    rows: int,
    sequence_length: int,
    dtype: str,
    parallel: ParallelConfig,
    recompute: bool,
    on_gpu: bool,
    reference: bool = False,
) -> Memory:
    """Memory of one of `ranks` ranks that takes `rows` rows through the model at once.

    Every rank owns equally many experts with all that belongs to them, and has room for `parallel.memory` copies a layer. ZeRO
    splits the optimizer state of the dense parameters, stage 2 their gradients too. A rank on a CPU has one memory, offload or
    not. What offload=nvme has on the disk is in memory a few experts at a time. A `reference` is a second set of weights, its
    experts sharded alike, without gradients, optimizer or copies.
    """
    counts, size = parameter_counts(model), BYTES[dtype]
    experts = (counts.total - counts.dense) // ranks
    dense_gradients = counts.dense * size // (ranks if parallel.zero_stage == 2 else 1)
    expert_gradients, expert_state, host, disk = experts * FLOAT32, experts * 3 * FLOAT32, 0, 0
    if parallel.offload == "nvme":
        one = expert_bytes(ExpertShape(1, 1, model.hidden_size, model.expert_hidden_size).parts)
        expert_state, disk = IN_FLIGHT * one, experts // counts.per_expert * one
    if parallel.offload != "none" and on_gpu:
        host = expert_gradients + expert_state
        expert_gradients, expert_state = min(experts * size, UNDER_WAY_BYTES), 0
    tokens, fused = rows * sequence_length, on_gpu and dtype == "bfloat16"
    in_a_layer = model.num_experts // ranks + parallel.copies_kept(1, ranks)
    layers_back = 1 if recompute else model.num_moe_layers
    return Memory(
        parameters=counts.dense * size + experts * size,
        copies=parallel.copies_kept(model.num_moe_layers, ranks) * counts.per_expert * size,
        backward_weights=0 if fused else layers_back * in_a_layer * counts.per_expert * size,
        reference=(counts.dense + experts) * size if reference else 0,
        gradients=dense_gradients + expert_gradients,
        optimizer_state=counts.dense * 3 * FLOAT32 // ranks + expert_state,
        activations=tokens * _activations_per_token(model, size, ranks, recompute, fused),
        exchange=tokens * _exchanged_per_token(model, size, ranks) if parallel.transport in ("auto", "peer_memory") else 0,
        logits=_logits(tokens, vocab_size(model), model.hidden_size, dtype),
        host=host,
        disk=disk,
    )


def _logits(tokens: int, vocabulary: int, hidden: int, dtype: str) -> int:
    """kernels/vocab_loss.py: float32 keeps a chunk and its gradient; bfloat16 a chunk's gradient and two float32 (T, D)."""
    if dtype == "float32":
        return 2 * FLOAT32 * min(CPU_CHUNK_LOGITS, tokens * vocabulary)
    return min(GRADIENT_BYTES, BYTES[dtype] * tokens * vocabulary) + 2 * FLOAT32 * tokens * hidden


def _exchanged_per_token(model: ModelConfig, size: int, ranks: int) -> int:
    """Two blocks with a row for each rank that a token may go to (parallel/peer_exchange.py)."""
    return 2 * min(ranks, model.top_k) * model.hidden_size * size if ranks > 1 else 0


def _activations_per_token(model: ModelConfig, size: int, ranks: int, recompute: bool, fused: bool) -> int:
    """Bytes that the backward pass keeps for one token. `fused`: of experts only what kernels/hopper keeps."""
    hidden, heads, kv_heads = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    qk = (heads + kv_heads) * (2 if model.qk_norm else 1)  # before and after the norms
    attention = 4 * hidden + qk + 2 * heads + kv_heads
    dense = attention + 4 * model.dense_hidden_size
    arrived = min(ranks, model.top_k)  # a token's rows, on all ranks together
    if fused:
        routed = arrived * hidden + model.top_k * 2 * model.expert_hidden_size
    else:
        exchanged = 2 * arrived if ranks > 1 else 0  # as received and as they go back
        routed = model.top_k * (3 * hidden + 4 * model.expert_hidden_size) + exchanged * hidden
    shared = 4 * model.num_shared_experts * model.expert_hidden_size
    gate = 3 * model.num_experts  # float32
    if isinstance(model.router, NoisyTopKRouter):
        gate += 2 * model.num_experts  # its noise, and how much of it
    elif isinstance(model.router, CosineRouter):
        gate += model.num_experts + 2 * model.router.size  # before and after the norm, and the temperature
    moe = attention + routed + shared + gate * FLOAT32 // size
    layers = [dense] * model.num_dense_layers + [moe] * model.num_moe_layers
    kept = model.num_layers * hidden + max(layers) if recompute else sum(layers)
    return (kept + 2 * hidden) * size


def vocab_size(model: ModelConfig) -> int:
    assert model.vocab_size is not None, "the vocabulary size comes from the tokenizer"
    return model.vocab_size


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Forward and backward: 6 for each active parameter in a matrix product, and causal attention over half the row."""
    return training_flops(model, 1, sequence_length / 2)


def training_flops(model: ModelConfig, tokens: int, pairs: float) -> int:
    """Forward and backward of this many tokens, without recomputation: 6 for each active parameter in a matrix product, and 12
    of each layer's width for every pair of a token and one that it attends to."""
    in_products = parameter_counts(model).active - (0 if model.tie_embeddings else vocab_size(model) * model.hidden_size)
    return 6 * in_products * tokens + int(12 * model.num_layers * model.num_heads * model.head_dim * pairs)


# ---------------------------------------------------------------- in words


def budget_lines(
    config: PretrainConfig | RLConfig, model: ModelConfig, ranks: int, dtype: str, reason: str, on_gpu: bool
) -> list[str]:
    """What is printed before a run. `reason` says why the dtype is what it is."""
    counts = parameter_counts(model)
    run, rows, length, recompute = _pretraining(config, model) if isinstance(config, PretrainConfig) else _rounds(config)
    reference = isinstance(config, RLConfig) and config.algorithm.kl_coefficient > 0
    memory = memory_per_rank(model, ranks, rows, length, dtype, config.parallel, recompute, on_gpu, reference)
    shares = {LABELS.get(name, name): size / memory.total for name, size in memory.on_device.items()}
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.015)
    kept = f"optimizer of {IN_FLIGHT} of them" if memory.disk else "optimizer"
    beside = [f"host    {in_gib(memory.host)} of its memory a rank: experts' gradients and {kept}"] if memory.host else []
    beside += [f"disk    {in_gib(memory.disk)} in {config.parallel.nvme_dir} a rank: experts' optimizer"] if memory.disk else []
    every = config.train.memory_checkpoint_every if isinstance(config, PretrainConfig) else config.loop.memory_checkpoint_every
    beside += _checkpoints_in_memory(counts.total * 3 * FLOAT32 // ranks) if every else []
    if isinstance(config, RLConfig) and config.rollout.server is None:
        where = "each on a GPU of its own" if config.rollout.placement == "separate" else "on the ranks' GPUs"
        least = "" if config.rollout.min_engines is None else f"{config.rollout.min_engines} to "
        beside += [f"engines {least}{config.rollout.engines}, {where if on_gpu else config.rollout.placement}"]
        beside += _sync(config.sync, counts.total * BYTES[dtype], on_gpu)
    experts = f"{model.num_moe_layers} MoE layers x {model.num_experts} experts, {model.top_k} per token"
    return [
        f"model   {millions(counts.total)} parameters, {millions(counts.active)} active per token; {experts}",
        *run,
        f"ranks   {ranks} x {model.num_experts // ranks} experts a layer, micro-batches of {rows} x {length:,} tokens",
        f"memory  {in_gib(memory.total)} a rank, without libraries: {parts}",
        *beside,
        f"dtype   {dtype}: {reason}",
    ]


def _checkpoints_in_memory(state: int) -> list[str]:
    """trainer/keeper.py: what training has copied, a whole checkpoint and one on its way; the last two of another node too."""
    one, several = in_gib(3 * state), in_gib(5 * state)
    return [f"host    {one} of its memory a rank for checkpoints there, {several} where they also go to another node"]


def _sync(config: SyncConfig, size: int, on_gpu: bool) -> list[str]:
    """How weights reach the engines, and what rank 0's host keeps to find changes: those sent last beside those of now."""
    if config.is_direct(on_gpu):
        return [f"sync    {in_gib(size)} from the ranks to the engines directly"]
    line = f"sync    {in_gib(size)} through the object store"
    if config.anchor_every == 1:
        return [line]
    return [
        f"{line} every {config.anchor_every} rounds, what changed in between",
        f"host    {in_gib(2 * size)} of rank 0's memory at a sync: the weights of now, and for good those sent last",
    ]


def _pretraining(config: PretrainConfig, model: ModelConfig) -> tuple[list[str], int, int, bool]:
    train = config.train
    step_tokens = train.batch_rows * train.sequence_length
    tokens = train.steps * step_tokens
    flops = flops_per_token(model, train.sequence_length)
    run = [
        f"step    {train.batch_rows:,} rows x {train.sequence_length:,} tokens = {step_tokens:,}",
        f"run     {train.steps:,} steps x {step_tokens:,} tokens = {tokens:,}",
        f"compute {scaled(flops)} FLOPs per token x {tokens:,} tokens = {scaled(flops * tokens)} FLOPs",
    ]
    return run, train.micro_rows, train.sequence_length, train.recompute


def _rounds(config: RLConfig) -> tuple[list[str], int, int, bool]:
    rollout, loop, updates = config.rollout, config.loop, config.algorithm.updates_per_round
    samples = rollout.groups * rollout.samples_per_group
    each_round = f"{updates} update{'s' * (updates != 1)} a round"
    run = [
        f"round   {rollout.groups} groups x {rollout.samples_per_group} samples = {samples:,}, at most "
        f"{rollout.max_new_tokens} tokens each; {rollout.over_provision:g} times as many groups are submitted",
        f"run     {loop.rounds:,} rounds x {samples:,} samples = {loop.rounds * samples:,}, {each_round}",
    ]
    return run, loop.micro_rows, loop.sequence_length, loop.recompute


def scaled(number: float) -> str:
    """4.98 T, 23.1 G."""
    for limit, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {letter}"
    return f"{number:g}"


def millions(number: int) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.2f} million"


def in_gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
