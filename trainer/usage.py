"""How an update used its devices: MFU, waits for communication, times without a kernel.

MFU is as in PaLM (arXiv 2204.02311, appendix B): the FLOPs that the model needs, forward and backward, over those that the
published peak allows in the same time. Recomputation does not count. Attention counts only unmasked pairs of tokens, while PaLM
counts whole squares, which is twice as much in a row of one document.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.topology import World
from trainer.batch import TrainBatch
from trainer.config.model import ModelConfig
from trainer.estimate import training_flops
from trainer.model.attention import positions_of

SAMPLE_S = 0.2  # the driver itself looks between one and six times a second
BFLOAT16_TFLOPS = {  # dense products, as published, by the name that the driver gives
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H20": 148.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250.0,
}


def published_peak(device: str, dtype: str) -> float | None:
    """FLOP/s of a device with this name in products of `dtype`; None where that is not known here."""
    tflops = BFLOAT16_TFLOPS.get(device) if dtype == "bfloat16" else None
    return None if tflops is None else tflops * 1e12


def work_of(documents_BS: Tensor) -> tuple[int, int]:
    """(tokens, pairs of a token and one that it sees, itself included) of rows whose padding has document -1."""
    real_BS = documents_BS >= 0
    seen_BS = torch.where(real_BS, positions_of(documents_BS).long() + 1, 0)
    return int(real_BS.sum()), int(seen_BS.sum())


class IdleWatch:
    """How long a GPU had no kernel of anybody, as its driver samples it (NVML); a thread asks, and the GPU notices nothing."""

    def __init__(self, device: torch.device) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._ask, self._error = pynvml.nvmlDeviceGetUtilizationRates, pynvml.NVMLError
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        self._ask(self._handle)  # raises where the driver does not tell, as for a part of a GPU
        self._idle_s, self._seen_s, self._share = 0.0, 0.0, math.nan  # of looks since the last call of `take`, and before it
        self._taken, self._lock = time.perf_counter(), threading.Lock()
        threading.Thread(target=self._watch, name="idle watch", daemon=True).start()

    @classmethod
    def of(cls, device: torch.device) -> IdleWatch | None:
        """None on a CPU, and where the driver does not tell."""
        if device.type != "cuda":
            return None
        import pynvml

        try:
            return cls(device)
        except pynvml.NVMLError:
            return None

    def _watch(self) -> None:
        looked = time.perf_counter()
        while True:
            time.sleep(SAMPLE_S)
            now = time.perf_counter()
            try:
                idle_s = (1 - self._ask(self._handle).gpu / 100) * (now - looked)
            except self._error:  # it is not known any more, from here on
                idle_s = math.nan
            with self._lock:
                self._idle_s += idle_s
                self._seen_s += now - looked
            looked = now

    def take(self) -> float:
        """Seconds since the last call; where that was too short to look, the share of the looks before it counts. NaN before
        the first look."""
        now = time.perf_counter()
        with self._lock:
            if self._seen_s:
                self._share, self._idle_s, self._seen_s = self._idle_s / self._seen_s, 0.0, 0.0
            idle_s, self._taken = self._share * (now - self._taken), now
        return idle_s


@dataclass(frozen=True)
class Used:
    """Of one update, sums over the ranks; NaN where one of them cannot tell."""

    tokens: float
    pairs: float
    peak_flops: float  # a second
    exposed_s: float
    idle_s: float

    def metrics(self, model: ModelConfig, seconds: float, ranks: int) -> dict[str, float]:
        flops = training_flops(model, int(self.tokens), int(self.pairs))
        told = {
            "train/model_tflops": flops / 1e12,
            "perf/mfu": flops / (seconds * self.peak_flops),
            "time/gpu_idle_s": self.idle_s / ranks,
        }
        if ranks > 1:
            told["time/communication_exposed_s"] = self.exposed_s / ranks
        return {name: value for name, value in told.items() if math.isfinite(value)}


class Usage:
    """One rank's end of it."""

    def __init__(self, model: ModelConfig, dtype: str, world: World) -> None:
        self.model, self.world = model, world
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self._peak = published_peak(name, dtype)
        self._idle = IdleWatch.of(world.device)

    def begin(self) -> None:
        """Before an update."""
        self.world.exposed.forget()

    def end(self, batch: TrainBatch, seconds: float) -> dict[str, float]:
        """Metrics of the update of these rows, which took so long; the same on every rank except for `seconds`. Collective."""
        exposed_s = self.world.exposed.take()
        peak = math.nan if self._peak is None else self._peak
        idle_s = math.nan if self._idle is None else self._idle.take()
        own = torch.tensor([*work_of(batch.documents_BS), peak, exposed_s, idle_s], dtype=torch.float64)
        if self.world.size > 1:  # else nobody has to wait for the device
            own = self.world.sum(own.to(self.world.device))
        return Used(*own.tolist()).metrics(self.model, seconds, self.world.size)
