"""The optimizer step that pretraining, supervised warm-up and RL share; predictions and evaluation use the same passes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kernels.host_device import to_host
from kernels.vocab_loss import token_logprobs
from parallel.balance import balance_metrics, max_violation, updated_bias
from parallel.moe_layer import ShardedExperts
from parallel.topology import World
from trainer.batch import Objective, Predictions, TrainBatch, cross_entropy
from trainer.guard import Fault, FaultFinder, LossWindow, UpdateRefused, first_fault, keep_batch
from trainer.metrics import Value
from trainer.model.attention import BatchInvariantAttention, PackedAttention, positions_of
from trainer.model.gate import RouterNoise, router_noise
from trainer.model.layers import Attend
from trainer.reference import Weights
from trainer.state import TrainerSpec, TrainerState

log = logging.getLogger("tessera")
NOT_FINITE = "its gradient is not finite"
WAY_OUT = {
    True: "Lower optimizer.lr, or let training go on without more such updates: skip_nonfinite of train or loop",
    False: "Raise train.spike_zscore, or let training go on without such updates: train.on_spike=skip",
}


class Trainer(TrainerState):
    """One rank's trainer. Every method is collective: all ranks call it.

    Rows of an update that the guard refuses are kept in the folder `refused`, if given.
    """

    def __init__(self, spec: TrainerSpec, world: World, refused: Path | None = None) -> None:
        super().__init__(spec, world, None if refused is None else refused.parent)
        self.refused, self.refused_in_a_row, self.window = refused, 0, LossWindow(spec.guard)

    # ------------------------------------------------------------ one update

    def learn(self, batch: TrainBatch, objective: Objective, lr: float) -> dict[str, Value]:
        """One optimizer update on this rank's rows; every rank must hold the same number of rows.

        Minimises sum(weights * loss) / sum(weights), or / batch.denominator, all sums over all ranks, so the update does not
        depend on how rows are distributed over ranks and micro-batches, unless experts choose among a micro-batch's tokens.

        Returns:
            Metrics of the global batch, the same on every rank: those of the objective, averaged by the same weights; loss,
            entropy, gradient norm, learned tokens, balance. If the guard skips the update, only finite ones.

        Raises:
            UpdateRefused: the guard refuses the update; raised on all ranks, and nothing has been changed.
        """
        batch = batch.to(self.world.device)
        length = batch.tokens_BS.shape[1]
        tokens = min(self.spec.micro_rows, batch.num_rows) * length
        self.scheduling.prepare(tokens, lambda tokens, backward: self._attention(tokens, length, backward))
        weight, denominator = self._weight(batch)
        totals, counts_LE, on_host = self._gradients(batch, objective, denominator)
        # While the device is still in the backward pass, the host plans with the loads, before it waits for the device.
        counts, micros = on_host(), -(-batch.num_rows // self.spec.micro_rows)
        loads_LE = counts.double().numpy() / micros
        ahead = self.materialisation.ahead(loads_LE, self.updates + 1) if self.world.size > 1 else None
        bias_LE = self._next_bias(counts_LE)
        beside = self.dense.squared_norm(self.experts), bias_LE.amax() - bias_LE.amin()
        means, (squared_norm, bias_range) = self._means(totals, weight, batch, beside)
        norm = math.sqrt(squared_norm) if math.isfinite(squared_norm) else math.nan
        told = {**means, "train/grad_norm": norm, "train/lr": lr}
        if (harm := self._harm(norm, means["train/loss"])) is not None:
            self._refuse(harm, batch, objective, denominator)
            return {**{name: value for name, value in told.items() if math.isfinite(value)}, "train/skipped": 1}
        self.refused_in_a_row = 0
        self.dense.step(lr, norm, self.experts)
        if self.value_head is not None:
            self.value_head.step()
        self.updates, self.bias_LE = self.updates + 1, bias_LE
        placement = {} if ahead is None else self.materialisation.take(ahead, self.updates)
        copying = None if self.materialisation.setting is None else self.materialisation.setting.costs
        schedule = self.scheduling.observe(self.materialisation.plans, loads_LE, copying)
        return {**told, **balance_metrics(counts), "moe/bias_range": bias_range, **placement, **schedule}

    def learn_values(self, batch: TrainBatch, objective: Objective) -> dict[str, float]:
        """`learn` for the value head only: the policy, its optimizer and the selection bias do not change."""
        assert self.value_head is not None, "this trainer has no value head"
        batch = batch.to(self.world.device)
        weight, denominator = self._weight(batch)
        totals, *_ = self._gradients(batch, objective, denominator, trunk=False)
        self.value_head.step()
        return self._means(totals, weight, batch)[0]

    def _weight(self, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """(sum of the weights of all ranks, denominator of the sum of weighted losses)."""
        weight = self.world.sum(batch.weights_BS.double().sum())
        return weight, weight if batch.denominator is None else torch.full_like(weight, batch.denominator)

    def _means(
        self, totals: dict[str, Tensor], weight: Tensor, batch: TrainBatch, beside: Sequence[Tensor] = ()
    ) -> tuple[dict[str, float], list[float]]:
        """(metrics of the global batch from this rank's weighted sums, the numbers `beside` them), with a single wait."""
        names = sorted(totals)
        learned = (batch.weights_BS > 0).sum().double()
        sums = self.world.sum(torch.stack([*(totals[name] for name in names), learned]))
        found = torch.cat([sums, torch.stack([weight, *(number.double() for number in beside)])]).tolist()
        *totals_of, tokens, weights = found[: len(names) + 2]
        means = {name: total / weights for name, total in zip(names, totals_of, strict=True)}
        return means | {"train/tokens": int(tokens)}, found[len(names) + 2 :]

    def _gradients(
        self, batch: TrainBatch, objective: Objective, denominator: Tensor, trunk: bool = True
    ) -> tuple[dict[str, Tensor], Tensor, Callable[[], Tensor]]:
        """Forward and backward over all micro-batches. Without `trunk` only the value head learns, without a backward pass.

        Returns:
            This rank's weighted sums of the metrics; the tokens per expert of all ranks; and a function that
            returns the latter on the host, waiting only for the last forward pass.
        """
        counts_LE = torch.zeros_like(self.bias_LE, dtype=torch.int64)
        totals: dict[str, Tensor] = {}
        starts = range(0, batch.num_rows, self.spec.micro_rows)
        for start in starts:
            micro = batch.rows(start, start + self.spec.micro_rows)
            noise = self._noise(batch, start, micro.num_rows) if self.noisy else None
            loss, sums, counts = self._micro_batch(micro, objective, denominator, trunk, noise)
            counts_LE += counts
            if last := start == starts[-1]:
                on_host = to_host(self.world.sum(counts_LE))
            if trunk:
                with self.experts.arena.backward_pass():
                    self.dense.backward(loss, last=last)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value
        return totals, counts_LE, on_host

    def _harm(self, norm: float, loss: float) -> str | None:
        """Why the update must not be made, or None; the same on every rank."""
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
            used_up = harm == NOT_FINITE and guard.skip_nonfinite > 0
            before = f"So were the {guard.skip_nonfinite} before it, which is the limit of skip_nonfinite. " if used_up else ""
            raise UpdateRefused(f"{told}. {before}{WAY_OUT[harm == NOT_FINITE]}")
        log.warning("%s", told)

    def _find_fault(self, batch: TrainBatch, objective: Objective, denominator: Tensor) -> Fault | None:
        """Repeats the batch and checks every output and gradient. Leaves no gradients behind."""
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
        """Noise of a micro-batch that begins at row `start` of this rank's rows of the update."""
        first = self.world.rank * batch.num_rows + start
        return router_noise(
            self.spec.seed, self.updates, range(first, first + rows), batch.tokens_BS.shape[1], self.world.device
        )

    def _micro_batch(
        self, batch: TrainBatch, objective: Objective, denominator: Tensor, trunk: bool, noise: RouterNoise | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss for the backward pass, weighted sums of the metrics, tokens per expert)."""
        predicted, counts_LE = self._forward(batch, self.weights, trunk, noise)
        result = objective(predicted, batch)
        if self.value_head is not None and predicted.inputs_BSP is not None and result.returns_BS is not None:
            self.value_head.observe(predicted.inputs_BSP, result.returns_BS, batch.weights_BS)
        # ZeRO averages over ranks; this factor turns the average into the sum that the global loss needs.
        loss = (result.loss_BS * batch.weights_BS).sum() * (self.world.size / denominator).to(torch.float32)
        metrics = {"train/loss": result.loss_BS, "train/entropy": predicted.entropy_BS, **result.metrics}
        if predicted.replaced_BS is not None:
            metrics["moe/replay_changed"] = predicted.replaced_BS
        sums = {name: (value.detach() * batch.weights_BS).double().sum() for name, value in metrics.items()}
        return loss, sums, counts_LE

    @torch.no_grad()
    def predict(self, batch: TrainBatch, policy: bool, reference: bool) -> dict[str, Tensor]:
        """Predictions of the current weights for this rank's rows, (B, S) each, on the CPU.

        If `policy`: "logprobs" of the targets and, with a value head, "values". If `reference`: "reference_logprobs".
        """
        found: dict[str, list[Tensor]] = {}
        batch = batch.to(self.world.device)  # all at once, like the results, so that the host runs ahead of the device
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
                recorded_BSLK=None if weights is self.reference else batch.routed_BSLK,  # the reference uses its own gates
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
        found = ShardedExperts(layer, weights.arena, calibrate, degrees, slices=self.dense.slices)
        return replace(found, mark=marks) if layer == 0 and marks is not None and torch.is_grad_enabled() else found

    def _attention(self, tokens: int, length: int, backward: bool) -> None:
        """One layer's attention over this many tokens in rows of at most `length`, for timing."""
        rows, length = max(tokens // length, 1), min(length, tokens)
        documents_BS = torch.zeros(rows, length, dtype=torch.int64, device=self.world.device)
        attend = self._attend(documents_BS)
        self.model.last_attention(positions_of(documents_BS), attend, getattr(torch, self.spec.dtype), backward)

    def _attend(self, documents_BS: Tensor, on_host_BS: Tensor | None = None) -> Attend:
        read_BS = documents_BS if on_host_BS is None else on_host_BS
        if self.spec.batch_invariant:
            return BatchInvariantAttention(read_BS, self.spec.model, documents_BS.device)
        return PackedAttention(read_BS, documents_BS.device)

    def _next_bias(self, counts_LE: Tensor) -> Tensor:
        """The selection bias, moved once by the loads of a global batch."""
        if not self.spec.model.selection_bias or self.spec.balance.rate == 0:
            return self.bias_LE
        return updated_bias(self.bias_LE, counts_LE, self.spec.balance.rule, self.spec.balance.rate)

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
