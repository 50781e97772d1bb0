"""The Ray actors of RL, thin: an engine that logs to a file, and the pool that drives several of them at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import ray
import torch

from rl.april import OverlappingPool
from rl.engine.engine import Engine, EngineSettings, Receipt
from rl.engine.metrics import serve_state
from rl.engine.pool import advancing
from rl.trajectory import Sample
from trainer.cluster import Placement, Processes, gather
from trainer.config import ModelConfig, SyncConfig
from trainer.run_dir import RunDir
from trainer.worker import log_to


class EngineActor(Engine):
    """An engine in a process of its own, on a share of a GPU where there are GPUs."""

    def __init__(
        self, config: ModelConfig, settings: EngineSettings, dtype: str, log_file: Path, metrics: tuple[str, int] | None = None
    ) -> None:
        """`metrics`: host and port where it answers Prometheus."""
        log_to(log_file)
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        super().__init__(config, settings, device, getattr(torch, dtype))
        if metrics is not None:
            serve_state(log_file.stem, self.state, *metrics)


class SyncedPool(OverlappingPool, Protocol):
    """What generates with the weights of the ranks."""

    busy_s: float  # in which it was generating, ever

    def load_weights(self, ranks: Processes, version: int, config: SyncConfig) -> dict[str, float]:
        """Brings the ranks' weights to all engines; metrics, with the version that the engines have now."""


class RayPool:
    """Engines that generate side by side, each its share of the samples; an `EnginePool`."""

    def __init__(self, engines: Processes) -> None:
        self.engines = engines
        self.busy_s = 0.0

    @classmethod
    def start(
        cls,
        placement: Placement,
        model: ModelConfig,
        settings: EngineSettings,
        dtype: str,
        run: RunDir,
        metrics_port: int = 0,
    ) -> RayPool:
        """Engine i answers Prometheus at `metrics_port` + i of `cluster.host`; 0: none does."""
        actors = {}
        for index in range(placement.engines):
            name, metrics = f"engine/{index}", (placement.config.host, metrics_port + index) if metrics_port else None
            arguments = (model, settings, dtype, run.log_file(name), metrics)
            actors[name] = placement.actor(EngineActor, name, index, *arguments)
        return cls(Processes(actors))

    def load_weights(self, ranks: Processes, version: int, config: SyncConfig) -> dict[str, float]:
        """Brings the ranks' weights to all engines: rank 0 puts them into Ray's object store, each engine reads them there.

        An engine that holds another version than the changes build on gets all weights.
        """
        refs = {name: actor.weights.remote(version, config) for name, actor in ranks.actors.items()}
        first, update = next(iter(refs.items()))
        receipts = gather({**{name: ref for name, ref in refs.items() if name != first}, **self._send(update)}, ranks.logs)
        behind = [name for name in self.engines.actors if receipts[name] is None]
        if behind:
            receipts |= gather(self._send(ranks.actors[first].anchor.remote(), behind), ranks.logs)
        return sync_metrics([receipts[name] for name in self.engines.actors]) | {"sync/version": version}

    def _send(self, update: ray.ObjectRef, names: Iterable[str] | None = None) -> dict[str, ray.ObjectRef]:
        return {name: self.engines.actors[name].receive.remote(update) for name in names or self.engines.actors}

    def submit(self, samples: Sequence[Sample]) -> None:
        self.engines.call_each("submit", [samples[i :: len(self.engines)] for i in range(len(self.engines))])

    def advance(self, tokens: int) -> list[Sample]:
        started = time.perf_counter()
        done = self.engines.call("advance", tokens)
        self.busy_s += time.perf_counter() - started
        return [sample for samples in done for sample in samples]

    def going_on(self, tokens: int, samples: int) -> AbstractContextManager[list[Sample]]:
        return advancing(self, tokens, samples)

    def drain(self) -> list[Sample]:
        return [sample for unfinished in self.engines.call("drain") for sample in unfinished]


def sync_metrics(receipts: Sequence[Receipt]) -> dict[str, float]:
    """Of the largest update and the slowest check, if there was one; no changed share where an engine needed all weights."""
    metrics = {"sync/mib": max(receipt.nbytes for receipt in receipts) / 2**20}
    shares = [receipt.changed_share for receipt in receipts if receipt.changed_share is not None]
    if len(shares) == len(receipts):
        metrics["sync/changed_share"] = shares[0]
    checks = [receipt.check_s for receipt in receipts if receipt.check_s is not None]
    if checks:
        metrics["sync/check_s"] = max(checks)
    return metrics
