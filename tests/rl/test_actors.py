"""Weights through Ray's object store to several engines, and engines that die or hang."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from kernels.errors import UserError
from launch.cli import load
from rl.actors import Patience, RayPool
from rl.april import complete
from rl.engine.actor import EngineActor
from rl.engine.engine import Engine
from rl.engine.receipt import Receipt, sync_metrics
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.trajectory import Sample
from tests.models import random_batch, spec, tiny_model
from tests.processes import process_of
from tests.rl.light_actors import BrokenEngine, Nobody
from trainer.batch import cross_entropy
from trainer.cluster import Processes, ProcessLost, start_ray
from trainer.config.rl import RLConfig, SyncConfig
from trainer.config.run import ClusterConfig
from trainer.model.transformer import LanguageModel
from trainer.places import REPOSITORY, Placement
from trainer.run_dir import RunDir
from trainer.tracing import TraceRequest, merge_nodes
from trainer.weight_sync import WeightSource, WeightUpdate
from trainer.weights import pack
from trainer.worker import TrainWorker

pytestmark = pytest.mark.timeout(900)  # up to a dozen processes start one after another, while other tests run

CONFIG = tiny_model(max_positions=64, vocab_size=20)
SETTINGS = EngineSettings(4, 40, 30, None, Sampling(1.0, 0), 1)
# Patience for a machine that is busy with other things; tests are not about it.
CLUSTER = dict(address=None, ranks=1, threads_per_rank=1, max_restarts=0, start_timeout_s=240, collective_timeout_s=240)
CLUSTER |= dict(engine_timeout_s=240, object_store_mib=80, host="127.0.0.1", dashboard=False, dashboard_port=1)
CLUSTER |= dict(dollars_per_gpu_hour=None)
CLUSTER |= dict(nodes=None, slurm=None, min_ranks=None, shrink_after_s=60, gpu_type=None)


class ScriptedRank:
    """Rank 0 with a model that moves a little for every version; the other ranks have nothing to say."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def begin(self) -> None:
        self.source = WeightSource()
        self.model = LanguageModel.initialize(CONFIG, seed=0, batch_invariant=True)

    def weights(self, version: int, config: SyncConfig) -> WeightUpdate | None:
        if self.rank:
            return None
        for tensor in self.model.state().values():
            tensor.view(-1)[version::37] += 0.25
        return self.source.update(pack(self.model.state()), version, config)

    def pid(self) -> int:
        return 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(ClusterConfig(**CLUSTER), 4, lambda text: None)
    yield
    ray.shutdown()


def actor(kind: type, *arguments: object) -> ray.actor.ActorHandle:
    options = {"num_cpus": 0.01, "runtime_env": {"env_vars": {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}}}
    return ray.remote(kind).options(**options).remote(*arguments)


class Engines:
    """Two of them, in a pool. `answer_s`: after which a silent one is replaced."""

    def __init__(self, folder: Path, answer_s: float) -> None:
        self.logs = {f"engine/{index}": folder / f"engine_{index}.log" for index in range(2)}
        self.actors: dict[str, ray.actor.ActorHandle] = {}
        self.said: list[str] = []
        self.answer_s = answer_s
        self.pool = RayPool(self.start, self.logs, Patience(answer_s, 240, losses=3), self.said.append)

    def start(self, name: str) -> ray.actor.ActorHandle:
        if name in self.actors:
            ray.kill(self.actors[name])
        self.actors[name] = actor(EngineActor, CONFIG, SETTINGS, "float32", self.logs[name], self.answer_s)
        return self.actors[name]


@pytest.fixture(scope="module")
def rank_actors(cluster: None) -> dict[str, ray.actor.ActorHandle]:
    """Those that are alive; who kills one takes it out."""
    return {}


@pytest.fixture
def scripted_ranks(rank_actors: dict[str, ray.actor.ActorHandle]) -> Processes:
    """Two, at their beginning."""
    for name in ("trainer/0", "trainer/1"):
        if name not in rank_actors:
            rank_actors[name] = actor(ScriptedRank, int(name[-1]))
    ranks = Processes(dict(sorted(rank_actors.items())))
    ranks.call("begin")
    return ranks


def trained_ranks(folder: Path) -> Processes:
    """Two that share the experts."""
    ranks = Processes({f"trainer/{rank}": actor(TrainWorker, rank, folder / f"trainer_{rank}.log") for rank in range(2)})
    host, port = ranks.call_first("serve", "127.0.0.1", 60.0)
    ranks.call("join", host, port, 2, 60.0)
    ranks.call("build", spec(CONFIG, batch_invariant=True, micro_rows=4))
    return ranks


@contextmanager
def traced(ranks: Processes, pool: RayPool, folder: Path, tokens: int) -> Iterator[None]:
    """What ranks and engines do is in one file, with the names of their roles; of engines the first tokens."""

    def everybody(method: str, *arguments: object) -> list[Any]:
        return [*ranks.call(method, *arguments), *pool.ask(method, *arguments)]

    everybody("start_trace", TraceRequest(steps=1, ranks=(1,), engines="all", tokens=tokens, memory=True))
    yield
    written = [answer for answer in everybody("end_trace", folder) if answer is not None]
    assert [one.role for one in written] == ["rank_1", "engine_0", "engine_1"] and not any(one.memory for one in written)
    merge_nodes(written, folder)
    (file,) = folder.glob("node_*.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == "process_name"}
    generated = [names[event["pid"]] for event in events if event["name"] == f"generate {tokens} tokens a row"]
    assert sorted(name.partition(":")[0] for name in generated) == ["engine 0", "engine 1"]
    assert any(name.startswith("rank 1: ") for name in names.values())


def end(role: str, folder: Path) -> None:
    """Kills the process of a role that logs somewhere in the folder, and waits until it is gone."""
    (log,) = folder.rglob(f"{role.replace('/', '_')}.log")
    process = process_of(role, folder=log.parent)
    assert process is not None
    process.kill()
    process.wait(60)


def samples(count: int) -> list[Sample]:
    return [Sample(uid, uid // 2, (2, 3 + uid // 2 % 9)) for uid in range(count)]


def test_changes_reach_all_engines_and_one_that_died_gets_what_they_have(
    scripted_ranks: Processes, rank_actors: dict[str, ray.actor.ActorHandle], tmp_path: Path
) -> None:
    ranks, engines = scripted_ranks, Engines(tmp_path, 60)
    pool, config = engines.pool, SyncConfig(transport="store", anchor_every=4, check=True)
    found = [pool.load_weights(ranks, version, config) for version in range(6)]
    assert ["sync/changed_share" in metrics for metrics in found] == [False, True, True, True, False, True]
    assert all(metrics["sync/check_s"] > 0 for metrics in found), "each engine has compared its hash"
    assert found[1]["sync/changed_share"] == pytest.approx(1 / 37, abs=0.01)
    assert found[1]["sync/mib"] < found[0]["sync/mib"] / 5
    ray.kill(engines.actors["engine/1"])
    assert "sync/changed_share" in pool.load_weights(ranks, 6, config), "nobody waits for it"
    assert pool.counts()["rollout/engines_lost"] == 1
    while not pool.counts()["rollout/engines_returned"]:
        assert pool.advance(1) == []
    pool.submit([Sample(uid, 0, (2, 3)) for uid in (5, 5)])  # one for each engine, the same noise
    with pool.going_on(1, 2) as done:  # while the driver waits for something else
        ray.get(ranks.actors["trainer/1"].weights.remote(7, config))
    pool.submit(pool.drain())
    first, second = done + pool.advance(40)
    assert first == second and set(first.versions) == {6} and pool.busy_s > 0
    pool.submit(samples(4))
    for lost in (rank_actors.pop("trainer/1"), engines.actors["engine/0"]):
        ray.kill(lost)
    with pytest.raises(ProcessLost, match="trainer/1 died"):  # as when their node dies
        while True:
            pool.advance(1)


def test_what_engines_that_die_and_hang_had_is_generated_anew_to_the_same_bits(
    scripted_ranks: Processes, tmp_path: Path
) -> None:
    """First one dies and the other takes its samples, then both are lost at once: one dead, one silent."""
    ranks, engines = scripted_ranks, Engines(tmp_path, 5)
    pool, config = engines.pool, SyncConfig(transport="store", anchor_every=1, check=False)
    pool.load_weights(ranks, 3, config)
    reference = Engine(CONFIG, SETTINGS, torch.device("cpu"), torch.float32)
    model = LanguageModel.initialize(CONFIG, seed=0, batch_invariant=True)
    for tensor in model.state().values():
        tensor.view(-1)[3::37] += 0.25
    reference.load_weights(model.state(), 3)
    expected = complete(reference, samples(24), 40)
    pool.submit(samples(24))
    done = pool.advance(3)
    victim = process_of("engine/0", folder=tmp_path)
    assert victim is not None
    victim.kill()
    while not pool.counts()["rollout/engines_returned"]:
        done += pool.advance(1)
    assert any("engine/0 died" in line for line in engines.said), engines.said
    interrupted = pool.drain()
    pool.submit(interrupted)
    assert any(sample.status == "partial" for sample in interrupted) or len(done) == 24
    pool.submit([Sample(uid, uid, (4, 5, 6)) for uid in range(100, 108)])
    dead, silent = process_of("engine/0", folder=tmp_path), process_of("engine/1", folder=tmp_path)
    assert dead is not None and silent is not None
    dead.kill()
    silent.suspend()
    while len(done) < 32:
        done += pool.advance(4)
    assert any("engine/1 hangs: no answer in 5 s (it wrote no stack" in line for line in engines.said), engines.said
    assert pool.counts()["rollout/engines_lost"] >= 2
    assert pool.drain() == []
    assert not psutil.wait_procs([silent], timeout=30)[1], "the silent one is still there"
    expected += complete(reference, [Sample(uid, uid, (4, 5, 6)) for uid in range(100, 108)], 40)
    whole = {sample.uid: (sample.status, sample.response_ids, sample.logprobs) for sample in expected}
    assert {sample.uid: (sample.status, sample.response_ids, sample.logprobs) for sample in done} == whole
    assert len(done) == len(whole), "none twice"


@pytest.fixture
def elastic(cluster: None, tmp_path: Path) -> Iterator[tuple[Processes, Placement, RayPool, Placement]]:
    """Ranks, and two engines that are to be three; there is room for the third when what is placed last has ended."""
    config, said = ClusterConfig(**CLUSTER | {"max_restarts": 3}), list[str]()
    run = RunDir.open(load(RLConfig, "rl", [f"runs_dir={tmp_path}", "checkpoint=a"]), "rl")
    ranks, sync = trained_ranks(tmp_path), SyncConfig(transport="direct", anchor_every=1, check=True)
    # Of all, and not of those that Ray says are free, which it hears of late; all ranks of this file take parts of one.
    places = int(ray.cluster_resources()["CPU"]) - 1
    with (
        Placement(config, (1,), said.append, engines=3, separate=True, min_engines=2) as placement,
        Placement(config, (places - 3,), said.append) as other,
    ):
        pool = RayPool.start(placement, CONFIG, SETTINGS, "float32", run, config, sync, said.append)
        yield ranks, placement, pool, other
    run.close("stopped")


def test_ranks_bring_their_weights_directly_and_again_to_an_engine_that_was_replaced_or_joins(
    elastic: tuple[Processes, Placement, RayPool, Placement], tmp_path: Path
) -> None:
    ranks, placement, pool, other = elastic
    config = SyncConfig(transport="direct", anchor_every=1, check=True)
    size = sum(tensor.nbytes for tensor in LanguageModel.initialize(CONFIG, seed=0).state().values())
    for version in range(2):
        metrics = pool.load_weights(ranks, version, config)
        assert metrics["sync/mib"] == size / 2**20 and metrics["sync/check_s"] > 0 and metrics["sync/version"] == version
        ranks.call("learn", random_batch(version, vocab=20), cross_entropy, 1e-2)
    pool.load_weights(ranks, 2, config)
    reference = Engine(CONFIG, SETTINGS, torch.device("cpu"), torch.float32)
    reference.receive(ranks.call("weights", 2, SyncConfig(transport="store", anchor_every=1, check=False))[0])
    expected = complete(reference, samples(12), 40)
    with traced(ranks, pool, tmp_path, tokens=2):
        pool.submit(samples(12))
        done = pool.advance(2)
        done += pool.advance(2)  # is not in the trace any more
    assert pool.engines == [0, 1] and pool.places == 2
    ray.kill(placement.actors["engine/0"])
    while not pool.counts()["rollout/engines_returned"]:  # it has the weights of the others, which the ranks still have
        done += pool.advance(1)
    while len(done) < 12:
        done += pool.advance(4)
    found = sorted(done, key=lambda sample: sample.uid)
    assert [sample.response_ids for sample in found] == [sample.response_ids for sample in expected]
    assert [sample.logprobs for sample in found] == [sample.logprobs for sample in expected], "bit for bit"
    pool.submit(samples(12))
    with pool.going_on(1, 12):
        end("engine/1", tmp_path)
        ranks.call("learn", random_batch(2, vocab=20), cross_entropy, 1e-2)
    pool.drain()
    assert pool.load_weights(ranks, 3, config)["sync/version"] == 3
    assert all(set(sample.versions) == {3} for sample in complete(pool, samples(4), 40))
    while pool.engines != [0, 1]:
        assert pool.advance(1) == []
    end("engine/0", tmp_path)  # nobody asks it anything before the next weights, as while the ranks learn
    assert pool.load_weights(ranks, 4, config)["sync/version"] == 4
    assert pool.engines == [1] and all(set(sample.versions) == {4} for sample in complete(pool, samples(4), 40))
    other.__exit__(None, None, None)
    version = 4
    while len(pool.engines) < 3:  # nobody waits for it, and it takes the next weights with the others
        assert pool.advance(1) == [] and version < 10_000
        version += 1
        pool.load_weights(ranks, version, config)
    assert pool.engines == [0, 1, 2] and pool.places == 3 and pool.counts()["rollout/engines"] == 3
    pool.submit([Sample(uid, 0, (2, 3)) for uid in (5, 5, 5)])  # one for each engine, the same noise
    first, second, third = pool.advance(40)
    assert first == second == third and set(third.versions) == {version}


def test_engines_have_places_of_their_own_or_those_of_the_ranks(cluster: None, tmp_path: Path) -> None:
    config, said = ClusterConfig(**CLUSTER), list[str]()
    for separate in (False, True):
        with Placement(config, (2,), said.append, engines=2, separate=separate) as placement:
            names = [("trainer/0", 0), ("trainer/1", 1), ("engine/0", 0), ("engine/1", 1)]
            found = Processes({name: placement.actor(Nobody, name, index, index) for name, index in names})
            assert sorted(placement.bundles + placement.engine_bundles) == ([0, 1, 2, 3] if separate else [0, 0, 1, 1])
            assert found.call("pid") == [0] * 4, "each has what it takes"
            assert placement.processes == "2 trainer ranks and 2 engines" + " in places of their own" * separate
    crowded = config.model_copy(update={"start_timeout_s": 1.0, "gpu_type": "H100"})
    each = "a rank or an engine takes 1 CPU and 0.001 accelerator_type:H100"
    with pytest.raises(UserError, match=rf"no place .*: 20 wanted, room for 0 on .* {each}.*rollout.engines"):
        Placement(crowded, (12,), said.append, engines=8, separate=True)
    assert "waiting for a place for 12 trainer ranks and 8 engines in places of their own" in said[-1]


def test_an_engine_that_never_starts_ends_the_attempt_with_the_reason(scripted_ranks: Processes, tmp_path: Path) -> None:
    said: list[str] = []
    pool = RayPool(lambda name: actor(BrokenEngine), {"engine/0": tmp_path / "log"}, Patience(60, 60, losses=1), said.append)
    with pytest.raises(
        ProcessLost, match=r"engine/0 died \(MemoryError: no memory for a cache of 7 GiB\); it was lost 2 times"
    ):
        pool.load_weights(scripted_ranks, 0, SyncConfig(transport="store", anchor_every=1, check=False))
    assert len([line for line in said if "it starts again, and its 0 samples go" in line]) == 1


def test_metrics_are_those_of_the_largest_update() -> None:
    receipts = [Receipt(2**20, 0.25, 0.5), Receipt(2**21, None, 0.25)]
    assert sync_metrics(receipts) == {"sync/mib": 2, "sync/check_s": 0.5}
    assert sync_metrics([Receipt(2**20, None, None)]) == {"sync/mib": 1}
    assert sync_metrics(receipts[:1]) == {"sync/mib": 1, "sync/check_s": 0.5, "sync/changed_share": 0.25}
