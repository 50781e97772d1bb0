"""Refuses harmful updates: gradients that are not finite and, if asked, losses far above the recent ones.

All ranks decide the same, because they decide by sums over all ranks. When an update is refused, nothing has been changed yet.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from parallel.topology import World
from trainer.batch import TrainBatch
from trainer.tensor_files import save_tensors


class UpdateRefused(RuntimeError):
    """An update would have done harm; no parameter has been changed."""


@dataclass(frozen=True)
class Guard:
    """When an update is refused, and whether training goes on without it."""

    skip_nonfinite: int  # updates in a row that may be left out because a gradient is not finite
    spike_zscore: float | None  # a loss this many standard deviations above the mean of the window is a spike; None: none is
    spike_window: int  # losses
    on_spike: Literal["skip", "stop"]


def zscore(history: Sequence[float], loss: float) -> float:
    """Standard deviations by which `loss` exceeds the mean of `history`; 0 for fewer than two values, or where it does not."""
    if len(history) < 2:
        return 0.0
    above, deviation = loss - statistics.fmean(history), statistics.stdev(history)
    if above <= 0:
        return 0.0
    return above / deviation if deviation > 0 else math.inf


class LossWindow:
    """The last losses. It starts again with each attempt of a run, and judges nothing before it is full."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.losses: deque[float] = deque(maxlen=guard.spike_window)

    def spike(self, loss: float) -> float | None:
        """The z-score of `loss` if it is a spike. It enters the window either way, so a lasting new level is soon accepted."""
        limit = self.guard.spike_zscore
        if limit is None or not math.isfinite(loss):
            return None
        score = zscore(self.losses, loss) if len(self.losses) == self.guard.spike_window else 0.0
        self.losses.append(loss)
        return score if score > limit else None


# ---------------------------------------------------------------- where it begins


@dataclass(frozen=True, order=True)
class Fault:
    """Where a rank first met a number that is not finite. They are ordered by how near they are to the cause."""

    phase: int  # 0 forward, 1 backward, 2 in an expert's gradient on its owner
    number: int  # of what was looked at before it in this phase
    rank: int
    name: str

    def __str__(self) -> str:
        what = ("the output of", "the gradient of", "the gradient of")[self.phase]
        return f"{what} {self.name} on rank {self.rank}"


class FaultFinder:
    """Looks at every output and gradient of a module's passes inside `watching`; slow, for a batch known to be bad."""

    def __init__(self, module: nn.Module, rank: int) -> None:
        self.module, self.rank = module, rank
        self.fault: Fault | None = None
        self._seen = [0, 0]  # outputs, gradients

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            module.register_forward_hook(partial(self._output, name)) for name, module in self.module.named_modules() if name
        ]
        handles += [p.register_hook(partial(self._gradient, name)) for name, p in self.module.named_parameters()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _output(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, Tensor) and part.is_floating_point():
                self._look(0, name, part)

    def _gradient(self, name: str, gradient: Tensor) -> None:
        self._look(1, name, gradient)

    def _look(self, phase: int, name: str, tensor: Tensor) -> None:
        self._seen[phase] += 1
        if not bool(torch.isfinite(tensor).all()):
            fault = Fault(phase, self._seen[phase], self.rank, name)
            self.fault = fault if self.fault is None else min(self.fault, fault)


def first_fault(own: Fault | None, world: World) -> Fault | None:
    """The one nearest to the cause among all ranks' faults; None if nobody has one. Collective."""
    faults: list[dict[str, Any] | None] = [None if own is None else asdict(own)]
    if world.size > 1:
        faults = [None] * world.size
        dist.all_gather_object(faults, None if own is None else asdict(own))
    return min((Fault(**fault) for fault in faults if fault is not None), default=None)


def keep_batch(batch: TrainBatch, folder: Path, name: str, rank: int) -> str:
    """Writes this rank's rows of a refused update as NAME_rank_R.safetensors; says where they are, or why they are not."""
    tensors = {"tokens": batch.tokens_BS, "targets": batch.targets_BS, "documents": batch.documents_BS}
    tensors |= {"weights": batch.weights_BS, **{f"extras.{name}": value for name, value in batch.extras.items()}}
    tensors |= {} if batch.routed_BSLK is None else {"routed": batch.routed_BSLK}
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(whole, folder / f"{name}_rank_{rank}.safetensors")
    except (OSError, SafetensorError) as error:
        return f"the batch could not be kept: {error}"
    return f"the batch is in {folder}/{name}_rank_*.safetensors"
