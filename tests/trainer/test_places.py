"""Ranks move in random histories of a cluster: for more places only once these are held, and away from nodes that are to go.

Ray is played by this process: places are given where nodes have room, all of a group or none.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.cli import load
from trainer import places
from trainer.config.run import ClusterConfig, PretrainConfig
from trainer.places import Placement
from trainer.stopping import Move, Moved

CHOICES = (4, 2, 1)


@dataclass(eq=False)
class Group:
    """A placement group, and where its bundles are; None: nowhere yet."""

    cloud: Cloud
    size: int
    nodes: list[str] | None = None
    answered: bool = False

    def wait(self, timeout_s: float) -> bool:
        self.cloud.clock += timeout_s
        return self.nodes is not None


@dataclass(eq=False)
class Answer:
    """Of a process in a place; it stays when the place is lost."""

    group: Group

    @property
    def there(self) -> bool:
        return self.group.answered


@dataclass
class Cloud:
    cpus: dict[str, int]  # of nodes that are alive
    going: set[str] = field(default_factory=set)
    groups: list[Group] = field(default_factory=list)
    clock: float = 0.0

    def settle(self) -> None:
        """Groups that lost a node are placed anew, as those that have no places."""
        for group in self.groups:
            if group.nodes is not None and not set(group.nodes) <= self.cpus.keys():
                group.nodes = None
        for group in self.groups:
            held = [node for other in self.groups for node in other.nodes or ()]
            free = [n for n, count in self.cpus.items() if n not in self.going for _ in range(count - held.count(n))]
            if group.nodes is None and len(free) >= group.size:
                group.nodes, group.answered = free[: group.size], True

    def reserve(self, bundles: list[dict[str, float]], strategy: str) -> Group:
        self.groups.append(group := Group(self, len(bundles)))
        self.settle()
        return group

    def remove(self, group: Group) -> None:
        self.groups.remove(group)
        self.settle()

    def table(self, group: Group) -> dict[str, Any]:
        state = "CREATED" if group.nodes is not None else "RESCHEDULING"
        return {"bundles_to_node_id": dict(enumerate(group.nodes or ())), "state": state}

    def nodes_(self) -> list[dict[str, Any]]:
        common = {"Alive": True, "NodeManagerAddress": "127.0.0.1"}
        return [{"NodeID": n, "NodeName": n, "Resources": {"CPU": float(c)}, **common} for n, c in self.cpus.items()]

    def wait_(self, answers: list[Answer], num_returns: int, timeout: float) -> tuple[list[Answer], list[Answer]]:
        return [one for one in answers if one.there], [one for one in answers if not one.there]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Cloud:
    cloud = Cloud({})
    for name, part in (("placement_group", cloud.reserve), ("placement_group_table", cloud.table)):
        monkeypatch.setattr(places, name, part)
    monkeypatch.setattr(places, "remove_placement_group", cloud.remove)
    monkeypatch.setattr(
        places, "_probe", lambda scheduling_strategy, max_retries=0: Answer(scheduling_strategy.placement_group)
    )
    monkeypatch.setattr(places, "_has_gpus", lambda address: False)
    monkeypatch.setattr(places, "nodes_going", lambda: frozenset(cloud.going & cloud.cpus.keys()))
    monkeypatch.setattr(places.time, "monotonic", lambda: cloud.clock)
    for name, part in (("nodes", cloud.nodes_), ("available_resources", dict), ("wait", cloud.wait_)):
        monkeypatch.setattr(places.ray, name, part)
    monkeypatch.setattr(places.ray, "get", lambda answers: [one.there for one in answers])
    monkeypatch.setattr(places.ray.util, "list_named_actors", list)
    return cloud


CLUSTER = load(PretrainConfig, "pretrain", []).cluster.model_copy(
    update={"address": "played", "ranks": 4, "min_ranks": 1, "shrink_after_s": 0.0, "start_timeout_s": 1e9}
)


def cluster(**changes: Any) -> ClusterConfig:
    return CLUSTER.model_copy(update=changes)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_ranks_move_to_places_that_they_have_and_away_from_nodes_that_go(played: Cloud, data: st.DataObject) -> None:
    played.cpus, played.going, played.groups = {"a": data.draw(st.integers(1, 4))}, set(), []
    names, others = map(str, itertools.count()), list[Group]()  # of nodes to come; places that another run holds for a while
    said = list[str]()

    def step() -> None:
        """What happens to the cluster meanwhile; nodes of ranks are not lost, because that ends an attempt."""
        event = data.draw(st.sampled_from(["more", "lost", "going", "others", "none"]))
        spare = sorted(played.cpus.keys() - set(placement.node_ids))
        if event == "more":
            played.cpus[next(names)] = data.draw(st.integers(1, 3))
        elif event == "lost" and spare:
            del played.cpus[data.draw(st.sampled_from(spare))]
        elif event == "going":
            played.going.add(data.draw(st.sampled_from(sorted(played.cpus))))
        elif event == "others" and others:
            played.remove(others.pop())
        elif event == "others":
            played.cpus[name := next(names)] = 2
            played.groups.append(Group(played, 2, [name] * 2))
            others.append(played.groups[-1])
        played.settle()

    def work() -> None:
        assert placement.ranks == len(placement.bundles) and set(placement.node_ids) <= played.cpus.keys()
        held = [group for group in played.groups if group not in others]
        assert held == placement.groups and all(group.nodes is not None for group in held)
        for _ in range(6):
            played.clock += places.WAIT_S
            for _ in range(data.draw(st.integers(1, 3))):
                step()
            move = placement.look()
            if move is not None:
                if move.going:
                    assert move.going == played.going & set(placement.node_ids) and move.going
                else:
                    assert placement.more is not None and placement.more.ranks in CHOICES and placement.more.group.nodes
                    assert placement.more.ranks > placement.ranks and not played.going & set(placement.node_ids)
                    sizes.append(placement.more.ranks)
                raise Moved(move, "after step 1")
            assert not played.going & set(placement.node_ids), "it does not see that a node is to go"
            answered = placement.more is not None and placement.more.group.nodes is not None
            assert placement.ranks == CHOICES[0] or not answered, "it has places and does not move"

    with Placement(cluster(), CHOICES, said.append) as placement:
        sizes = [placement.ranks]
        try:
            placement.fill(work)
        except Moved as moved:
            assert moved.move.going
        assert sizes == sorted(set(sizes)) and placement.ranks == sizes[-1]
    assert [group for group in played.groups if group not in others] == [], "places that nobody frees"


def test_places_that_are_lost_before_the_ranks_are_there_are_none(played: Cloud) -> None:
    played.cpus = {"a": 2}
    with Placement(cluster(ranks=2), (2, 1), list[str]().append) as placement:
        assert placement.ranks == 2
    played.cpus = {"a": 1}
    lost: list[Move] = []

    def work() -> None:
        played.clock += places.WAIT_S
        assert placement.look() is None, "there is no room"
        played.cpus["b"] = 1
        played.settle()
        played.clock += places.WAIT_S
        move = placement.look()
        assert move is not None and move.why == "there are places for 2 trainer ranks"
        lost.append(move)
        del played.cpus["b"]
        played.settle()
        raise Moved(move, "after step 1")

    with Placement(cluster(ranks=2), (2, 1), list[str]().append) as placement, pytest.raises(Moved):
        placement.fill(work)
    assert len(lost) == 1 and placement.ranks == 1 and played.groups == []


def test_a_run_on_its_own_machine_has_nowhere_to_go(played: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    played.cpus = {"a": 4}
    with Placement(cluster(address=None), CHOICES, list[str]().append) as placement:
        monkeypatch.setattr(places, "nodes_going", lambda: pytest.fail("nobody is asked"))
        played.clock += 9.0
        assert placement.look() is None
