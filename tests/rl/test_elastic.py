"""Engines that join and are lost at any moment, in hundreds of random histories of a cluster: no sample is lost or done twice,
every token is of the weights that it is said to be of, and without over-provision every round is that of one engine.

The pool is the one of a run. Ray is played by this process: calls answer at once, unless their actor starts, is dead or silent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import GetTimeoutError, RayActorError

from kernels.errors import UserError
from launch.cli import load
from rl.actors import Elastic, Patience, RayPool
from rl.april import RoundResult, rollout_round
from rl.engine.receipt import Receipt
from rl.links import Links
from rl.trajectory import RolloutBuffer, Sample, Segment
from rl.turns import TurnPool
from tests.rl.test_april import ScriptedPool, configs, final_length, play, prompts, score, token
from trainer.cluster import Processes, ProcessLost
from trainer.config.rl import RLConfig, RolloutConfig, SyncConfig
from trainer.weight_delta import WeightDelta, apply
from trainer.weight_sync import WeightSource, WeightUpdate
from trainer.weights import pack, unpack

LONGEST, ROUNDS, MOST = 64, 4, 4
CALM = 400  # events after which nothing dies any more


def weights_of(version: int) -> torch.Tensor:
    weights_N = torch.zeros(2000)
    weights_N[version::100] = version + 1.0
    return weights_N


class Rank:
    """Rank 0; its weights are those of the version."""

    def __init__(self) -> None:
        self.source = WeightSource()

    def weights(self, version: int, config: SyncConfig) -> WeightUpdate:
        return self.source.update(pack({"w": weights_of(version)}), version, config)

    def pid(self) -> int:
        return 0

    def send(self) -> None:
        """What `Told` offers."""


class ScriptedEngine(ScriptedPool):
    """Holds weights, and generates what `ScriptedPool` does with log-probabilities that name their version."""

    def __init__(self, limit: int, slots: int) -> None:
        super().__init__(-1, LONGEST, limit, slots)
        self.weights_N = {"w": torch.full((2000,), torch.nan)}

    def receive(self, *updates: WeightUpdate) -> Receipt | None:
        for update in updates:
            self.queue = [(sample, 0) for sample in self.drain()]
            if isinstance(update.weights, WeightDelta):
                assert update.weights.base == self.version, "changes build on the weights before"
                apply(update.weights, self.weights_N)
            else:
                self.weights_N["w"].copy_(unpack(update.weights)["w"])
            self.version = update.version
            assert torch.equal(self.weights_N["w"], weights_of(self.version))
        share = updates[-1].weights.changed_share if updates and isinstance(updates[-1].weights, WeightDelta) else None
        return Receipt(updates[-1].nbytes, share, None) if updates else None

    def gpu(self) -> None:
        """It has none."""

    def take(self, version: int) -> Receipt:
        self.version = version
        return Receipt(0, None, None)

    def _segment(self, sample: Sample, count: int) -> Segment:
        tokens = tuple(token(sample.uid, sample.length + place) for place in range(count))
        return Segment(tokens, tuple(-1.0 - self.version for _ in tokens), self.version)


class Ref:
    """An answer that is there, or comes, or never does."""

    def __init__(self) -> None:
        self.there, self.value = False, None
        self.error: Exception | None = None


class Actor:
    """What the pool holds of one: `actor.method.remote(...)`. It answers while it is `started` and not `silent`."""

    def __init__(self, cloud: Cloud, body: object, started: bool) -> None:
        self.cloud, self.body, self.started = cloud, body, started
        self.dead = self.silent = False
        self.calls: list[tuple[Ref, str, tuple[Any, ...]]] = []

    def __getattr__(self, method: str) -> Any:
        return type("Method", (), {"remote": lambda _, *arguments: self.call(method, arguments)})()

    def call(self, method: str, arguments: tuple[Any, ...]) -> Ref:
        self.cloud.tick()
        ref = Ref()
        self.calls.append((ref, method, arguments))
        self.answer()
        return ref

    def answer(self) -> None:
        while self.calls and (self.dead or (self.started and not self.silent)):
            ref, method, arguments = self.calls.pop(0)
            ref.there = True
            if self.dead:
                ref.error = RayActorError()
            else:
                ref.value = getattr(self.body, method)(*(a.value if isinstance(a, Ref) else a for a in arguments))

    def kill(self) -> None:
        self.dead = True
        self.answer()


class Cloud:
    """Nodes with room for engines, which come and go, and what of Ray a pool uses. Something happens at every call."""

    def __init__(self, random: Random, first: int, danger: float, engine: Any) -> None:
        self.random, self.danger, self.engine = random, danger, engine
        self.rooms = {0: first}  # node -> engines that it has room for; every engine's first place is on node 0
        self.place: dict[str, int] = {f"engine/{number}": 0 for number in range(first)}  # engine -> node
        self.groups = set(self.place)  # engines for which Ray finds another place when they lose theirs
        self.asked: dict[str, Ref] = {}
        self.actors: dict[str, Actor] = {}
        self.events, self.node, self.joined, self.given_up = 0, 0, set[str](), list[str]()

    def start(self, name: str) -> Actor:
        if name in self.actors:
            self.actors[name].kill()
        assert name in self.groups, "it has asked for a place"
        self.actors[name] = Actor(self, self.engine(), started=False)
        return self.actors[name]

    def ask(self, name: str) -> Ref:
        if name in self.actors:
            self.actors[name].kill()
        self.groups.add(name)
        self.asked[name] = Ref()
        return self.asked[name]

    def give_up(self, name: str) -> None:
        self.given_up.append(name)
        self.actors.pop(name).kill()
        self.place.pop(name, None)
        self.groups.remove(name)

    def tick(self) -> None:
        self.events += 1
        random, danger = self.random, self.danger if self.events < CALM else 0.0
        if random.random() < 0.05 or not self.rooms:
            self.node += 1
            self.rooms[self.node] = random.randint(1, 2)
        if self.rooms and random.random() < danger:
            self.lose(random.choice(list(self.rooms)))
        for name in sorted(self.groups - self.place.keys()):
            free = [node for node, room in self.rooms.items() if room > list(self.place.values()).count(node)]
            if free:
                self.place[name] = random.choice(free)
        for name, actor in self.actors.items():
            actor.started = actor.started or (name in self.place and random.random() < 0.5)
            if random.random() < danger:
                actor.kill()
            actor.silent = actor.silent or (actor.started and random.random() < danger / 2)
            actor.answer()
        for name, ref in self.asked.items():
            ref.there = ref.there or name in self.place

    def lose(self, node: int) -> None:
        del self.rooms[node]
        for name in [name for name, where in self.place.items() if where == node]:
            del self.place[name]
            if name in self.actors and self.actors[name].started:
                self.actors[name].kill()

    # ------------------------------------------------------------ as Ray, and as its clock

    def monotonic(self) -> float:
        return float(self.events)

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.tick()

    def wait(self, refs: Sequence[Ref], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Ref], list[Ref]]:
        if timeout != 0:
            self.tick()
        ready = [ref for ref in refs if ref.there][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Ref, timeout: float | None = None) -> Any:
        if not ref.there:
            raise GetTimeoutError("not yet")
        if ref.error is not None:
            raise ref.error
        return ref.value


class Run:
    """A driver: rounds, and another attempt from the last round when the pool gives up."""

    def __init__(self, config: RolloutConfig, random: Random, danger: float) -> None:
        self.config, self.random, self.danger = config, random, danger
        self.buffer, self.results = RolloutBuffer(), list[RoundResult]()
        self.saved = json.dumps(self.buffer.to_state())
        self.counts, self.attempts, self.joined, self.given_up = list[dict[str, float]](), 0, 0, 0
        self.sync = SyncConfig(transport="store", anchor_every=random.choice([1, 3]), check=False)

    def play(self, patch: pytest.MonkeyPatch) -> None:
        while len(self.results) < ROUNDS:
            self.attempts += 1
            assert self.attempts < 50
            try:
                self.attempt(patch)
            except ProcessLost:
                self.buffer = RolloutBuffer.from_state(json.loads(self.saved))
                self.danger /= 2

    def attempt(self, patch: pytest.MonkeyPatch) -> None:
        """To the end of a round or more."""
        random, said = self.random, list[str]()
        first = random.randint(1, MOST)
        cloud = Cloud(random, first, self.danger, lambda: ScriptedEngine(self.config.max_new_tokens, random.randint(1, 9)))
        patch.setattr("rl.actors.ray", cloud)
        patch.setattr("rl.actors.time", cloud)
        patch.setattr("trainer.cluster.ray", cloud)
        logs = {f"engine/{number}": Path("/dev/null") for number in range(MOST)}
        elastic = Elastic(first, cloud.ask, cloud.give_up)
        pool = RayPool(cloud.start, logs, Patience(0.0, 100.0, random.choice([2, 9])), said.append, elastic=elastic)
        ranks = Processes({"trainer/0": Actor(cloud, Rank(), started=True)})
        for version in range(len(self.results), len(self.results) + random.randint(1, ROUNDS - len(self.results))):
            pool.load_weights(ranks, version, self.sync)
            result = rollout_round(pool, self.buffer, prompts, self.config, version, score)
            assert pool.drain() == [] and len(pool.engines) <= pool.places <= MOST
            self.counts.append(pool.counts())
            self.results.append(result)
            self.saved = json.dumps(self.buffer.to_state())  # a checkpoint, with which the next attempt begins
        self.joined += sum(" joins: " in line for line in said)
        self.given_up += len(cloud.given_up)


def played(config: RolloutConfig, seed: int, danger: float) -> Run:
    run = Run(config, Random(seed), danger)
    with pytest.MonkeyPatch.context() as patch:
        run.play(patch)
    return run


@settings(max_examples=300, deadline=None, derandomize=True)
@given(configs, st.integers(0, 2**32), st.sampled_from([0.0, 0.005, 0.03]))
def test_engines_that_come_and_go_lose_no_prompt_and_no_token(config: RolloutConfig, seed: int, danger: float) -> None:
    run = played(config, seed, danger)
    groups = [group for result in run.results for group in result.groups]
    waiting = [group.id for group in (*run.buffer.recycled, *run.buffer.surplus)]
    dropped = [group.id for result in run.results for group in result.dropped]
    assert sorted([group.id for group in groups] + waiting + dropped) == list(range(run.buffer.next_group)), "each once"
    for version, result in enumerate(run.results):
        for sample in (sample for group in result.groups for sample in group.samples):
            length = min(final_length(sample.uid, LONGEST), config.max_new_tokens)
            assert sample.response_ids == tuple(token(sample.uid, place) for place in range(length))
            assert sample.logprobs == tuple(-1.0 - sampled_at for sampled_at in sample.versions)
            assert list(sample.versions) == sorted(sample.versions) and sample.versions[-1] <= version
    if config.over_provision == 1:
        alone = play(RolloutBuffer(), config, range(ROUNDS), LONGEST)
        expected = [[(s.uid, s.response_ids, s.versions) for g in one.groups for s in g.samples] for one in alone]
        assert [[(s.uid, s.response_ids, s.versions) for g in one.groups for s in g.samples] for one in run.results] == expected


def test_the_histories_have_joins_losses_returns_and_engines_that_are_given_up() -> None:
    """Else the property above would say little."""
    config = RolloutConfig.model_validate(load(RLConfig, "rl", ["checkpoint=a"]).rollout.model_dump() | {"max_new_tokens": 64})
    runs = [played(config, seed, 0.03) for seed in range(30)]
    assert sum(run.joined for run in runs) > 10
    for key in ("lost", "returned"):
        assert sum(one[f"rollout/engines_{key}"] for run in runs for one in run.counts) > 10, key
    assert {one["rollout/engines"] for run in runs for one in run.counts} >= set(range(1, MOST + 1))
    assert sum(run.given_up for run in runs) > 0 and any(run.attempts > 1 for run in runs)


class Told(Links):
    """The direct way of the weights: `versions` are those that were asked for, and `meanwhile` happens as they are offered."""

    def __init__(self, broadcasts: bool) -> None:
        super().__init__(timeout_s=0.0)
        self.broadcasts, self.versions = broadcasts, list[int]()
        self.meanwhile: Callable[[], None] = lambda: None

    def connect(self, ranks: Processes, engines: Mapping[str, Any]) -> None:
        """There is nothing to connect."""

    def offers(self, ranks: Processes, version: int, check: bool) -> Any:
        self.versions.append(version)
        self.meanwhile()
        return version


def directly(cloud: Cloud, links: Links, patch: pytest.MonkeyPatch) -> tuple[RayPool, Processes]:
    """Two engines, and a rank that brings them its weights."""
    for module in ("rl.actors.ray", "rl.actors.time", "trainer.cluster.ray"):
        patch.setattr(module, cloud)
    logs = {f"engine/{number}": Path("/dev/null") for number in range(2)}
    ranks = Processes({"trainer/0": Actor(cloud, Rank(), started=True)})
    return RayPool(cloud.start, logs, Patience(0.0, 1e9, 9), lambda text: None, links), ranks


DIRECT = SyncConfig(transport="direct", anchor_every=1, check=False)


@pytest.mark.parametrize("broadcasts", [False, True])
def test_an_engine_that_died_while_the_ranks_learned_is_replaced_whatever_the_way_of_the_weights(
    broadcasts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has asked it anything since. In a broadcast all others would wait for it."""
    cloud, links = Cloud(Random(0), 2, 0.0, lambda: ScriptedEngine(9, slots=9)), Told(broadcasts)
    pool, ranks = directly(cloud, links, monkeypatch)
    pool.load_weights(ranks, 0, DIRECT)
    cloud.actors["engine/1"].kill()
    assert pool.load_weights(ranks, 1, DIRECT)["sync/version"] == 1
    assert pool.engines == [0] and pool.counts()["rollout/engines_lost"] == 1
    while pool.engines != [0, 1]:
        assert pool.advance(1) == []
    for actor in cloud.actors.values():
        actor.kill()
    assert pool.load_weights(ranks, 2, DIRECT)["sync/version"] == 2, "one is waited for"


def test_an_engine_that_is_lost_in_the_middle_of_a_broadcast_ends_the_attempt_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait in it for as long as a collective may take, which is no fault of theirs."""
    cloud, links = Cloud(Random(0), 2, 0.0, lambda: ScriptedEngine(9, slots=9)), Told(broadcasts=True)
    pool, ranks = directly(cloud, links, monkeypatch)
    pool.load_weights(ranks, 0, DIRECT)

    def lost() -> None:
        cloud.actors["engine/0"].silent = True
        cloud.actors["engine/1"].kill()

    links.meanwhile = lost
    with pytest.raises(ProcessLost, match="engine/1 died"):
        pool.load_weights(ranks, 1, DIRECT)
    assert not cloud.actors["engine/0"].dead and pool.counts()["rollout/engines_lost"] == 0


@pytest.mark.parametrize("talks", [False, True])
def test_an_engine_that_returns_while_the_ranks_learn_gets_what_they_have_when_that_is_done(
    talks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In conversations too. What ranks hold meanwhile is of no version."""
    cloud = Cloud(Random(0), 2, 0.0, lambda: ScriptedEngine(10**9, slots=9))
    links = Told(broadcasts=False)
    pool, ranks = directly(cloud, links, monkeypatch)
    pool.load_weights(ranks, 0, DIRECT)
    asked = list(links.versions)
    pool.submit([Sample(uid, 0, (1, 2)) for uid in range(4)])
    lost = cloud.actors["engine/1"]
    lost.kill()
    with (TurnPool(pool, lambda samples: samples) if talks else pool).going_on(0, 4):
        while (now := cloud.actors["engine/1"]) is lost or not now.started:
            time.sleep(0.001)
        events = cloud.events
        while cloud.events < events + 100:
            time.sleep(0.001)
        assert pool.engines == [0] and links.versions == asked
    pool.drain()
    pool.load_weights(ranks, 1, DIRECT)
    assert pool.engines == [0, 1] and links.versions == [*asked, 1]
    assert {actor.body.version for actor in cloud.actors.values()} == {1}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rollout.engines=2", "rollout.min_engines=3"], r"min_engines \(3\) is larger than engines \(2\); lower it"),
        (["rollout.engines=2", "rollout.min_engines=1"], r"min_engines \(1\) lets engines join .* set placement=separate"),
        (
            ["rollout.placement=separate", "rollout.min_engines=1", "cluster.nodes=[a]"],
            r"rollout.min_engines \(1\) lets engines join .* set rollout.min_engines=null",
        ),
    ],
)
def test_engines_join_where_there_can_be_room(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(RLConfig, "rl", ["checkpoint=a", *options])
