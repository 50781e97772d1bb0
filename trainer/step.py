"""One rank's model, and the one optimizer step that pretraining, supervised warm-up and RL share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.vocab_loss import token_logprobs
from parallel.adamw import AdamWSettings
from parallel.balance import load_shares, max_violation, updated_bias
from parallel.dense import DenseZeRO
from parallel.expert_arena import ExpertShape
from parallel.expert_shards import ExpertShards
from parallel.materialisation import UNKNOWN, Materialisation, MaterialisationSettings
from parallel.moe_layer import ShardedExperts
from parallel.offload import expert_optimizer
from parallel.placement import even_owners
from parallel.policies import POLICIES
from parallel.topology import World
from parallel.transport import reads_peer_memory
from trainer import checkpoint
from trainer.batch import Objective, TrainBatch, cross_entropy
from trainer.checkpoint import CheckpointMeta
from trainer.config import BalanceConfig, ModelConfig, ParallelConfig
from trainer.model.attention import BatchInvariantAttention, PackedAttention, positions_of
from trainer.model.initial import initial_expert
from trainer.model.transformer import Attend, Transformer

OWNERS, LOADS, MACHINE = "placement.owners", "placement.loads", "placement.machine"  # names in a checkpoint


@dataclass(frozen=True)
class TrainerSpec:
    """What a rank needs to build its trainer; it travels from the driver to the ranks."""

    model: ModelConfig
    adamw: AdamWSettings
    balance: BalanceConfig
    parallel: ParallelConfig
    dtype: str  # "float32" or "bfloat16"
    recompute: bool
    micro_rows: int
    batch_invariant: bool  # forward passes give a token the bits that an engine gives it (kernels/linear.py)
    temperature: float  # divides the logits; 1 except in RL, where it is the sampling temperature
    seed: int


class Trainer:
    """Dense module under ZeRO, this rank's experts, and the selection bias. Every method is collective: all ranks call it."""

    def __init__(self, spec: TrainerSpec, world: World) -> None:
        config = spec.model
        dtype = getattr(torch, spec.dtype)
        self.spec, self.world = spec, world
        shape = ExpertShape(config.num_moe_layers, config.num_experts, config.hidden_size, config.expert_hidden_size)
        owner_LE = np.tile(even_owners(config.num_experts, world.size), (config.num_moe_layers, 1))
        initial, owned = partial(initial_expert, config, spec.seed), owner_LE.size // world.size
        offload, nvme_dir = spec.parallel.offload, spec.parallel.nvme_dir
        optimizer = expert_optimizer(offload, nvme_dir, owned, shape.parts, spec.adamw, world.device)
        peer_memory = reads_peer_memory(spec.parallel.transport, world)
        self.experts = ExpertShards(shape, initial, owner_LE, 0, world, dtype, optimizer, peer_memory)
        self.materialisation = Materialisation(self.experts, materialisation_settings(spec.parallel, config.top_k))
        self.model = Transformer(config, batch_invariant=spec.batch_invariant)
        self.model.initialize(spec.seed)
        self.dense = DenseZeRO(self.model.to(world.device), world, dtype, spec.adamw, spec.parallel.zero_stage)
        self.bias_LE = torch.zeros(config.num_moe_layers, config.num_experts, device=world.device)
        self.updates = 0

    # ------------------------------------------------------------ one update

    def learn(self, batch: TrainBatch, objective: Objective, lr: float) -> dict[str, float | list[list[float]]]:
        """One optimizer update on this rank's rows; every rank must hold the same number of rows.

        Minimises sum(weights * loss) / sum(weights), or / batch.denominator, all sums over all ranks, so the update does not
        depend on how rows are dealt out to ranks and micro-batches.

        Returns:
            Metrics of the global batch, the same on every rank: the objective's own averaged by the same weights, loss,
            entropy, gradient norm, learned tokens, balance.
        """
        batch = batch.to(self.world.device)
        weight = self.world.sum(batch.weights_BS.double().sum())
        denominator = weight if batch.denominator is None else torch.full_like(weight, batch.denominator)
        tokens = self.world.sum((batch.weights_BS > 0).sum())
        counts_LE = torch.zeros_like(self.bias_LE, dtype=torch.int64)
        totals: dict[str, Tensor] = {}
        starts = range(0, batch.num_rows, self.spec.micro_rows)
        for start in starts:
            micro = batch.rows(start, start + self.spec.micro_rows)
            loss, sums, counts = self._micro_batch(micro, objective, denominator)
            with self.experts.arena.backward_pass():
                self.dense.backward(loss, last=start == starts[-1])
            counts_LE += counts
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value
        norm = self.dense.step(lr, self.experts)
        self.updates += 1
        means = {name: float(self.world.sum(total) / weight) for name, total in sorted(totals.items())}
        balance = self._balance(self.world.sum(counts_LE))
        placement = self.materialisation.observe(counts_LE, len(starts), self.updates) if self.world.size > 1 else {}
        return {**means, **balance, **placement, "train/grad_norm": norm, "train/lr": lr, "train/tokens": int(tokens)}

    def _micro_batch(
        self, batch: TrainBatch, objective: Objective, denominator: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss to walk back from, weighted sums of the metrics, tokens per expert)."""
        logprobs_BS, entropy_BS, counts_LE = self._forward(batch)
        result = objective(logprobs_BS, entropy_BS, batch)
        # ZeRO averages over ranks; the factor makes that the sum that the global loss needs.
        loss = (result.loss_BS * batch.weights_BS).sum() * (self.world.size / denominator).to(torch.float32)
        metrics = {"train/loss": result.loss_BS, "train/entropy": entropy_BS, **result.metrics}
        sums = {name: (value.detach() * batch.weights_BS).double().sum() for name, value in metrics.items()}
        return loss, sums, counts_LE

    @torch.no_grad()
    def logprobs(self, batch: TrainBatch) -> Tensor:
        """Log-probabilities of the targets of this rank's rows under the weights as they are, (B, S), on the CPU."""
        micros = [batch.rows(start, start + self.spec.micro_rows) for start in range(0, batch.num_rows, self.spec.micro_rows)]
        return torch.cat([self._forward(micro.to(self.world.device))[0].cpu() for micro in micros])

    def _forward(self, batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
        calibrate = self.materialisation.calibrate if self.spec.parallel.calibrate and self.world.size > 1 else None
        output = self.model(
            batch.tokens_BS,
            positions_of(batch.documents_BS),
            batch.documents_BS >= 0,
            self._attend(batch.documents_BS),
            [ShardedExperts(layer, self.experts.arena, calibrate) for layer in range(self.spec.model.num_moe_layers)],
            self.bias_LE,
            recompute=self.spec.recompute and torch.is_grad_enabled(),
        )
        hidden_TD = output.hidden_BSD.flatten(0, 1)
        logprobs_T, entropy_T = token_logprobs(
            hidden_TD, self.model.head_VD, batch.targets_BS.flatten(), temperature=self.spec.temperature
        )
        shape = batch.tokens_BS.shape
        return logprobs_T.view(shape), entropy_T.view(shape), output.counts_LE

    def _attend(self, documents_BS: Tensor) -> Attend:
        if self.spec.batch_invariant:
            return BatchInvariantAttention(documents_BS, self.spec.model)
        return PackedAttention(documents_BS)

    def _balance(self, counts_LE: Tensor) -> dict[str, float | list[list[float]]]:
        """Reports the balance of a global batch and moves the selection bias once."""
        violation_L = max_violation(counts_LE)
        if self.spec.model.selection_bias and self.spec.balance.rate > 0:
            self.bias_LE = updated_bias(self.bias_LE, counts_LE, self.spec.balance.rule, self.spec.balance.rate)
        return {
            "moe/max_vio": float(violation_L.mean()),
            "moe/max_vio_worst_layer": float(violation_L.max()),
            "moe/bias_range": float(self.bias_LE.amax() - self.bias_LE.amin()),
            "moe/load": [[round(share, 5) for share in row] for row in load_shares(counts_LE).tolist()],
        }

    # ------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, batch: TrainBatch, token_bytes_V: Tensor) -> dict[str, float]:
        """Cross entropy, bits per byte of text, and MaxVio over all rows of all ranks."""
        batch = batch.to(self.world.device)
        counts_LE = torch.zeros_like(self.bias_LE, dtype=torch.int64)
        nats = torch.zeros(3, dtype=torch.float64, device=self.world.device)  # nats, tokens, bytes
        for start in range(0, batch.num_rows, self.spec.micro_rows):
            micro = batch.rows(start, start + self.spec.micro_rows)
            logprobs_BS, entropy_BS, counts = self._forward(micro)
            loss_BS = cross_entropy(logprobs_BS, entropy_BS, micro).loss_BS
            weights_BS = micro.weights_BS.double()
            bytes_BS = token_bytes_V.to(self.world.device)[micro.targets_BS]
            nats += torch.stack([(loss_BS * weights_BS).sum(), weights_BS.sum(), (bytes_BS * weights_BS).sum()])
            counts_LE += counts
        total, tokens, num_bytes = self.world.sum(nats).tolist()
        return {
            "eval/loss": total / tokens,
            "eval/bits_per_byte": total / math.log(2) / num_bytes,
            "eval/max_vio": float(max_violation(self.world.sum(counts_LE)).mean()),
        }

    # ------------------------------------------------------------ state

    def shared_state(self, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all but the experts, the same on every rank. Collective."""
        yield "bias", self.bias_LE
        if with_moments:
            yield OWNERS, torch.from_numpy(self.experts.owner_LE)
            yield LOADS, self.materialisation.state()
            yield MACHINE, self.materialisation.machine()
        yield from self.dense.named_masters()
        if with_moments:
            yield from self.dense.named_moments()

    def save(self, folder: Path, meta: CheckpointMeta, files: Mapping[str, str]) -> None:
        """Writes a checkpoint: `shared_state`, and each rank the experts that it owns."""
        own = self.experts.named_state(with_moments=True)
        checkpoint.write(folder, self.shared_state(with_moments=True), own, meta, files, self.world)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], with_moments: bool, updates: int) -> None:
        """Sets selection bias, dense parameters and experts, bit for bit; the owners must be these already.

        `updates`: optimizer steps taken so far.
        """
        self.bias_LE = tensors["bias"].to(self.world.device)
        self.experts.load_state(tensors, with_moments)
        self.dense.load(tensors, with_moments, updates if with_moments else 0)
        self.experts.set_step_count(updates if with_moments else 0)
        self.updates = updates if with_moments else 0

    def load(self, folder: Path, with_moments: bool) -> CheckpointMeta:
        """Loads a checkpoint that any number of ranks wrote. Without moments the optimizer and the placement start anew.

        With moments, the same number of ranks gets the same owners and copies, so it goes on bit for bit.
        """
        meta, tensors = checkpoint.read_meta(folder, self.spec.model), checkpoint.read(folder)
        same_ranks = True
        if with_moments:
            owner_LE = tensors[OWNERS]
            counts = torch.bincount(owner_LE.flatten(), minlength=self.world.size)
            same_ranks = len(counts) == self.world.size and bool(counts.min() == counts.max())
            if same_ranks:
                self.experts.reshard(owner_LE.numpy())
        self.load_state(tensors, with_moments, meta.updates)
        if with_moments:
            machine = tensors[MACHINE]  # of other ranks: other links, other room, to be measured anew
            self.materialisation.load_state(tensors[LOADS], machine if same_ranks else torch.full_like(machine, UNKNOWN))
        return meta

    @torch.no_grad()
    def reset_optimizer(self) -> None:
        """Moments and step count become zero, as before the first update; weights stay."""
        self.experts.reset_optimizer()
        for state in self.dense.zero.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.updates = 0


def materialisation_settings(config: ParallelConfig, top_k: int) -> MaterialisationSettings:
    return MaterialisationSettings(
        policy=POLICIES[config.policy],
        overlap=None if config.overlap == "auto" else config.overlap,
        memory=None if config.memory == "auto" else config.memory,
        rematerialise=config.rematerialise,
        reshard_every=config.reshard_every,
        calibrate=config.calibrate,
        top_k=top_k,
    )


def choose_dtype(asked: str) -> tuple[str, str]:
    """(dtype, why), for "auto", "float32" or "bfloat16"."""
    if asked != "auto":
        return asked, "as configured"
    if torch.cuda.is_available():
        return "bfloat16", "a GPU multiplies it at full speed; master weights stay float32"
    return "float32", "CPUs have no fast bfloat16, and float32 makes runs repeatable bit for bit"
