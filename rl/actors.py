"""The pool that drives several engines at once, each a Ray actor (rl/engine/actor.py).

An engine that dies or does not answer is replaced while everything else goes on. Others generate its samples again from where
they were when that engine got them. Tokens depend only on the weights and on the noise of their sample's uid, so they are the
same, and no sample is lost or done twice. The new engine gets its weights from Ray's object store, which keeps the last
complete weights and the changes since, so the ranks need not be asked while they learn. If weights come from the ranks
directly, all engines get them again or, while the ranks learn, the new one waits for the next ones.

If their number is elastic (`rollout.min_engines`), Ray is asked for a place for each engine beyond the first ones and for each
lost one, and nothing waits for it. An engine joins once it has a place and the weights of the others, and takes part when
samples are next distributed. Which engine has a sample, and how many there are, does not change its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rl.engine.actor import EngineActor
from rl.engine.pool import advancing, deal
from rl.engine.receipt import Receipt, sync_metrics
from rl.engine.settings import EngineSettings
from rl.links import Links
from rl.trajectory import Sample
from trainer.cluster import Processes, ProcessLost, gather, reason_of, told_by
from trainer.config.model import ModelConfig
from trainer.config.rl import SyncConfig
from trainer.config.run import ClusterConfig
from trainer.hangs import tail, whereabouts
from trainer.places import WAIT_S, Placement, Say
from trainer.run_dir import RunDir


@dataclass(frozen=True)
class Patience:
    """How long an engine may take to answer a call, and to start; and how often it may be lost without finishing a sample."""

    answer_s: float
    start_s: float
    losses: int


@dataclass(frozen=True)
class Elastic:
    """How engines beyond the `first` ones find places while a run goes on, and all of them when they lose theirs."""

    first: int
    ask: Callable[[str], ray.ObjectRef]  # what answers once there is a place for the engine of that name
    give_up: Callable[[str], None]  # frees the place of an engine that is not among the first


@dataclass(eq=False)
class _Place:
    """An engine, one after another under the same name. It takes part while it neither asks for a place nor starts."""

    number: int
    name: str
    first: bool  # without it the run does not begin
    actor: Any = None
    asked: ray.ObjectRef | None = None  # what answers once it has a place
    starting: ray.ObjectRef | None = None  # what the actor answers once it has the weights
    since: float = 0.0  # when it was started, or asked for a place
    held: dict[int, Sample] = field(default_factory=dict)  # uid -> the sample as the actor got it
    losses: int = 0  # without a finished sample in between


class RayPool:
    """Engines that generate side by side, each its share of the samples; an `EnginePool`.

    `start(name)` starts an actor in place of the last one of that name; `logs`: name -> log file; `links`: the direct way of
    the weights, or None for the object store; `elastic`: None where all engines have their places for as long as the run.
    """

    def __init__(
        self,
        start: Callable[[str], Any],
        logs: Mapping[str, Path],
        patience: Patience,
        say: Say,
        links: Links | None = None,
        elastic: Elastic | None = None,
    ) -> None:
        self._start, self._logs, self._patience, self._say, self._links = start, logs, patience, say, links
        self._brought: tuple[int, SyncConfig] | None = None  # version; what the direct way brings again, to a new engine
        self._learning = False  # the ranks change their weights
        self._updates: list[ray.ObjectRef] = []  # the last whole weights, and the changes since
        self._waiting: list[Sample] = []  # submitted, and with no engine
        self._ranks = Processes({})  # whose weights these are
        self._lost = self._returned = 0
        self.busy_s = 0.0
        self._elastic, first = elastic, len(logs) if elastic is None else elastic.first
        self._places = [_Place(number, name, number < first) for number, name in enumerate(logs)]
        for place in self._places:
            if elastic is None or place.first:
                self._launch(place)
            else:
                self._seek(elastic, place)

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
        elastic = Elastic(
            placement.first_engines,
            lambda name: placement.ask(name, index_of[name]),
            lambda name: placement.give_up(name, index_of[name]),
        )
        links = Links(cluster.collective_timeout_s) if direct else None
        return cls(launch, logs, patience, say, links, elastic if placement.elastic else None)

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
        with self.learning(), advancing(self, tokens, samples) as done:
            yield done

    @contextmanager
    def learning(self) -> Iterator[None]:
        self._learning = True
        try:
            yield
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

        An engine that starts meanwhile takes them when it does; but the first ones, at first, and one where no other is left,
        are waited for.
        """
        self._ranks = ranks
        receipts = self._through_store(version, config) if self._links is None else self._directly(self._links, version, config)
        return sync_metrics(receipts) | {"sync/version": version}

    def _directly(self, links: Links, version: int, config: SyncConfig) -> list[Receipt]:
        """An engine that is there takes part; one that starts later gets the same weights then (`_welcome`)."""
        everybody, self._brought = self._brought is None, None
        self._welcome(0.0)
        while not self._present or (everybody and self._first_absent):
            self._welcome(WAIT_S)
        self._brought = version, config
        receipts = self._bring(links, version, config)
        while not receipts:
            receipts = self._welcome(WAIT_S)
        return receipts

    def _bring(self, links: Links, version: int, config: SyncConfig) -> list[Receipt]:
        """Of the engines that are not lost by it. All are called first, so that one that died while the ranks learned is no
        loss for these. Where ranks broadcast, who is lost in the middle of it holds up all others: then it raises ProcessLost.
        No rank waits for who reads what is shown."""
        ranks, present = self._ranks, list(self._ask(lambda actor: actor.gpu.remote()))
        if not present:
            return []
        links.connect(ranks, self.actors)
        offers = links.offers(ranks, version, config.check)
        sent = {name: actor.send.remote() for name, actor in ranks.actors.items()}
        taken = {place: place.actor.take.remote(offers) for place in present}
        if links.broadcasts:
            answers = gather(sent | {place.name: ref for place, ref in taken.items()}, ranks.logs)
            return [answers[place.name] for place in present]
        receipts = self._wait_for(taken)
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
        while not receipts or (everybody and self._first_absent):
            receipts += self._welcome(WAIT_S)
        if receipts[0].changed_share is None:
            self._updates = [update]
        return receipts

    @property
    def actors(self) -> dict[str, Any]:
        """Those that take part, by name."""
        return {place.name: place.actor for place in self._present}

    @property
    def engines(self) -> Sequence[int]:
        return [place.number for place in self._present]

    @property
    def places(self) -> int:
        return sum(place.asked is None for place in self._places)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        return list(self._ask(lambda actor: getattr(actor, method).remote(*arguments)).values())

    def counts(self) -> dict[str, float]:
        counts = {"rollout/engines": float(len(self._present))}
        counts |= {"rollout/engines_lost": float(self._lost), "rollout/engines_returned": float(self._returned)}
        self._lost = self._returned = 0
        return counts

    # ------------------------------------------------------------ who is there

    @property
    def _present(self) -> list[_Place]:
        return [place for place in self._places if place.asked is None and place.starting is None]

    @property
    def _absent(self) -> list[_Place]:
        return [place for place in self._places if place.starting is not None]

    @property
    def _first_absent(self) -> list[_Place]:
        return [place for place in self._absent if place.first]

    def _launch(self, place: _Place) -> None:
        place.actor, place.asked, place.since = self._start(place.name), None, time.monotonic()
        place.starting = place.actor.receive.remote(*self._updates)  # answers as soon as it has started

    def _seek(self, elastic: Elastic, place: _Place) -> None:
        place.asked, place.starting, place.since = elastic.ask(place.name), None, time.monotonic()

    def _find(self, timeout_s: float) -> None:
        """Starts the engines that have got a place; where there is none at all, one is waited for so long.

        Raises:
            ProcessLost: there was none for too long, or a rank is lost with them.
        """
        asked = {place: place.asked for place in self._places if place.asked is not None}
        if not asked:
            return
        refs, nobody = list(asked.values()), len(asked) == len(self._places)
        ready = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        if nobody and not ready:
            ready = ray.wait(refs, timeout=timeout_s)[0]
        for place, ref in asked.items():
            if ref in ready:
                ray.get(ref)
                self._launch(place)
        if nobody and not ready:
            self._ranks.require_alive()
            waited = time.monotonic() - max(place.since for place in asked)  # since the last one was lost
            if waited > self._patience.start_s:
                raise ProcessLost(f"no engine has had a place for {waited:.0f} s (cluster.start_timeout_s)")
            self._say(f"waiting for a place for an engine ({waited:.0f} s)")

    def _may_join(self, place: _Place) -> bool:
        """One that was never there waits for the next weights where ranks would have to bring these once more, to all."""
        return self._links is None or self._brought is None or place.losses > 0 or not self._present

    def _welcome(self, timeout_s: float) -> list[Receipt]:
        """Lets in the engines that have the weights, after `timeout_s` at the latest; what they say of the last update."""
        self._find(timeout_s)
        starting = {place: place.starting for place in self._absent if self._may_join(place)}
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
            elif not place.first:
                self._say(f"{place.name} joins: {len(self._present)} engines take part, of at most {len(self._places)}")
        for place, ref in starting.items():
            if place.starting is ref and time.monotonic() - place.since > self._patience.start_s:
                self._replace(place, f"{place.name} has not started in {self._patience.start_s:g} s (cluster.start_timeout_s)")
        if self._absent and not ready and not self._present:
            self._ranks.require_alive()
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
        """Ends what is left of an engine and starts another, or asks for a place for it; its samples wait for those that are
        there.

        Raises:
            ProcessLost: it was lost too often without finishing a sample and the run needs it, or a rank is lost with it.
        """
        self._lost += 1
        place.losses += 1
        often = f"{why}; it was lost {place.losses} times without finishing a sample"
        if place.first and place.losses > self._patience.losses:
            raise ProcessLost(often)
        self._ranks.require_alive()  # one may be lost with it, as with a node: then all start again
        self._waiting += place.held.values()
        their_samples, place.held = f"its {len(place.held)} samples go to those that are there", {}
        if self._elastic is None:
            self._say(f"{why}; it starts again, and {their_samples}")
            self._launch(place)
        elif place.losses > self._patience.losses:
            self._say(f"{often}; the run goes on without it, and {their_samples}")
            self._places.remove(place)
            self._elastic.give_up(place.name)
        else:
            self._say(f"{why}; it starts again where there is room, and {their_samples}")
            self._seek(self._elastic, place)
