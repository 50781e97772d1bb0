"""The Ray actors of RL, thin: an engine that logs to a file, and the pool that drives several of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rl.engine.engine import Engine, EngineSettings
from rl.trajectory import Sample
from trainer.cluster import Placement, Processes, gather
from trainer.config import ModelConfig
from trainer.run_dir import RunDir
from trainer.weights import PackedTensors, unpack
from trainer.worker import log_to


class EngineActor(Engine):
    """An engine in a process of its own, on a share of a GPU where there are GPUs."""

    def __init__(self, config: ModelConfig, settings: EngineSettings, dtype: str, log_file: Path) -> None:
        log_to(log_file)
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        super().__init__(config, settings, device, getattr(torch, dtype))

    def receive(self, weights: PackedTensors, version: int) -> None:
        self.load_weights(unpack(weights), version)


class RayPool:
    """Engines that generate side by side, each its share of the samples; an `EnginePool`."""

    def __init__(self, engines: Processes) -> None:
        self.engines = engines

    @classmethod
    def start(cls, placement: Placement, model: ModelConfig, settings: EngineSettings, dtype: str, run: RunDir) -> RayPool:
        names = [f"engine/{index}" for index in range(placement.engines)]
        arguments = (model, settings, dtype)
        return cls(Processes({n: placement.actor(EngineActor, n, i, *arguments, run.log_file(n)) for i, n in enumerate(names)}))

    def load_weights(self, ranks: Processes, version: int) -> None:
        """Brings the ranks' weights to all engines: rank 0 puts them into Ray's object store, each engine reads them there."""
        refs = {name: actor.weights.remote() for name, actor in ranks.actors.items()}
        weights = next(iter(refs.values()))
        loads = {name: actor.receive.remote(weights, version) for name, actor in self.engines.actors.items()}
        gather({**{name: ref for name, ref in refs.items() if ref is not weights}, **loads}, ranks.logs)

    def submit(self, samples: Sequence[Sample]) -> None:
        self.engines.call_each("submit", [samples[i :: len(self.engines)] for i in range(len(self.engines))])

    def advance(self, tokens: int) -> list[Sample]:
        return [sample for done in self.engines.call("advance", tokens) for sample in done]

    def drain(self) -> list[Sample]:
        return [sample for unfinished in self.engines.call("drain") for sample in unfinished]
