"""The Ray actor of an engine, thin: a process of its own, with a share of a GPU if there are GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed import TCPStore
from torch.profiler import record_function

from parallel.topology import use_interface_to
from rl.engine.engine import Engine
from rl.engine.metrics import serve_state
from rl.engine.receipt import Receipt
from rl.engine.settings import EngineSettings
from rl.trajectory import Sample
from trainer.config.model import ModelConfig
from trainer.hangs import SHARE, StackWatch, watched
from trainer.memory import keep_imports
from trainer.tracing import Traceable
from trainer.weight_links import Offer, Receiver, gpu_of, open_group
from trainer.weight_sync import WeightUpdate
from trainer.worker import log_to


@watched
class EngineActor(Traceable):
    """An engine that logs to a file. A call that takes long writes its stacks."""

    def __init__(
        self,
        config: ModelConfig,
        settings: EngineSettings,
        dtype: str,
        log_file: Path,
        timeout_s: float,
        metrics: tuple[str, int] | None = None,
    ) -> None:
        """`metrics`: host and port where it answers Prometheus."""
        keep_imports()
        self.stack_watch = StackWatch(log_to(log_file), SHARE * timeout_s)
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._engine = self._new_engine(config, settings, getattr(torch, dtype))
        self._receiver: Receiver | None = None
        self._role = log_file.stem  # engine_0
        if metrics is not None:
            serve_state(log_file.stem, self._engine.state, *metrics)

    def _new_engine(self, config: ModelConfig, settings: EngineSettings, dtype: torch.dtype) -> Engine:
        """The engine that it drives; that of a benchmark counts its work."""
        return Engine(config, settings, self._device, dtype)

    def gpu(self) -> str | None:
        return gpu_of(self._device)

    def link(self, name: str, meeting: tuple[str, int], groups: Mapping[int, tuple[str, int, int]], timeout_s: float) -> None:
        """From here on the engine is `name` to the ranks; `groups`: rank -> (group where it broadcasts, place in it, size)."""
        if self._receiver is not None:
            self._receiver.close()
        use_interface_to(meeting[0])
        store = TCPStore(*meeting, is_master=False)
        opened = {rank: open_group(store, *group, self._device, timeout_s) for rank, group in groups.items()}
        self._receiver = Receiver(name, self._device, opened)

    def take(self, offers: Sequence[Offer]) -> Receipt:
        assert self._receiver is not None, "no ranks are linked"
        return self._engine.take(offers, self._receiver)

    def receive(self, *updates: WeightUpdate) -> Receipt | None:
        """Takes updates in their order; the receipt of the last one, None if there is no update."""
        receipts = [self._engine.receive(update) for update in updates]
        return receipts[-1] if receipts else None

    def submit(self, samples: Sequence[Sample]) -> None:
        self._engine.submit(samples)

    def advance(self, tokens: int) -> list[Sample]:
        if self.tracing is None:
            return self._engine.advance(tokens)
        with record_function(f"generate {tokens} tokens a row"):  # a name in traces
            done = self._engine.advance(tokens)
        self.tracing.decoded(tokens)
        return done

    def drain(self) -> list[Sample]:
        return self._engine.drain()

    def traced_as(self) -> tuple[str, torch.device]:
        return self._role, self._device
