"""Pretraining: the loop, and the attempt that surrounds it. It runs in the driver; the ranks do what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from trainer import checkpoint
from trainer.checkpoint import CheckpointMeta
from trainer.cluster import Processes
from trainer.config.model import ModelConfig
from trainer.config.run import ClusterConfig, PretrainConfig
from trainer.data import Corpus
from trainer.guard import Guard
from trainer.memory_checkpoints import InMemory, MemoryCheckpoints
from trainer.optimizer import adamw_settings, learning_rate
from trainer.places import Placement
from trainer.run_dir import RunDir
from trainer.starting_point import load_weights
from trainer.state import TrainerSpec
from trainer.stopping import StopRequest
from trainer.tracing import Traces
from trainer.tracking import Tracker
from trainer.worker import TrainWorker


@dataclass(frozen=True)
class Pretraining:
    """What an attempt needs; the same for all attempts of a run."""

    config: PretrainConfig
    model: ModelConfig  # config.model with the vocabulary size of the tokenizer
    start_from: Path | None  # whose weights it begins with (starting_point.py); None: random ones
    corpus: Corpus
    ranks: tuple[int, ...]  # how many there may be, the number that is wanted first
    dtype: str
    run: RunDir
    tracker: Tracker
    stop: StopRequest
    memory: MemoryCheckpoints

    def attempt(self) -> None:
        """Trains from the newest checkpoint of the run, or from the start, to the end.

        Raises:
            ProcessLost: a rank died; another attempt continues from the newest checkpoint.
            Stopped: a signal asked for it; the last step is in a checkpoint.
            Moved: a node of the ranks is to go; the last step is in a checkpoint, and another attempt continues from there.
        """
        with Placement(self.config.cluster, self.ranks, self.tracker.say) as placement:
            placement.fill(partial(self._train_in, placement))

    def _train_in(self, placement: Placement) -> None:
        ranks = start_ranks(placement, self.spec, self.config.cluster, self.run, self.tracker, self.memory)
        ranks.call("open_corpus", self.corpus.folder, self.config.train.sequence_length, self.config.seed)
        start = self._restore(ranks)
        with self.stop.deferred(placement.look):
            self.loop(ranks, start)

    @property
    def spec(self) -> TrainerSpec:
        return TrainerSpec(
            model=self.model,
            adamw=adamw_settings(self.config.optimizer),
            balance=self.config.balance,
            parallel=self.config.parallel,
            dtype=self.dtype,
            recompute=self.config.train.recompute,
            micro_rows=self.config.train.micro_rows,
            batch_invariant=False,
            temperature=1.0,
            freeze_router=False,
            value_decay=None,
            seed=self.config.seed,
            guard=Guard(
                self.config.train.skip_nonfinite,
                self.config.train.spike_zscore,
                self.config.train.spike_window,
                self.config.train.on_spike,
            ),
        )

    def loop(self, ranks: Processes, start: int) -> None:
        """Steps start+1..steps; a step's rows are a pure function of its number."""
        train = self.config.train
        traces = Traces(self.config.trace, self.run, len(ranks), self.tracker.say)
        self.tracker.devices = len(ranks)
        if start == 0:
            self.tracker.log(0, ranks.call("evaluate", train.eval_rows)[0])
        for step in range(start, train.steps):
            done, last = step + 1, step + 1 == train.steps
            lr = learning_rate(step, train.steps, self.config.optimizer)
            traces.before(ranks.call, done)
            metrics = ranks.call("learn_rows", step * train.batch_rows, train.batch_rows, lr)[0]
            traces.behind(ranks.call, done, last)
            if done % train.eval_every == 0 or last:
                metrics |= ranks.call("evaluate", train.eval_rows)[0]
            stopping = not last and self.stop.asked()
            if done % train.checkpoint_every == 0 or last:
                metrics |= self._save(ranks, done, wait=last or stopping)
            elif stopping:
                metrics |= self._save_to_stop(ranks, done)
            elif self.memory.due(done):
                metrics |= self.memory.save(ranks, self._meta(done), json.dumps({}))
            self.tracker.log(done, metrics)
            if stopping:
                self.stop.obey(f"after step {done}")

    def _save(self, ranks: Processes, step: int, wait: bool) -> dict[str, float]:
        keep = self.config.train.keep_checkpoints
        return save(ranks, self.run, self.tracker, self._meta(step), self.corpus.tokenizer_file, {}, keep, wait)

    def _save_to_stop(self, ranks: Processes, step: int) -> dict[str, float]:
        """On the disk, or in memory where the run goes on from there at once, unless a signal comes meanwhile."""
        going = self.stop.leaving
        kept = None if going is None else self.memory.keep(ranks, self._meta(step), json.dumps({}), going)
        return kept if kept is not None and self.stop.leaving is not None else self._save(ranks, step, wait=True)

    def _meta(self, step: int) -> CheckpointMeta:
        position = {"rows": step * self.config.train.batch_rows, "corpus": self.corpus.fingerprint}
        return checkpoint_meta("pretrain", step, self.model, self.run, position)

    def _restore(self, ranks: Processes) -> int:
        loaded = load_newest(ranks, self.run, self.tracker, self.memory)
        if loaded is None:
            self.run.rewind(-1)
            if self.start_from is not None:
                self.tracker.say(f"loading {self.start_from}")
                load_weights(ranks, self.start_from)
            return 0
        found, meta = loaded
        self.corpus.require_same(str(meta.position.get("corpus")), found)
        self.run.rewind(meta.step)
        self.tracker.say(f"continuing after step {meta.step} from {found}")
        return meta.step


# ---------------------------------------------------------------- shared with RL


def start_ranks(
    placement: Placement,
    spec: TrainerSpec,
    cluster: ClusterConfig,
    run: RunDir,
    tracker: Tracker,
    memory: MemoryCheckpoints,
) -> Processes:
    """Trainer ranks that have met and built their part of the model."""
    hosts = dict.fromkeys(placement.hosts)
    where = f" on {', '.join(hosts)}, in this order" if len(hosts) > 1 else ""
    tracker.say(f"starting {placement.processes}{where}")
    tracker.pause()
    ranks = meet(placement, spec, cluster, run.log_file, run.path / "refused")
    memory.open(ranks, placement.node_ids)
    return ranks


def meet(
    placement: Placement, spec: TrainerSpec, cluster: ClusterConfig, log_file: Callable[[str], Path], refused: Path | None
) -> Processes:
    """The ranks of `start_ranks`; `log_file`: name of a rank -> where it logs."""
    names = [f"trainer/{rank}" for rank in range(placement.ranks)]
    logs = {name: log_file(name) for name in names}
    ranks = Processes({n: placement.actor(TrainWorker, n, rank, rank, logs[n]) for rank, n in enumerate(names)}, logs)
    host, port = ranks.call_first("serve", placement.hosts[0], cluster.start_timeout_s)
    ranks.call("join", host, port, placement.ranks, cluster.collective_timeout_s)
    ranks.call("build", spec, refused)
    return ranks


def checkpoint_meta(kind: str, step: int, model: ModelConfig, run: RunDir, position: dict[str, Any]) -> CheckpointMeta:
    return CheckpointMeta(kind=kind, step=step, updates=0, model=model.model_dump(mode="json"), git=run.git, position=position)


def save(
    ranks: Processes,
    run: RunDir,
    tracker: Tracker,
    meta: CheckpointMeta,
    tokenizer: Path,
    state: dict[str, Any],
    keep: int,
    wait: bool,
) -> dict[str, float]:
    """Begins a checkpoint of the ranks, with the run's configuration, the tokenizer and what the driver holds (state.json).

    One that cannot be written is said, and the run goes on; with `wait` this one must be whole before it does.

    Raises:
        UserError: `wait`, and it cannot be written.
    """
    files = {
        "config.yaml": run.config_text,
        "tokenizer.json": tokenizer.read_text(encoding="utf-8"),
        "state.json": json.dumps(state),
    }
    folder = run.checkpoints / checkpoint.folder_name(meta.step)
    answers = ranks.call("save", folder, meta, files, keep)
    _, failure = answers[0]
    if failure is not None:
        tracker.say(f"{failure}. The run goes on without it")
    if wait and (failure := ranks.call("settle")[0]) is not None:
        raise UserError(f"{failure}, then go on with resume=auto")
    return {"time/checkpoint_s": max(seconds for seconds, _ in answers)}


@dataclass(frozen=True)
class OnDisk:
    """A checkpoint that may be loaded."""

    folder: Path

    @property
    def step(self) -> int:
        return checkpoint.step_of(self.folder)

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
            raise checkpoint.Damaged(f"{self.folder / name} cannot be read: {error}") from None


def load_newest(
    ranks: Processes, run: RunDir, tracker: Tracker, memory: MemoryCheckpoints
) -> tuple[OnDisk | InMemory, CheckpointMeta] | None:
    """Loads the run's newest checkpoint that is not damaged, from the disk or from memory; None if the run has none yet.

    Raises:
        UserError: all are damaged.
    """
    found: list[OnDisk | InMemory] = [OnDisk(folder) for folder in reversed(checkpoint.available(run.checkpoints))]
    for one in sorted([*found, *memory.found()], key=lambda one: one.step, reverse=True):
        try:
            meta = one.load(ranks)
        except checkpoint.Damaged as error:
            tracker.say(f"{error}: trying the one before it")
            continue
        memory.settle(meta.step)
        return one, meta
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {run.checkpoints} is whole; resume=never starts a new run")
    memory.settle(None)
    return None
