"""The owners' optimizer on the host: masters, moments and gradients there, stepped by DeepSpeed's CPU AdamW.

Source: Ren et al., "ZeRO-Offload", arXiv 2101.06840. The weights that the rank computes with stay on its device. Masters and
moments are in the memory of the host or on its disk (nvme.py).

Letters: O experts owned by a rank over all layers.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from functools import cache
from inspect import unwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.errors import UserError
from kernels.squares import squares
from parallel.adamw import AdamWSettings
from parallel.expert_optimizer import DeviceAdamW, ExpertOptimizer
from parallel.expert_states import ExpertState, ExpertStates, StatesInMemory
from parallel.nvme import StatesOnDisk
from parallel.operators import building
from parallel.sparse_collectives import Parts, Shapes

UNDER_WAY_BYTES = 512 * 2**20  # of gradients that may wait on the device for their way to the host, beside the newest


def expert_optimizer(
    offload: str, nvme_dir: Path | None, rows: int, parts: Shapes, settings: AdamWSettings, device: torch.device
) -> ExpertOptimizer:
    """For `rows` experts of `parts` that are computed on `device`; parallel.offload and parallel.nvme_dir say where it lies.

    Raises:
        UserError: the machine lacks what that needs.
    """
    if offload == "none":
        return DeviceAdamW(StatesInMemory(rows, parts, device), settings)
    if offload == "cpu":
        return CPUAdamW(StatesInMemory(rows, parts, torch.device("cpu")), settings, device)
    assert nvme_dir is not None, "trainer/config/run.py asks for it"
    return CPUAdamW(StatesOnDisk(rows, parts, nvme_dir), settings, device)


class CPUAdamW(ExpertOptimizer):
    """DeepSpeed's AdamW for CPUs on masters and moments of the host."""

    def __init__(self, states: ExpertStates, settings: AdamWSettings, device: torch.device) -> None:
        """`device` is where experts are computed and gradients come from."""
        self.states, self._settings = states, settings
        self._gradients = HostGradients(states.rows, states.parts, device)
        self._adamw = _cpu_adam(settings)
        self._steps = 0

    def add_gradients(self, row: int, gradients: Parts) -> None:
        self._gradients.add(row, gradients)

    def sums(self, row: int, count: int) -> None:
        """On the host, where no kernel adds."""

    def gradients(self) -> Parts | None:
        return self._gradients.arrived()

    def squared_norms(self) -> Tensor:
        return self._gradients.squared_norms()

    @torch.no_grad()
    def step(self, lr: float, scale: float, weights: Parts) -> None:
        gradients = self._gradients.arrived()
        assert gradients is not None, "every MoE layer gives gradients, zeros where no token came"
        self._steps += 1
        group = self._adamw.param_groups[0]
        group.update(self._constants(lr, self._steps))

        def update(row: int, state: ExpertState) -> None:
            for master, gradient, moments in zip(state.masters, gradients, state.moments, strict=True):
                master.grad = gradient[row].mul_(scale)
                self._adamw.state[master].update({"step": self._steps - 1, **moments})
            group["params"] = list(state.masters)
            self._adamw.step()
            self._adamw.state.clear()
            self._round(row, state.masters, weights)

        # One expert after the other: the weights of each are on their way to the device while the next is stepped.
        self.states.change(range(self.states.rows), update)
        self._gradients.clear()

    def _constants(self, lr: float, step: int) -> dict[str, float]:
        """The group's settings with AdamW's bias correction in them; the operator's own is off.

        That one multiplies powers of beta up in float32 from step to step, so its bits depend on where a run was resumed.
        lr / c1 * m / (sqrt(v) / c2 + eps) is lr * c2 / c1 * m / (sqrt(v) + eps * c2), and the decay stays lr * weight_decay.
        Moments are averaged with betas in float32, so those are what is corrected for.
        """
        beta1, beta2 = torch.tensor(self._settings.betas, dtype=torch.float32).tolist()
        c1, c2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        return {
            "lr": lr * c2 / c1,
            "eps": self._settings.eps * c2,
            "weight_decay": self._settings.weight_decay * c1 / c2,
        }

    def drop_gradients(self) -> None:
        self._gradients.arrived()  # those under way must not come after
        self._gradients.clear()

    @torch.no_grad()
    def round_masters(self, weights: Parts) -> None:
        for row, state in enumerate(self.states.read(range(self.states.rows))):
            self._round(row, state.masters, weights)

    def _round(self, row: int, masters: Parts, weights: Parts) -> None:
        """Rounded here, where gradients were until now: pinned, and in bfloat16 half the bytes cross."""
        for part, gradient, rows in zip(masters, self._gradients.parts, weights, strict=True):
            rounded = gradient[row].view(-1).view(rows.dtype)[: part.numel()].view(part.shape)
            rows[row].copy_(rounded.copy_(part), non_blocking=True)

    def set_step_count(self, steps: int) -> None:
        self._steps = steps


class HostGradients:
    """Float32 gradients in the memory of the host, pinned if the device is a GPU; masters and moments never cross, so they need
    not be.

    Every contribution is added on the device: on a stream of its own the sum so far comes from the host and the new one goes
    back, while backward goes on below. So the thread that launches backward waits for nothing, and the host's memory is read
    and written once; adding there would take room for arrivals, a thread that waits for them, and reading them besides. The
    first contribution to a row in a step only goes out. Sums are in float32 and have the bits that the same contributions have
    without offload; but a layer's own experts', which a product there adds before they are rounded, come in the experts' dtype.
    """

    def __init__(self, rows: int, parts: Shapes, device: torch.device) -> None:
        """Of `rows` experts whose tensors have the shapes `parts`."""
        self.parts = tuple(torch.empty(rows, *part, dtype=torch.float32) for part in parts)
        self._squares = torch.zeros(len(parts), rows, dtype=torch.float64, device=device)  # of each row's norm
        self._filled = [False] * rows  # rows with a contribution in this step
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._under_way: deque[tuple[torch.cuda.Event, Parts]] = deque()
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            for part in self.parts:
                _pin(part)

    def add(self, row: int, gradients: Parts) -> None:
        """Adds gradients of that row and those after it."""
        if not gradients[0].shape[0]:
            return
        if self._stream is None:
            self._add(row, gradients)
            return
        self._wait_for_room()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._add(row, gradients)
            event = torch.cuda.Event()
            event.record()
        self._under_way.append((event, gradients))

    def _wait_for_room(self) -> None:
        """Backward waits where the way to the host is slower. Gradients are kept until backward's stream has waited for their
        copies, so their memory is free for what it computes next, whenever the host comes by."""
        while sum(part.nbytes for _, parts in self._under_way for part in parts) > UNDER_WAY_BYTES:
            event, _ = self._under_way.popleft()
            torch.cuda.current_stream().wait_event(event)

    @torch.no_grad()
    def _add(self, row: int, gradients: Parts) -> None:
        rows = slice(row, row + gradients[0].shape[0])
        for part, gradient, norms in zip(self.parts, gradients, self._squares, strict=True):
            filled = self._filled[row]
            total = part[rows].to(self._device, non_blocking=True).add_(gradient) if filled else gradient.float()
            norms[rows] = squares(total)
            part[rows].copy_(total, non_blocking=True)
        self._filled[rows] = [True] * gradients[0].shape[0]

    def arrived(self) -> Parts | None:
        """The gradients, once they are all here; None if there were none since `clear`."""
        if self._stream is not None:
            self._stream.synchronize()
            self._under_way.clear()
        assert all(self._filled) or not any(self._filled), "gradients came for some experts only"
        return self.parts if any(self._filled) else None

    def squared_norms(self) -> Tensor:
        assert self.arrived() is not None, "every MoE layer gives gradients, zeros where no token came"
        return self._squares.sum(dim=0)

    def clear(self) -> None:
        self._filled = [False] * len(self._filled)


def _pin(tensor: Tensor) -> None:
    """Page-locks memory that there is. torch's own pinned memory comes in powers of two, up to twice of what is asked for."""
    runtime, address = torch.cuda.cudart(), tensor.data_ptr()
    torch.cuda.check_error(int(runtime.cudaHostRegister(address, tensor.nbytes, 0)))
    weakref.finalize(tensor, runtime.cudaHostUnregister, address)


def check_offload(offload: str, nvme_dir: Path | None) -> None:
    """Raises UserError if this machine lacks what parallel.offload needs."""
    settings = AdamWSettings(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    expert_optimizer(offload, nvme_dir, 1, ((8, 8),), settings, torch.device("cpu"))


@cache
def remember_cpu() -> None:
    """DeepSpeed asks twice for each optimizer which CPU this is, and each time that takes programs a second to find out."""
    import cpuinfo  # it runs some of them itself

    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)


def _cpu_adam(settings: AdamWSettings) -> Any:
    """DeepSpeed's operator without parameters yet, compiled by the first process that asks for it on a machine.

    Raises:
        UserError: it cannot be compiled or loaded.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # after RANK and WORLD_SIZE are set; it also takes a second

    remember_cpu()

    class Unwrapped(DeepSpeedCPUAdam):
        add_param_group = unwrap(torch.optim.Optimizer.add_param_group)  # as in adamw.py: its wrapper imports torch.compile

    try:
        with building():
            optimizer = Unwrapped(
                [torch.empty(0)], betas=settings.betas, bias_correction=False, adamw_mode=True, fp32_optimizer_states=True
            )
    except (RuntimeError, ImportError, OSError) as error:  # of torch's build, of the linker, of a file system without locks
        reason = str(error.__cause__ or error).partition("\n")[0].partition(": [")[0]  # without the compiler's command line
        raise UserError(
            f"parallel.offload=cpu and nvme need DeepSpeed's AdamW for CPUs, which cannot be compiled here: {reason}. "
            "Install g++ and put it and ninja on the PATH, or set parallel.offload=none"
        ) from error
    return optimizer
