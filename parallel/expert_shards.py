"""The experts that this rank owns: weights, float32 master weights, gradients and optimizer state.

Experts stay out of the dense module and out of DeepSpeed: an expert's gradient is complete on its owner after backward, because
the tokens of all ranks came to it, so there is nothing to reduce. It is the sum over ranks of gradients of local losses, each
multiplied by the world size (ZeRO averages, see dense.py); dividing by the world size makes it the gradient of the global loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from parallel.adamw import AdamWSettings, adamw, set_lr, zero_state
from parallel.moe_layer import LocalExperts, ParallelExperts
from parallel.topology import World

MOMENTS = ("exp_avg", "exp_avg_sq")


class ExpertShards:
    """Experts of all MoE layers owned by this rank. Shapes: gate_up (E/W, 2F, D) and down (E/W, D, F) for each layer."""

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], world: World, dtype: torch.dtype, settings: AdamWSettings
    ) -> None:
        self.world = world
        self.masters = [t.to(world.device, torch.float32).clone().requires_grad_() for pair in layers for t in pair]
        # In float32 a weight is its own master; in bfloat16 the model computes with a rounded copy.
        self.weights = self.masters if dtype == torch.float32 else [m.detach().to(dtype).requires_grad_() for m in self.masters]
        self.optimizer = adamw(list(self.masters), settings)
        for master in self.masters:
            self.optimizer.state[master].update(zero_state(master))

    def layers(self) -> list[LocalExperts | ParallelExperts]:
        """One callable for each MoE layer, over the current weights."""
        pairs = list(zip(self.weights[::2], self.weights[1::2], strict=True))
        if self.world.size == 1:
            return [LocalExperts(gate_up, down) for gate_up, down in pairs]
        return [ParallelExperts(gate_up, down, self.world) for gate_up, down in pairs]

    def accumulate_gradients(self) -> None:
        """After each micro-batch's backward: gradients of rounded weights are summed in float32 at the masters."""
        if self.weights is self.masters:
            return
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    def average_gradients(self) -> None:
        """After the last micro-batch: from the sum of scaled local losses to the gradient of the global loss."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad.div_(self.world.size)

    def squared_norm(self) -> Tensor:
        """The squared gradient norm of the experts of all ranks, each counted once; the same on every rank."""
        own = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for master in self.masters:
            assert master.grad is not None, "average_gradients comes first"
            own += master.grad.double().square().sum()
        return self.world.sum(own)

    def step(self, lr: float, scale: float) -> None:
        """One AdamW update with gradients multiplied by `scale`; gradients are gone afterwards."""
        for master in self.masters:
            assert master.grad is not None, "average_gradients comes first"
            master.grad.mul_(scale)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.round_masters()

    @torch.no_grad()
    def round_masters(self) -> None:
        """Brings the weights that the model computes with up to the masters."""
        if self.weights is not self.masters:
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, this rank's slice along the expert dimension)."""
        for index, master in enumerate(self.masters):
            yield f"experts.{index // 2}.{'down' if index % 2 else 'gate_up'}", master

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        return {key: self.optimizer.state[master][key] for key in MOMENTS}

    def set_step_count(self, steps: int) -> None:
        for master in self.masters:
            self.optimizer.state[master]["step"].fill_(steps)
