"""Pretraining: the loop, and the attempt around it. It runs in the driver, which calls the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.cluster import Processes
from trainer.config.model import ModelConfig
from trainer.config.run import ClusterConfig, PretrainConfig
from trainer.data import Corpus
from trainer.guard import Guard
from trainer.memory_checkpoints import MemoryCheckpoints
from trainer.optimizer import adamw_settings, learning_rate
from trainer.places import Placement
from trainer.run_checkpoints import Progress, RunCheckpoints
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
    ranks: tuple[int, ...]  # possible numbers of ranks, the wanted one first
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
            Moved: a node of the ranks will go; the last step is in a checkpoint, and another attempt continues from there.
        """
        with Placement(self.config.cluster, self.ranks, self.tracker.say) as placement:
            placement.fill(partial(self._train_in, placement))

    def _train_in(self, placement: Placement) -> None:
        ranks = start_ranks(placement, self.spec, self.config.cluster, self.run, self.tracker, self.memory)
        ranks.call("open_corpus", self.corpus.folder, self.config.train.sequence_length, self.config.seed)
        start = self._restore(ranks)
        with self.stop.deferred("the end of this step and its checkpoint", placement.look):
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
            traces.after(ranks.call, done, last)
            if done % train.eval_every == 0 or last:
                metrics |= ranks.call("evaluate", train.eval_rows)[0]
            stopping = not last and self.stop.asked()
            metrics |= self.checkpoints.after(ranks, self._progress(done), last, stopping)
            self.tracker.log(done, metrics)
            if last or stopping:
                self.checkpoints.settle(ranks)
            if stopping:
                self.stop.obey(f"after step {done}")

    def _progress(self, done: int) -> Progress:
        position = {"rows": done * self.config.train.batch_rows, "corpus": self.corpus.fingerprint}
        return Progress(done, position, state=dict)  # the driver has no other state

    @property
    def checkpoints(self) -> RunCheckpoints:
        every, keep = self.config.train.checkpoint_every, self.config.train.keep_checkpoints
        tokenizer = self.corpus.tokenizer
        return RunCheckpoints("pretrain", self.model, tokenizer, every, keep, self.run, self.tracker, self.stop, self.memory)

    def _restore(self, ranks: Processes) -> int:
        loaded = self.checkpoints.load_newest(ranks)
        if loaded is None:
            self.tracker.begin(-1)
            if self.start_from is not None:
                self.tracker.say(f"loading {self.start_from}")
                load_weights(ranks, self.start_from)
            return 0
        found, meta = loaded
        self.corpus.require_same(str(meta.position.get("corpus")), found)
        self.tracker.begin(meta.step)
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
