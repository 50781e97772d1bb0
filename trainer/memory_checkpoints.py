"""Checkpoints in the memory of the nodes, on the driver's side; kept_checkpoints.py says how they are stored."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer.checkpoint import CheckpointMeta
from trainer.checkpoint_files import Checksum
from trainer.cluster import Processes, ProcessLost, gather
from trainer.keeper import Keeper, Kept
from trainer.kept_checkpoints import KeeperLost, MemoryShelf, Whole, following, outlives, whole_ones
from trainer.places import ANSWER_S, Say, python_path
from trainer.worker import SavedInMemory

THREADS = 4  # of a keeper: ranks of another node send it their files at the same time


@dataclass(frozen=True)
class InMemory:
    """One that can be loaded."""

    whole: Whole
    keepers: dict[str, Any]

    @property
    def step(self) -> int:
        return self.whole.step

    def __str__(self) -> str:
        having = {name for names in self.whole.keepers.values() for name in names}
        return f"the memory of {len(having)} node{'s' * (len(having) != 1)}"

    def load(self, ranks: Processes) -> CheckpointMeta:
        """Raises Damaged where it is lost before the ranks have begun, ProcessLost where it is lost then."""
        try:
            meta: CheckpointMeta = ranks.call("load_from_memory", self.whole, self.keepers)[0]
        except KeeperLost as error:
            raise ProcessLost(f"a keeper died ({error})") from error
        return meta

    def text(self, name: str) -> str:
        """One of its text files. Raises ProcessLost if it is lost."""
        keeper = self.whole.keepers[name][0]
        text: str = gather({f"memory/{keeper}": self.keepers[keeper].text.remote(self.step, name)})[f"memory/{keeper}"]
        return text

    def copy(self, folder: Path) -> dict[str, Checksum]:
        """All files but the record to a folder that every node sees, each by one who has it; what has arrived there.

        Raises ProcessLost if one is lost, OSError where there is no space.
        """
        calls = {
            name: self.keepers[k].copy.remote(self.step, name, folder / name) for name, (k, *_) in self.whole.keepers.items()
        }
        return gather(calls)


class MemoryCheckpoints:
    """Those of a run, through all its attempts: one every `every` steps; 0: none, and nothing is started."""

    def __init__(self, every: int, say: Say) -> None:
        self.every, self._say = every, say
        self.newest = -1  # the step of the last one that was begun
        self.to_disk = -1  # that of the last one that went to the disk instead
        self.on_disk = -1  # that of the newest one there which is known to be whole
        self._keepers: dict[str, Any] = {}  # of nodes, by the names that Ray gives them
        self._nodes: list[str] = []  # of the ranks

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def open(self, ranks: Processes, nodes: Sequence[str]) -> None:
        """Ranks are on these nodes from here on; those that are new get a keeper. Old ones keep what they have.

        Raises:
            UserError: a node has no memory for files. ProcessLost: a keeper died at once.
        """
        if not self.every:
            return
        self._drop_lost()
        self._nodes = list(nodes)
        ring = list(dict.fromkeys(nodes))
        self._keepers |= {node: _start(node) for node in ring if node not in self._keepers}
        folders: dict[str, Path] = gather({node: self._keepers[node].folder.remote() for node in ring})
        next_of = following(nodes)
        shelves = [
            MemoryShelf(
                keeper=node,
                folder=folders[node],
                leads=nodes.index(node) == rank,
                next=None if len(ring) == 1 else self._keepers[next_of[node]],
            )
            for rank, node in enumerate(nodes)
        ]
        ranks.call("open_memory", shelves)

    def save(self, ranks: Processes, meta: CheckpointMeta, state: str) -> dict[str, float]:
        """Begins one; `state` is that of the driver, for state.json. Metrics. One that failed is said, and the run goes on."""
        self.newest = meta.step
        answers: list[SavedInMemory] = ranks.call("save_in_memory", meta, {"state.json": state})
        if answers[0].failure is not None:
            self._say(f"{answers[0].failure}. The run goes on without it")
            if self._drop_lost():
                self.open(ranks, self._nodes)
        paused = [one.paused_s for one in answers if one.paused_s is not None]
        took = [one.took_s for one in answers if one.took_s is not None]
        metrics = {"time/memory_checkpoint_s": max(paused)} if paused else {}
        return metrics | ({"time/memory_checkpoint_whole_s": max(took)} if took else {})

    def keep(self, ranks: Processes, meta: CheckpointMeta, state: str, going: Set[str]) -> dict[str, float] | None:
        """`save`, and returns when it is whole without what is on the nodes that are `going`; None where it cannot be."""
        if not self.every or not outlives(self._nodes, going):
            return None
        self.newest, started = meta.step, time.perf_counter()
        failure: str | None = ranks.call("keep_in_memory", meta, {"state.json": state})[0]
        if failure is not None:
            self._say(f"{failure}. It goes to the disk")
            return None
        for node in self._keepers.keys() & going:  # nothing is to be read there any more
            ray.kill(self._keepers.pop(node))
        return {"time/memory_checkpoint_s": time.perf_counter() - started}

    def found(self) -> list[InMemory]:
        """What the keepers that live can give together, the newest first."""
        asked = {name: keeper.kept.remote() for name, keeper in self._keepers.items()}
        kept: dict[str, dict[int, Kept]] = {}
        for name, answer in asked.items():
            try:
                kept[name] = ray.get(answer)
            except RayActorError:
                self._say(f"the keeper of checkpoints on node {name} is gone")
        keepers = {name: self._keepers[name] for name in kept}
        return [InMemory(whole, keepers) for whole in whole_ones(kept)]

    def settle(self, step: int | None) -> None:
        """The run goes on after `step`, or from the start: keepers forget all others, and those without ranks end."""
        for name in self._keepers.keys() - set(self._nodes):
            ray.kill(self._keepers.pop(name))
        gather({f"memory/{name}": keeper.keep_only.remote(step) for name, keeper in self._keepers.items()})

    def _drop_lost(self) -> bool:
        """Forgets keepers that do not answer; whether there were any."""
        asked = {keeper.folder.remote(): name for name, keeper in self._keepers.items()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
        living = set()
        for answer in answered:
            try:
                ray.get(answer)
                living.add(asked[answer])
            except RayActorError:
                continue
        for name in (lost := self._keepers.keys() - living):
            ray.kill(self._keepers.pop(name))
        return bool(lost)


def _start(node: str) -> Any:
    return (
        ray.remote(Keeper)
        .options(
            num_cpus=0,
            max_concurrency=THREADS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env={"env_vars": {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}},
        )
        .remote()
    )
