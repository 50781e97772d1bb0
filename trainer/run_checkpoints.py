"""The checkpoints of a run, on the driver's side: when one is due, and from which one an attempt continues.

The same for pretraining and RL, on the disk (checkpoint.py) and in the memory of the nodes (memory_checkpoints.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from trainer import checkpoint
from trainer.checkpoint import CheckpointMeta, Damaged
from trainer.checkpoint_files import folder_name, step_of
from trainer.checkpoint_writer import bring
from trainer.cluster import Processes, ProcessLost
from trainer.config.model import ModelConfig
from trainer.memory_checkpoints import InMemory, MemoryCheckpoints
from trainer.metrics import Stage
from trainer.run_dir import RunDir
from trainer.stopping import StopRequest
from trainer.tokenizer import Tokenizer
from trainer.tracking import Tracker


@dataclass(frozen=True)
class Progress:
    """How far a run is, as its driver knows it."""

    step: int  # steps, or rounds, that are done
    position: dict[str, Any]  # where the data stands, for meta.json
    state: Callable[[], dict[str, Any]]  # for state.json; asked only for a checkpoint


@dataclass(frozen=True)
class OnDisk:
    """A checkpoint that may be loaded."""

    folder: Path

    @property
    def step(self) -> int:
        return step_of(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def load(self, ranks: Processes) -> CheckpointMeta:
        """Raises Damaged."""
        meta: CheckpointMeta = ranks.call("load", self.folder, True)[0]
        return meta

    def text(self, name: str) -> str:
        """One of its text files. Raises Damaged."""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise Damaged(f"{self.folder / name} cannot be read: {error}") from None


@dataclass(frozen=True)
class RunCheckpoints:
    """Those of a run, through all its attempts: on the disk one every `every` steps, of which the newest `keep` stay."""

    kind: Stage
    model: ModelConfig
    tokenizer: Tokenizer  # that each on the disk has a copy of
    every: int
    keep: int
    run: RunDir
    tracker: Tracker
    stop: StopRequest
    memory: MemoryCheckpoints

    def after(self, ranks: Processes, progress: Progress, last: bool, stopping: bool) -> dict[str, float]:
        """Begins the one that is due now, if one is; after the `last` step, and where the run is `stopping`, one is. Metrics.

        Whoever ends then says so in the metrics first, and calls `settle`: what the run is killed in stays told.
        """
        if progress.step % self.every == 0 or last:
            return self.save(ranks, progress)
        if stopping:
            return self._save_to_stop(ranks, progress)
        if self.memory.due(progress.step):
            return self.memory.save(ranks, self.meta(progress.step, progress.position), json.dumps(progress.state()))
        return {}

    def save(self, ranks: Processes, progress: Progress) -> dict[str, float]:
        """Begins one on the disk, with the run's configuration, the tokenizer and what the driver holds (state.json). Metrics.

        One before it that could not be written is said, and the run goes on.
        """
        files = self._files | {"state.json": json.dumps(progress.state())}
        folder = self.run.checkpoints / folder_name(progress.step)
        self.memory.to_disk = progress.step
        answers = ranks.call("save", folder, self.meta(progress.step, progress.position), files, self.keep)
        _, failure = answers[0]
        if failure is not None:
            self.tracker.say(f"{failure}. The run goes on without it")
        return {"time/checkpoint_s": max(seconds for seconds, _ in answers)}

    def settle(self, ranks: Processes) -> None:
        """Waits until the last one on the disk is whole. Raises UserError where it cannot be written."""
        if (failure := ranks.call("settle")[0]) is not None:
            raise UserError(f"{failure}, then go on with resume=auto")
        self.memory.on_disk = self.memory.to_disk

    @property
    def _files(self) -> dict[str, str]:
        return {"config.yaml": self.run.config_text, "tokenizer.json": self.tokenizer.layout}

    def bring_to_disk(self) -> None:
        """Of a run that stops without its ranks: the newest one in memory, if the disk has none so new. It goes with the run.

        One that cannot be brought is said, and so are damaged ones on the disk, which count for nothing.
        """
        if self.memory.newest <= self.memory.on_disk:  # as after a stop of the loop: what was just written is not read again
            return
        for one in self.memory.found():
            if self._disk_has(one.step):
                return
            folder = self.run.checkpoints / folder_name(one.step)
            self.tracker.say(f"bringing the checkpoint of step {one.step} from {one} to the disk")
            try:
                bring(one.whole.record, folder, one.copy, self._files, self.keep)
            except (OSError, Damaged, ProcessLost) as error:
                self.tracker.say(f"{folder} cannot be brought there: {error}")
                continue
            return

    def _disk_has(self, step: int) -> bool:
        """Whether a checkpoint there that is not older is whole."""
        for folder in reversed(checkpoint.available(self.run.checkpoints)):
            if step_of(folder) < step:
                return False
            try:
                checkpoint.verify(folder)
            except UserError as error:
                self.tracker.say(str(error))
                continue
            return True
        return False

    def _save_to_stop(self, ranks: Processes, progress: Progress) -> dict[str, float]:
        """On the disk, or in memory where the run goes on from there at once, unless a signal comes meanwhile."""
        going = self.stop.leaving
        meta = self.meta(progress.step, progress.position)
        kept = None if going is None else self.memory.keep(ranks, meta, json.dumps(progress.state()), going)
        return kept if kept is not None and self.stop.leaving is not None else self.save(ranks, progress)

    def meta(self, step: int, position: dict[str, Any]) -> CheckpointMeta:
        """The ranks fill in how many updates they have made."""
        model = self.model.model_dump(mode="json")
        return CheckpointMeta(kind=self.kind, step=step, updates=0, model=model, git=self.run.git, position=position)

    def load_newest(self, ranks: Processes) -> tuple[OnDisk | InMemory, CheckpointMeta] | None:
        """Loads the newest one that is not damaged, from the disk or from memory; None if the run has none yet.

        Raises:
            UserError: all are damaged.
        """
        found: list[OnDisk | InMemory] = [OnDisk(folder) for folder in reversed(checkpoint.available(self.run.checkpoints))]
        for one in sorted([*found, *self.memory.found()], key=lambda one: one.step, reverse=True):
            try:
                meta = one.load(ranks)
            except Damaged as error:
                self.tracker.say(f"{error}: trying the one before it")
                continue
            self.memory.settle(meta.step)
            self.memory.to_disk = self.memory.on_disk = one.step if isinstance(one, OnDisk) else -1
            return one, meta
        if found:
            raise UserError(
                f"none of the {len(found)} checkpoints in {self.run.checkpoints} is whole; resume=never starts a new run"
            )
        self.memory.settle(None)
        return None
