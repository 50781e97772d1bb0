"""One rank's model, and the one optimizer step that pretraining, supervised warm-up and RL share."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.errors import UserError
from kernels.vocab_loss import token_logprobs
from parallel.adamw import MOMENTS, AdamWSettings
from parallel.balance import load_shares, max_violation, updated_bias
from parallel.dense import DenseZeRO
from parallel.expert_arena import ExpertShape
from parallel.expert_shards import PARTS, ExpertShards
from parallel.materialisation import UNKNOWN, Materialisation, MaterialisationSettings
from parallel.moe_layer import ShardedExperts
from parallel.offload import expert_optimizer
from parallel.placement import even_owners
from parallel.policies import POLICIES
from parallel.schedule.pipeline import WHOLE, Degrees
from parallel.scheduling import Scheduling
from parallel.topology import World
from parallel.transport import TransportKind, transport_kind
from trainer import checkpoint
from trainer.batch import Objective, Predictions, TrainBatch, cross_entropy
from trainer.checkpoint import CheckpointMeta
from trainer.config.model import ModelConfig, NoisyTopKRouter
from trainer.config.run import BalanceConfig, ParallelConfig
from trainer.guard import Fault, FaultFinder, Guard, LossWindow, UpdateRefused, first_fault, keep_batch
from trainer.model.attention import BatchInvariantAttention, PackedAttention, positions_of
from trainer.model.gate import NoisyGate, RouterNoise, router_noise
from trainer.model.initial import initial_expert
from trainer.model.transformer import Attend, Transformer
from trainer.reference import Weights, read_reference
from trainer.value_head import ValueHead

log = logging.getLogger("tessera")
NOT_FINITE = "its gradient is not finite"
WAY_OUT = {
    True: "Lower optimizer.lr, or let training go on without such updates: skip_nonfinite of train or loop",
    False: "Raise train.spike_zscore, or let training go on without such updates: train.on_spike=skip",
}
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
    freeze_router: bool  # the gates' weights keep their values; the selection bias follows `balance`
    value_decay: float | None  # what an update still counts in the next fit of the value head; None: there is no head
    seed: int
    guard: Guard


class Trainer:
    """Dense module under ZeRO, this rank's experts, and the selection bias. Every method is collective: all ranks call it.

    The rows of an update that the guard refuses are kept in the folder `refused`, if it is given.
    """

    def __init__(self, spec: TrainerSpec, world: World, refused: Path | None = None) -> None:
        config = spec.model
        dtype = getattr(torch, spec.dtype)
        self.spec, self.world = spec, world
        shape = ExpertShape(config.num_moe_layers, config.num_experts, config.hidden_size, config.expert_hidden_size)
        owner_LE = np.tile(even_owners(config.num_experts, world.size), (config.num_moe_layers, 1))
        initial, owned = partial(initial_expert, config, spec.seed), owner_LE.size // world.size
        offload, nvme_dir = spec.parallel.offload, spec.parallel.nvme_dir
        optimizer = expert_optimizer(offload, nvme_dir, owned, shape.parts, spec.adamw, world.device)
        kind = transport_kind(spec.parallel.transport, world)
        fixed = fixed_degrees(spec.parallel, kind)
        self.experts = ExpertShards(shape, initial, owner_LE, 0, world, dtype, optimizer, kind)
        self.materialisation = Materialisation(self.experts, materialisation_settings(spec.parallel, config.top_k))
        self.scheduling = Scheduling(self.experts.arena, fixed, config.top_k, None if refused is None else refused.parent)
        self.model = Transformer(config, batch_invariant=spec.batch_invariant)
        self.model.initialize(spec.seed)
        self.model.to(world.device)
        self.dense = DenseZeRO(self.model, world, dtype, spec.adamw, spec.parallel.zero_stage, self._frozen())
        self.bias_LE = torch.zeros(config.num_moe_layers, config.num_experts, device=world.device)
        decay = spec.value_decay
        self.value_head = None if decay is None else ValueHead(config.hidden_size, config.num_layers, world, decay)
        self.reference: Weights | None = None
        self.updates = 0
        self.refused, self.refused_in_a_row, self.window = refused, 0, LossWindow(spec.guard)

    @property
    def _noisy(self) -> bool:
        """Whether learning draws noise for the router; passes that must equal a generation's have none."""
        return isinstance(self.spec.model.router, NoisyTopKRouter) and not self.spec.batch_invariant

    def _frozen(self) -> list[Tensor]:
        gates = self.model.gates()
        if self.spec.freeze_router:
            return [parameter for gate in gates for parameter in gate.parameters()]
        return [] if self._noisy else [gate.noise for gate in gates if isinstance(gate, NoisyGate)]

    # ------------------------------------------------------------ one update

    def learn(self, batch: TrainBatch, objective: Objective, lr: float) -> dict[str, float | list[list[float]]]:
        """One optimizer update on this rank's rows; every rank must hold the same number of rows.

        Minimises sum(weights * loss) / sum(weights), or / batch.denominator, all sums over all ranks, so the update does not
        depend on how rows are dealt out to ranks and micro-batches, unless experts choose among a micro-batch's tokens.

        Returns:
            Metrics of the global batch, the same on every rank: the objective's own averaged by the same weights, loss,
            entropy, gradient norm, learned tokens, balance. Of an update that the guard skips, only what is finite.

        Raises:
            UpdateRefused: the guard lets no such update pass; on all ranks, and nothing has been changed.
        """
        batch = batch.to(self.world.device)
        length = batch.tokens_BS.shape[1]
        tokens = min(self.spec.micro_rows, batch.num_rows) * length
        self.scheduling.prepare(tokens, lambda tokens: self._attention(tokens, length))
        weight, denominator = self._weight(batch)
        totals, counts_LE = self._gradients(batch, objective, denominator)
        means = self._means(totals, weight, batch)
        norm = self.dense.norm(self.experts)
        told = {**means, "train/grad_norm": norm, "train/lr": lr}
        if (harm := self._harm(norm, means["train/loss"])) is not None:
            self._refuse(harm, batch, objective, denominator)
            return {**{name: value for name, value in told.items() if math.isfinite(value)}, "train/skipped": 1}
        self.refused_in_a_row = 0
        self.dense.step(lr, self.experts)
        if self.value_head is not None:
            self.value_head.step()
        self.updates += 1
        balance = self._balance(self.world.sum(counts_LE))
        micros = -(-batch.num_rows // self.spec.micro_rows)
        placement = self.materialisation.observe(counts_LE, micros, self.updates) if self.world.size > 1 else {}
        schedule = self.scheduling.observe(self.materialisation.plans, counts_LE, micros)
        return {**told, **balance, **placement, **schedule}

    def learn_values(self, batch: TrainBatch, objective: Objective) -> dict[str, float]:
        """`learn` for the value head alone: the policy, its optimizer and the selection bias stay as they are."""
        assert self.value_head is not None, "this trainer has no value head"
        batch = batch.to(self.world.device)
        weight, denominator = self._weight(batch)
        totals, _ = self._gradients(batch, objective, denominator, trunk=False)
        self.value_head.step()
        return self._means(totals, weight, batch)

    def _weight(self, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """(sum of the weights of all ranks, what the sum of weighted losses is divided by)."""
        weight = self.world.sum(batch.weights_BS.double().sum())
        return weight, weight if batch.denominator is None else torch.full_like(weight, batch.denominator)

    def _means(self, totals: dict[str, Tensor], weight: Tensor, batch: TrainBatch) -> dict[str, float]:
        """Metrics of the global batch from this rank's weighted sums."""
        names = sorted(totals)
        learned = (batch.weights_BS > 0).sum().double()
        *sums, tokens = self.world.sum(torch.stack([*(totals[name] for name in names), learned])).tolist()  # one wait for all
        return {name: total / float(weight) for name, total in zip(names, sums, strict=True)} | {"train/tokens": int(tokens)}

    def _gradients(
        self, batch: TrainBatch, objective: Objective, denominator: Tensor, trunk: bool = True
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Forward and backward over all micro-batches; (this rank's weighted sums of the metrics, tokens per expert).

        Without `trunk` the value head alone learns, and there is no backward pass.
        """
        counts_LE = torch.zeros_like(self.bias_LE, dtype=torch.int64)
        totals: dict[str, Tensor] = {}
        starts = range(0, batch.num_rows, self.spec.micro_rows)
        for start in starts:
            micro = batch.rows(start, start + self.spec.micro_rows)
            noise = self._noise(batch, start, micro.num_rows) if self._noisy else None
            loss, sums, counts = self._micro_batch(micro, objective, denominator, trunk, noise)
            if trunk:
                with self.experts.arena.backward_pass():
                    self.dense.backward(loss, last=start == starts[-1])
            counts_LE += counts
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value
        return totals, counts_LE

    def _harm(self, norm: float, loss: float) -> str | None:
        """Why an update must not be made; the same on every rank."""
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return NOT_FINITE
        score = self.window.spike(loss)
        if score is None:
            return None
        return f"the loss {loss:.4g} is {score:.1f} standard deviations above the last {self.spec.guard.spike_window}"

    def _refuse(self, harm: str, batch: TrainBatch, objective: Objective, denominator: Tensor) -> None:
        """Forgets the gradients and keeps the batch; raises UpdateRefused unless the guard goes on without this update."""
        guard, update = self.spec.guard, self.updates + 1
        self._drop()
        fault = self._find_fault(batch, objective, denominator) if harm == NOT_FINITE else None
        where = "" if harm != NOT_FINITE else f", beginning in {fault}" if fault else ", but not when the batch is taken again"
        self.refused_in_a_row += 1
        name = f"update_{update:06d}_refusal_{self.refused_in_a_row}"
        kept = "" if self.refused is None else f"; {keep_batch(batch, self.refused, name, self.world.rank)}"
        told = f"update {update} is refused: {harm}{where}; nothing was changed{kept}"
        skips = self.refused_in_a_row <= guard.skip_nonfinite if harm == NOT_FINITE else guard.on_spike == "skip"
        if not skips:
            raise UpdateRefused(f"{told}. {WAY_OUT[harm == NOT_FINITE]}")
        log.warning("%s", told)

    def _find_fault(self, batch: TrainBatch, objective: Objective, denominator: Tensor) -> Fault | None:
        """Takes the batch again, looking at every output and gradient. Leaves no gradients behind."""
        finder = FaultFinder(self.model, self.world.rank)
        with finder.watching():
            self._gradients(batch, objective, denominator)
        bad = self.experts.bad_gradient()
        own = Fault(2, 0, self.world.rank, bad) if finder.fault is None and bad is not None else finder.fault
        self._drop()
        return first_fault(own, self.world)

    def _drop(self) -> None:
        """Forgets all gradients."""
        self.dense.drop(self.experts)
        if self.value_head is not None:
            self.value_head.drop()

    def _noise(self, batch: TrainBatch, start: int, rows: int) -> RouterNoise:
        """Of a micro-batch that begins at row `start` of this rank's part of the update's rows."""
        first = self.world.rank * batch.num_rows + start
        return router_noise(
            self.spec.seed, self.updates, range(first, first + rows), batch.tokens_BS.shape[1], self.world.device
        )

    def _micro_batch(
        self, batch: TrainBatch, objective: Objective, denominator: Tensor, trunk: bool, noise: RouterNoise | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss to walk back from, weighted sums of the metrics, tokens per expert)."""
        predicted, counts_LE = self._forward(batch, self.weights, trunk, noise)
        result = objective(predicted, batch)
        if self.value_head is not None and predicted.inputs_BSP is not None and result.returns_BS is not None:
            self.value_head.observe(predicted.inputs_BSP, result.returns_BS, batch.weights_BS)
        # ZeRO averages over ranks; the factor makes that the sum that the global loss needs.
        loss = (result.loss_BS * batch.weights_BS).sum() * (self.world.size / denominator).to(torch.float32)
        metrics = {"train/loss": result.loss_BS, "train/entropy": predicted.entropy_BS, **result.metrics}
        if predicted.replaced_BS is not None:
            metrics["moe/replay_changed"] = predicted.replaced_BS
        sums = {name: (value.detach() * batch.weights_BS).double().sum() for name, value in metrics.items()}
        return loss, sums, counts_LE

    @property
    def weights(self) -> Weights:
        """What the policy computes with at this moment."""
        return Weights(self.model, self.experts.arena, self.bias_LE)

    @torch.no_grad()
    def predict(self, batch: TrainBatch, policy: bool, reference: bool) -> dict[str, Tensor]:
        """What the weights as they are say of this rank's rows, (B, S) each, on the CPU.

        "logprobs" of the targets and, of a value head, "values", if the `policy` is asked; "reference_logprobs" if the
        `reference` is.
        """
        found: dict[str, list[Tensor]] = {}
        batch = batch.to(self.world.device)  # at once, and the answers likewise, so that the host runs ahead of the device
        for start in range(0, batch.num_rows, self.spec.micro_rows):
            micro = batch.rows(start, start + self.spec.micro_rows)
            told: dict[str, Tensor | None] = {}
            if policy:
                predicted, _ = self._forward(micro, self.weights)
                told |= {"logprobs": predicted.logprobs_BS, "values": predicted.values_BS}
            if reference:
                assert self.reference is not None, "no reference is kept"
                told["reference_logprobs"] = self._forward(micro, self.reference)[0].logprobs_BS
            for name, value_BS in told.items():
                if value_BS is not None:
                    found.setdefault(name, []).append(value_BS)
        return {name: torch.cat(parts).cpu() for name, parts in found.items()}

    def _forward(
        self, batch: TrainBatch, weights: Weights, trunk: bool = True, noise: RouterNoise | None = None
    ) -> tuple[Predictions, Tensor]:
        """(predictions, tokens per expert); without `trunk` there is no gradient."""
        calibrates = self.spec.parallel.calibrate and self.world.size > 1 and weights is not self.reference
        calibrate = self.materialisation.calibrate if calibrates else None
        with torch.set_grad_enabled(trunk and torch.is_grad_enabled()):
            output = weights.model(
                batch.tokens_BS,
                positions_of(batch.documents_BS),
                batch.documents_BS >= 0,
                self._attend(batch.documents_BS, batch.host_documents_BS),
                [self._layer(layer, weights, calibrate) for layer in range(self.spec.model.num_moe_layers)],
                weights.bias_LE,
                recorded_BSLK=None if weights is self.reference else batch.routed_BSLK,  # which has gates of its own
                depths=() if self.value_head is None else self.value_head.depths,
                recompute=self.spec.recompute and torch.is_grad_enabled(),
                noise=noise,
            )
            logprobs_T, entropy_T = token_logprobs(
                output.hidden_BSD.flatten(0, 1),
                weights.model.head_VD,
                batch.targets_BS.flatten(),
                temperature=self.spec.temperature,
            )
            values_BS = inputs_BSP = None
            if self.value_head is not None:
                inputs_BSP = self.value_head.inputs(output.depths_BSD)
                values_BS = self.value_head(inputs_BSP)
        shape = batch.tokens_BS.shape
        logprobs_BS, entropy_BS = logprobs_T.view(shape), entropy_T.view(shape)
        return Predictions(logprobs_BS, entropy_BS, values_BS, inputs_BSP, output.replaced_BS), output.counts_LE

    def _layer(self, layer: int, weights: Weights, calibrate: Callable[[int, Tensor], None] | None) -> ShardedExperts:
        degrees, marks = self.scheduling.degrees_L[layer], self.scheduling.marks
        found = ShardedExperts(layer, weights.arena, calibrate, degrees)
        return replace(found, mark=marks) if layer == 0 and marks is not None and torch.is_grad_enabled() else found

    def _attention(self, tokens: int, length: int) -> Tensor:
        """That of a layer, forward, over so many tokens in rows of at most `length`, for who times it."""
        rows, length = max(tokens // length, 1), min(length, tokens)
        documents_BS = torch.zeros(rows, length, dtype=torch.int64, device=self.world.device)
        attend = self._attend(documents_BS)
        return self.model.last_attention(positions_of(documents_BS), attend, getattr(torch, self.spec.dtype))

    def _attend(self, documents_BS: Tensor, on_host_BS: Tensor | None = None) -> Attend:
        if self.spec.batch_invariant:
            read_BS = documents_BS if on_host_BS is None else on_host_BS
            return BatchInvariantAttention(read_BS, self.spec.model, documents_BS.device)
        return PackedAttention(documents_BS)

    def _balance(self, counts_LE: Tensor) -> dict[str, float | list[list[float]]]:
        """Reports the balance of a global batch and moves the selection bias once."""
        violation_L = max_violation(counts_LE)
        if self.spec.model.selection_bias and self.spec.balance.rate > 0:
            self.bias_LE = updated_bias(self.bias_LE, counts_LE, self.spec.balance.rule, self.spec.balance.rate)
        return {
            "moe/max_vio": float(violation_L.mean()),
            "moe/max_vio_worst_layer": float(violation_L.max()),
            "moe/dead_experts": int((counts_LE == 0).sum()),
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
            predicted, counts = self._forward(micro, self.weights)
            loss_BS = cross_entropy(predicted, micro).loss_BS
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
            if self.value_head is not None:
                yield from self.value_head.named_state()

    def state_to_save(self, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what lies in memory; what all ranks hold comes from one of them only, in turn. Collective."""
        for index, (name, tensor) in enumerate(self.shared_state(with_moments)):
            if index % self.world.size == self.world.rank:
                yield name, tensor
        if self.spec.parallel.offload != "nvme":
            yield from self.experts.named_state(with_moments)

    def state_on_disk(self, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of this rank's experts if they lie on its disk; each is valid until the next is asked for."""
        if self.spec.parallel.offload == "nvme":
            yield from self.experts.named_state(with_moments)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], with_moments: bool, updates: int) -> None:
        """Sets selection bias, dense parameters, experts and, with moments, the value head, bit for bit.

        The owners must be these already. `updates`: optimizer steps taken so far.
        """
        self.bias_LE = tensors["bias"].to(self.world.device)
        self.experts.load_state(tensors, with_moments)
        if with_moments and self.value_head is not None:
            for name, tensor in self.value_head.named_state():
                tensor.copy_(tensors[name])
        self.dense.load(tensors, with_moments, updates if with_moments else 0)
        self.experts.set_step_count(updates if with_moments else 0)
        self.updates = updates if with_moments else 0

    def load(self, folder: Path, with_moments: bool) -> CheckpointMeta:
        """Loads a checkpoint that any number of ranks wrote. Without moments the optimizer and the placement start anew.

        With moments, the same number of ranks gets the same owners and copies, so it goes on bit for bit.
        """
        meta = checkpoint.read_meta(folder, self.spec.model)
        checkpoint.verify(folder, self.world)
        tensors = checkpoint.read(folder, dict(self._shapes(with_moments)))
        same_ranks = True
        if with_moments:
            owner_LE = tensors[OWNERS].long()
            same_ranks = owner_LE.unique(return_counts=True)[1].unique().numel() == 1
            same_ranks &= owner_LE.unique().tolist() == list(range(self.world.size))
            if same_ranks:
                self.experts.reshard(owner_LE.numpy())
        self.load_state(tensors, with_moments, meta.updates)
        if with_moments:
            machine = tensors[MACHINE]  # of other ranks: other links, other room, to be measured anew
            self.materialisation.load_state(tensors[LOADS], machine if same_ranks else torch.full_like(machine, UNKNOWN))
        return meta

    def _shapes(self, with_moments: bool) -> Iterator[tuple[str, Sequence[int]]]:
        """(name, shape) of what `load` takes out of a checkpoint."""
        shape = self.experts.arena.shape
        masters: dict[str, Sequence[int]] = {
            f"dense.{name}": parameter.shape for name, parameter in self.model.named_parameters()
        }
        for layer, expert in itertools.product(range(shape.layers), range(shape.experts)):
            masters |= {f"experts.{layer}.{expert}.{part}": size for part, size in zip(PARTS, shape.parts, strict=True)}
        yield "bias", self.bias_LE.shape
        yield from masters.items()
        if with_moments:
            yield from ((f"{name}.{moment}", size) for name, size in masters.items() for moment in MOMENTS)
            yield OWNERS, self.experts.owner_LE.shape
            yield LOADS, self.materialisation.state().shape
            yield MACHINE, self.materialisation.machine().shape
            if self.value_head is not None:
                yield from ((name, tensor.shape) for name, tensor in self.value_head.named_state())

    def keep_reference(self, folder: Path) -> None:
        """From here on `predict` also asks the policy of this checkpoint, which takes the room of another set of weights."""
        dtype = getattr(torch, self.spec.dtype)
        self.reference = read_reference(folder, self.spec.model, self.spec.batch_invariant, dtype, self.world)

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


def fixed_degrees(config: ParallelConfig, kind: TransportKind) -> Degrees | None:
    """In how many chunks layers run; None is to be planned. Raises UserError where chunks are asked for and tokens do not
    travel straight to their ranks as messages."""
    if config.schedule == "auto":
        return None
    if config.schedule == "off":
        return WHOLE
    if kind != "messages" and config.schedule > 1:
        found = "the ranks read each other's memory" if kind == "peer_memory" else "tokens travel in two levels"
        raise UserError(
            f"parallel.schedule={config.schedule} cuts layers into chunks of messages, but {found}, where a layer is whole; "
            "set parallel.transport=messages, or parallel.schedule=auto"
        )
    return Degrees(config.schedule, config.schedule)


def choose_dtype(asked: str) -> tuple[str, str]:
    """(dtype, why), for "auto", "float32" or "bfloat16"."""
    if asked != "auto":
        return asked, "as configured"
    if torch.cuda.is_available():
        return "bfloat16", "a GPU multiplies it at full speed; master weights stay float32"
    return "float32", "CPUs have no fast bfloat16, and float32 makes runs repeatable bit for bit"
