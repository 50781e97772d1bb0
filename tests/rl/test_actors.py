"""Weights through Ray's object store, to several engines, of which one is started anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rl.actors import EngineActor, RayPool, sync_metrics
from rl.engine.engine import EngineSettings, Receipt
from rl.engine.sampler import Sampling
from rl.trajectory import Sample
from tests.models import tiny_model
from trainer.cluster import REPOSITORY, Processes, start_ray
from trainer.config import ClusterConfig, SyncConfig
from trainer.model.transformer import LanguageModel
from trainer.weight_sync import WeightSource, WeightUpdate
from trainer.weights import pack

CONFIG = tiny_model(max_positions=64, vocab_size=20)
SETTINGS = EngineSettings(4, 40, 8, None, Sampling(1.0, 0), 1)
CLUSTER = dict(address=None, ranks=1, threads_per_rank=1, max_restarts=0, start_timeout_s=60, collective_timeout_s=60)
CLUSTER |= dict(object_store_mib=80, host="127.0.0.1", dashboard=False, dashboard_port=1, dollars_per_gpu_hour=None)
CLUSTER |= dict(nodes=None, slurm=None)


class ScriptedRank:
    """Rank 0 with a model that moves a little for every version; the other ranks have nothing to say."""

    def __init__(self, rank: int) -> None:
        self.rank, self.source = rank, WeightSource()
        self.model = LanguageModel.initialize(CONFIG, seed=0)

    def weights(self, version: int, config: SyncConfig) -> WeightUpdate | None:
        if self.rank:
            return None
        for tensor in self.model.state().values():
            tensor.view(-1)[version::37] += 0.25
        return self.source.update(pack(self.model.state()), version, config)

    def anchor(self) -> WeightUpdate:
        return self.source.anchor()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(ClusterConfig(**CLUSTER), 4, lambda text: None)
    yield
    ray.shutdown()


def actor(kind: type, *arguments: object) -> ray.actor.ActorHandle:
    options = {"num_cpus": 0.01, "runtime_env": {"env_vars": {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}}}
    return ray.remote(kind).options(**options).remote(*arguments)


def engine(log: Path) -> ray.actor.ActorHandle:
    return actor(EngineActor, CONFIG, SETTINGS, "float32", log)


def test_changes_reach_all_engines_and_a_new_one_gets_all_weights(cluster: None, tmp_path: Path) -> None:
    ranks = Processes({f"trainer/{rank}": actor(ScriptedRank, rank) for rank in range(2)})
    pool = RayPool(Processes({f"engine/{index}": engine(tmp_path / f"{index}.log") for index in range(2)}))
    config = SyncConfig(anchor_every=4, check=True)
    found = [pool.load_weights(ranks, version, config) for version in range(6)]
    assert ["sync/changed_share" in metrics for metrics in found] == [False, True, True, True, False, True]
    assert all(metrics["sync/check_s"] > 0 for metrics in found), "each engine has compared its hash"
    assert found[1]["sync/changed_share"] == pytest.approx(1 / 37, abs=0.01)
    assert found[1]["sync/mib"] < found[0]["sync/mib"] / 5
    ray.kill(pool.engines.actors["engine/1"])
    pool.engines.actors["engine/1"] = engine(tmp_path / "again.log")
    metrics = pool.load_weights(ranks, 6, config)
    assert "sync/changed_share" not in metrics and metrics["sync/mib"] == found[0]["sync/mib"]
    pool.submit([Sample(uid, 0, (2, 3)) for uid in (5, 5)])  # one for each engine, the same noise
    with pool.going_on(1, 2) as done:  # while the driver waits for something else
        ray.get(ranks.actors["trainer/1"].weights.remote(7, config))
    pool.submit(pool.drain())
    first, second = done + pool.advance(8)
    assert first == second and set(first.versions) == {6} and pool.busy_s > 0


def test_metrics_are_those_of_the_largest_update() -> None:
    receipts = [Receipt(2**20, 0.25, 0.5), Receipt(2**21, None, 0.25)]
    assert sync_metrics(receipts) == {"sync/mib": 2, "sync/check_s": 0.5}
    assert sync_metrics([Receipt(2**20, None, None)]) == {"sync/mib": 1}
    assert sync_metrics(receipts[:1]) == {"sync/mib": 1, "sync/check_s": 0.5, "sync/changed_share": 0.25}
