"""The pool that drives several engines at once, each an actor of Ray (rl/engine/actor.py).

An engine that dies or does not answer is replaced while everything else goes on. What it was generating others generate anew,
from where it was when that engine got it: tokens depend on the weights and on the noise of their sample's uid alone, so they
are the same ones, and no sample is lost or done twice. The new engine gets the weights of the others from Ray's object store,
which keeps the last whole ones and the changes since, so the ranks need not be asked while they learn. Where weights come from
the ranks directly, all engines get them again, or, while the ranks learn, the new one waits for the next ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rl.april import OverlappingPool
from rl.engine.actor import EngineActor
from rl.engine.engine import EngineSettings, Receipt
from rl.engine.pool import advancing, deal
from rl.links import Links
from rl.trajectory import Sample
from trainer.cluster import Processes, ProcessLost, gather, reason_of, told_by
from trainer.config.model import ModelConfig
from trainer.config.rl import SyncConfig
from trainer.config.run import ClusterConfig
from trainer.hangs import tail, whereabouts
from trainer.places import WAIT_S, Placement, Say
from trainer.run_dir import RunDir

LOOK_S = 0.5  # in which an idle rank answers; those that learn do not, and are there


class SyncedPool(OverlappingPool, Protocol):
    """What generates with the weights of the ranks."""

    busy_s: float  # in which it was generating, ever

    @property
    def engines(self) -> int:
        """How many of ours there are."""

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """What our engines that are there answer."""

    def load_weights(self, ranks: Processes, version: int, config: SyncConfig) -> dict[str, float]:
        """Brings the ranks' weights to all engines; metrics, with the version that the engines have now."""

    def counts(self) -> dict[str, float]:
        """Metrics of what was lost since they were last asked for."""


@dataclass(frozen=True)
class Patience:
    """How long an engine may take to answer a call, and to start; and how often it may be lost without finishing a sample."""

    answer_s: float
    start_s: float
    losses: int


@dataclass(eq=False)
class _Place:
    """An engine, one after another under the same name."""

    name: str
    actor: Any
    starting: ray.ObjectRef | None  # what the actor answers once it has the weights; None while it takes part
    since: float  # when it was started
    held: dict[int, Sample] = field(default_factory=dict)  # uid -> the sample as the actor got it
    losses: int = 0  # without a finished sample in between


class RayPool:
    """Engines that generate side by side, each its share of the samples; an `EnginePool`.

    `start(name)` starts an actor in place of the last one of that name; `logs`: name -> log file; `links`: the direct way of
    the weights, or None for the object store.
    """

    def __init__(
        self, start: Callable[[str], Any], logs: Mapping[str, Path], patience: Patience, say: Say, links: Links | None = None
    ) -> None:
        self._start, self._logs, self._patience, self._say, self._links = start, logs, patience, say, links
        self._brought: tuple[int, SyncConfig] | None = None  # version; what the direct way brings again, to a new engine
        self._learning = False  # the ranks change their weights
        self._updates: list[ray.ObjectRef] = []  # the last whole weights, and the changes since
        self._waiting: list[Sample] = []  # submitted, and with no engine
        self._ranks = Processes({})  # whose weights these are
        self._lost = self._returned = 0
        self.busy_s = 0.0
        self._places = [_Place(name, *self._launch(name)) for name in logs]

    @classmethod
    def start(
        cls,
        placement: Placement,
        model: ModelConfig,
        settings: EngineSettings,
        dtype: str,
        run: RunDir,
        cluster: ClusterConfig,
        sync: SyncConfig,
        say: Say,
        metrics_port: int = 0,
    ) -> RayPool:
        """Engine i answers Prometheus at `metrics_port` + i of `cluster.host`; 0: none does."""
        logs = {f"engine/{index}": run.log_file(f"engine/{index}") for index in range(placement.engines)}
        index_of = {name: index for index, name in enumerate(logs)}

        def launch(name: str) -> Any:
            metrics = (cluster.host, metrics_port + index_of[name]) if metrics_port else None
            arguments = (model, settings, dtype, logs[name], cluster.engine_timeout_s, metrics)
            return placement.actor(EngineActor, name, index_of[name], *arguments)

        direct = sync.is_direct(placement.on_gpu)
        ways = "shown on the same GPU or over NVLink, broadcast to others" if placement.on_gpu else "broadcast"
        say(f"weights go to the engines {f'directly: {ways}' if direct else 'through the object store'}")
        patience = Patience(cluster.engine_timeout_s, cluster.start_timeout_s, cluster.max_restarts)
        return cls(launch, logs, patience, say, Links(cluster.collective_timeout_s) if direct else None)

    # ------------------------------------------------------------ what a round calls

    def submit(self, samples: Sequence[Sample]) -> None:
        self._welcome(0.0)
        self._waiting += samples
        self._deal_out()

    def advance(self, tokens: int) -> list[Sample]:
        """As that of every `EnginePool`; where there is no engine it waits for one for a moment, and nothing is done."""
        self._welcome(0.0 if self._present else WAIT_S)
        self._deal_out()
        started, done = time.perf_counter(), list[Sample]()
        for place, samples in self._ask(lambda actor: actor.advance.remote(tokens)).items():
            for sample in samples:
                del place.held[sample.uid]
            place.losses = 0 if samples else place.losses
            done += samples
        self.busy_s += time.perf_counter() - started
        return done

    @contextmanager
    def going_on(self, tokens: int, samples: int) -> Iterator[list[Sample]]:
        self._learning = True
        try:
            with advancing(self, tokens, samples) as done:
                yield done
        finally:
            self._learning = False

    def drain(self) -> list[Sample]:
        unfinished = list[Sample]()
        for place, samples in self._ask(lambda actor: actor.drain.remote()).items():
            place.held.clear()
            unfinished += samples
        unfinished += self._waiting
        self._waiting = []
        return unfinished

    def load_weights(self, ranks: Processes, version: int, config: SyncConfig) -> dict[str, float]:
        """Brings the ranks' weights to all engines, by the object store or directly.

        An engine that starts meanwhile takes them when it does; but at first, and where no other is left, it is waited for.
        """
        self._ranks = ranks
        receipts = self._through_store(version, config) if self._links is None else self._directly(self._links, version, config)
        return sync_metrics(receipts) | {"sync/version": version}

    def _directly(self, links: Links, version: int, config: SyncConfig) -> list[Receipt]:
        """An engine that is there takes part; one that starts later gets the same weights then (`_welcome`)."""
        everybody, self._brought = self._brought is None, None
        self._welcome(0.0)
        while not self._present or (everybody and self._absent):
            self._welcome(WAIT_S)
        self._brought = version, config
        receipts = self._bring(links, version, config)
        while not receipts:
            receipts = self._welcome(WAIT_S)
        return receipts

    def _bring(self, links: Links, version: int, config: SyncConfig) -> list[Receipt]:
        """Of the engines that are not lost by it. Raises ProcessLost when one is while ranks broadcast, which are then in the
        middle of it; no rank waits for who reads what is shown."""
        ranks, present = self._ranks, self._present
        links.connect(ranks, self.actors)
        offers = links.offers(ranks, version, config.check)
        sent = {name: actor.send.remote() for name, actor in ranks.actors.items()}
        receipts = self._ask(lambda actor: actor.take.remote(offers))
        if len(receipts) < len(present) and links.broadcasts:
            raise ProcessLost("an engine was lost while it took weights from the ranks")
        gather(sent, ranks.logs)
        return list(receipts.values())

    def _through_store(self, version: int, config: SyncConfig) -> list[Receipt]:
        """Rank 0 puts them into Ray's object store, each engine reads them there."""
        ranks = self._ranks
        everybody = not self._updates
        if config.anchor_every == 1:
            self._updates.clear()  # makes room before the new ones are there
        refs = {name: actor.weights.remote(version, config) for name, actor in ranks.actors.items()}
        first, update = next(iter(refs.items()))
        # The weights of rank 0 should not come here: of it, something small is awaited that it does after them.
        gather(refs | {first: ranks.actors[first].pid.remote()}, ranks.logs)
        self._updates.append(update)
        for place in self._absent:
            place.starting = place.actor.receive.remote(update)
            place.since = time.monotonic() if everybody else place.since  # the ranks may have taken long for the first weights
        receipts = list(self._ask(lambda actor: actor.receive.remote(update)).values())
        while not receipts or (everybody and self._absent):
            receipts += self._welcome(WAIT_S)
        if receipts[0].changed_share is None:
            self._updates = [update]
        return receipts

    @property
    def actors(self) -> dict[str, Any]:
        """Those that take part, by name."""
        return {place.name: place.actor for place in self._present}

    @property
    def engines(self) -> int:
        return len(self._places)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        return list(self._ask(lambda actor: getattr(actor, method).remote(*arguments)).values())

    def counts(self) -> dict[str, float]:
        counts = {"rollout/engines_lost": float(self._lost), "rollout/engines_returned": float(self._returned)}
        self._lost = self._returned = 0
        return counts

    # ------------------------------------------------------------ who is there

    @property
    def _present(self) -> list[_Place]:
        return [place for place in self._places if place.starting is None]

    @property
    def _absent(self) -> list[_Place]:
        return [place for place in self._places if place.starting is not None]

    def _launch(self, name: str) -> tuple[Any, ray.ObjectRef, float]:
        actor = self._start(name)
        return actor, actor.receive.remote(*self._updates), time.monotonic()  # answers as soon as it has started

    def _welcome(self, timeout_s: float) -> list[Receipt]:
        """Lets in the engines that have the weights, after `timeout_s` at the latest; what they say of the last update."""
        starting = {place: place.starting for place in self._absent}
        if not starting:
            return []
        if self._links is not None and self._learning:  # the next weights are the first that it can have
            time.sleep(timeout_s)
            return []
        refs = list(starting.values())
        ready = ray.wait(refs, num_returns=len(refs), timeout=0)[0] or ray.wait(refs, timeout=timeout_s)[0]
        answers = self._taken({place: ref for place, ref in starting.items() if ref in ready})
        for place in answers:
            place.starting = None
            if place.losses:
                self._returned += 1
                self._say(f"{place.name} is back")
        for place, ref in starting.items():
            if place.starting is ref and time.monotonic() - place.since > self._patience.start_s:
                self._replace(place, f"{place.name} has not started in {self._patience.start_s:g} s (cluster.start_timeout_s)")
        if not ready and not self._present:
            self._require_ranks()
            waited = time.monotonic() - min(place.since for place in self._absent)
            self._say(f"waiting for {' or '.join(place.name for place in self._absent)} to start ({waited:.0f} s)")
        if answers and self._links is not None and self._brought is not None:
            return self._bring(self._links, *self._brought)
        return [receipt for receipt in answers.values() if receipt is not None]

    def _deal_out(self) -> None:
        """Gives samples that have no engine to those that are there; once more, where one of these is lost by it."""
        while self._waiting and (present := self._present):
            shares, self._waiting = deal(self._waiting, len(present)), []
            calls = {}
            for place, share in zip(present, shares, strict=True):
                place.held |= {sample.uid: sample for sample in share}
                calls[place] = place.actor.submit.remote(share)
            self._wait_for(calls)

    def _ask(self, call: Callable[[Any], ray.ObjectRef]) -> dict[_Place, Any]:
        return self._wait_for({place: call(place.actor) for place in self._present})

    def _wait_for(self, calls: Mapping[_Place, ray.ObjectRef]) -> dict[_Place, Any]:
        """The answers, without those of engines that die or are late, which are replaced."""
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=self._patience.answer_s)
        return self._taken(calls)

    def _taken(self, calls: Mapping[_Place, ray.ObjectRef]) -> dict[_Place, Any]:
        answers = {}
        for place, ref in calls.items():
            try:
                answers[place] = ray.get(ref, timeout=0)
            except GetTimeoutError:
                where = whereabouts(tail(self._logs[place.name])).place
                self._replace(place, f"{place.name} hangs: no answer in {self._patience.answer_s:g} s ({where})")
            except RayActorError as error:
                self._replace(place, f"{place.name} died ({reason_of(error)})")
            except RayTaskError as error:
                raise told_by(error) from error
        return answers

    def _replace(self, place: _Place, why: str) -> None:
        """Ends what is left of an engine and starts another; its samples wait for those that are there.

        Raises:
            ProcessLost: it was lost too often without finishing a sample, or a rank is lost with it.
        """
        self._lost += 1
        place.losses += 1
        if place.losses > self._patience.losses:
            raise ProcessLost(f"{why}; it was lost {place.losses} times without finishing a sample")
        self._require_ranks()
        self._say(f"{why}; it starts again, and its {len(place.held)} samples go to those that are there")
        self._waiting += place.held.values()
        place.held = {}
        place.actor, place.starting, place.since = self._launch(place.name)

    def _require_ranks(self) -> None:
        """Raises ProcessLost if a rank is dead too, as when a node is lost: then all begin anew."""
        calls = {name: actor.pid.remote() for name, actor in self._ranks.actors.items()}
        ready = ray.wait(list(calls.values()), num_returns=len(calls), timeout=LOOK_S)[0] if calls else []
        gather({name: ref for name, ref in calls.items() if ref in ready})


def sync_metrics(receipts: Sequence[Receipt]) -> dict[str, float]:
    """Of the largest update and the slowest check, if there was one; no changed share where all weights were sent."""
    metrics = {"sync/mib": max(receipt.nbytes for receipt in receipts) / 2**20}
    shares = [receipt.changed_share for receipt in receipts if receipt.changed_share is not None]
    if len(shares) == len(receipts):
        metrics["sync/changed_share"] = shares[0]
    checks = [receipt.check_s for receipt in receipts if receipt.check_s is not None]
    if checks:
        metrics["sync/check_s"] = max(checks)
    return metrics
