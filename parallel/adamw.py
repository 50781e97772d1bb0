"""The settings of AdamW that dense and expert parameters share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from inspect import unwrap

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # names in the optimizer's state and in a checkpoint


@dataclass(frozen=True)
class AdamWSettings:
    betas: tuple[float, float]
    eps: float
    weight_decay: float  # of matrices; norms and biases are never decayed
    clip_norm: float  # of the one gradient norm over dense and expert parameters


class AdamW(torch.optim.AdamW):
    """torch's, without the wrappers that hide it from torch.compile: when they are first called they import all of
    torch.compile, which nothing here uses, and that took a third of what a rank computes before its first update."""

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def adamw(parameters: list[Tensor], settings: AdamWSettings, frozen: Collection[Tensor] = ()) -> AdamW:
    """AdamW with decay on matrices that are not `frozen`. The learning rate is given at every step; it starts at zero.

    On GPUs it is one kernel that reads and writes each number once. Written as operations on whole tensors, torch's choice
    otherwise, it moves more than twice the bytes, and a second moment's worth of memory comes on top for a while.
    """
    still = {id(p) for p in frozen}
    decayed = [p for p in parameters if p.ndim > 1 and id(p) not in still]
    others = [p for p in parameters if p.ndim <= 1 or id(p) in still]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = True if all(p.is_cuda for p in parameters) else None
    return AdamW([g for g in groups if g["params"]], lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def zero_state(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state before the first step, so that it can be saved and loaded from the start on."""
    return {
        "step": zero_steps(parameter),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def zero_steps(parameter: Tensor) -> Tensor:
    """Where the kernel of a GPU counts its steps."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device)
