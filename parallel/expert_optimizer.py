"""The AdamW of the experts that a rank owns: float32 masters, gradients and moments, on the rank's device.

`ExpertOptimizer` is what the owner asks of it; offload.py does the same on the host. A row is one expert. Nothing here
communicates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kernels.accumulate import Sum, accumulate
from kernels.squares import squares
from parallel.adamw import AdamWSettings, adamw, set_lr, zero_steps
from parallel.expert_states import ExpertStates, StatesInMemory
from parallel.sparse_collectives import Parts


class ExpertOptimizer(ABC):
    states: ExpertStates  # masters and moments

    @abstractmethod
    def add_gradients(self, row: int, gradients: Parts) -> None:
        """Adds gradients of that row and those after it, which must not change any more."""

    @abstractmethod
    def sums(self, row: int, count: int) -> tuple[Sum, Sum] | None:
        """Where who asks adds the gradients of that row and those after it, instead; None: it has to be `add_gradients`."""

    @abstractmethod
    def gradients(self) -> Parts | None:
        """What has been added since the last step, shaped as the masters, once all of it has arrived; None before the first."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """Of each row's gradients, (rows,) float64 on the rank's device."""

    @abstractmethod
    def step(self, lr: float, scale: float, weights: Parts) -> None:
        """One update with gradients multiplied by `scale`, which are gone afterwards, then `round_masters`."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forgets what has been added since the last step."""

    @abstractmethod
    def round_masters(self, weights: Parts) -> None:
        """Writes the masters into the first rows of `weights`, in their dtype. Between updates only."""

    @abstractmethod
    def set_step_count(self, steps: int) -> None:
        """How many updates the moments have seen."""


class DeviceAdamW(ExpertOptimizer):
    """torch's AdamW, where the experts are computed."""

    def __init__(self, states: StatesInMemory, settings: AdamWSettings) -> None:
        self.states, self._masters = states, states.masters
        for master in self._masters:
            master.requires_grad_()
        self._adamw = adamw(list(self._masters), settings)
        for master, moments in zip(self._masters, states.moments, strict=True):
            self._adamw.state[master].update({"step": zero_steps(master), **moments})
        self._filled = [False] * states.rows  # rows that have got gradients since the last step

    def add_gradients(self, row: int, gradients: Parts) -> None:
        for total, gradient in zip(self.sums(row, gradients[0].shape[0]), gradients, strict=True):
            if total.fresh:
                total.total_EAB.copy_(gradient)
            else:
                accumulate(total.total_EAB, gradient)

    def sums(self, row: int, count: int) -> tuple[Sum, Sum]:
        rows = slice(row, row + count)
        fresh = not any(self._filled[rows])
        assert fresh or all(self._filled[rows]), "of a layer's own experts gradients come all at once, before those of copies"
        self._filled[rows] = [True] * count
        for master in self._masters:
            if master.grad is None:
                master.grad = torch.empty_like(master)
        gate_up, down = (Sum(master.grad[rows], fresh) for master in self._masters if master.grad is not None)
        return gate_up, down

    def gradients(self) -> Parts | None:
        found = tuple(master.grad for master in self._masters if master.grad is not None)
        assert not found or all(self._filled), "every MoE layer gives gradients, zeros where no token came"
        return found or None

    def squared_norms(self) -> Tensor:
        gradients = self.gradients()
        assert gradients is not None, "every MoE layer gives gradients, zeros where no token came"
        return torch.stack([squares(gradient) for gradient in gradients]).sum(dim=0)

    def step(self, lr: float, scale: float, weights: Parts) -> None:
        gradients = self.gradients()
        assert gradients is not None, "every MoE layer gives gradients, zeros where no token came"
        for gradient in gradients if scale != 1 else ():  # on one rank, where nothing is clipped, they are as they should be
            gradient.mul_(scale)
        set_lr(self._adamw, lr)
        self._adamw.step()
        self.drop_gradients()
        self.round_masters(weights)

    def drop_gradients(self) -> None:
        self._adamw.zero_grad(set_to_none=True)
        self._filled = [False] * len(self._filled)

    @torch.no_grad()
    def round_masters(self, weights: Parts) -> None:
        for rows, master in zip(weights, self._masters, strict=True):
            rows[: master.shape[0]].copy_(master)

    def set_step_count(self, steps: int) -> None:
        for master in self._masters:
            self._adamw.state[master]["step"].fill_(steps)
