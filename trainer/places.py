"""Where the processes of a run are placed, as a Ray placement group, and messages while there is no place.

Ranks are placed with what they need of a node; engines of RL share the places of the ranks, or have places of their own. If a
cluster loses nodes, the run waits for others, or goes on with fewer ranks where that is allowed. If it grows, there are places
for further engines, and for ranks that the run had to do without. If it announces that a node will go, as spot machines do, the
ranks leave it first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import ray
import torch
from ray._private import state as ray_state
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kernels.errors import UserError
from parallel.addresses import require_reachable
from trainer.config.run import ClusterConfig
from trainer.run_dir import REPOSITORY
from trainer.stopping import Move, Moved, Stopped

Say = Callable[[str], None]
NAMES_TIMEOUT_S = 30.0
WAIT_S = 2.0  # between two looks at who is there
SHOWN_NODES = 8  # by name in a message
ANSWER_S = 30.0  # in which a living node starts a process and answers


def python_path() -> str:
    """For processes that Ray starts: this repository before what their command was given."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))


def _nodes() -> list[dict[str, Any]]:
    """Those that Ray believes to be alive, and of which it does not know that they are to go: on these it places nothing."""
    going = nodes_going()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]


def nodes_alive() -> dict[str, str]:
    """Name -> address of these."""
    return {node["NodeName"]: node["NodeManagerAddress"] for node in _nodes()}


def nodes_going() -> frozenset[str]:
    """The ids of nodes that are to end, as its autoscaler, `ray drain-node` or a SIGTERM to `ray start` has told Ray."""
    return frozenset(ray_state.state.get_draining_nodes())


def _probe(**where: Any) -> ray.ObjectRef:
    """An answer of a process there, once it can start; the function is defined in here so that it need not import ours."""

    def answer() -> bool:
        return True

    return ray.remote(answer).options(num_cpus=0, **where).remote()


def require_nodes(names: Sequence[str]) -> list[str]:
    """The addresses of these nodes, after a process on each has answered.

    Raises:
        Stopped: one is gone, named. Ray takes a while to find out; an actor that is placed there meanwhile waits for ever.
    """
    found = nodes_alive()
    calls = {_probe(resources={f"node:{found[name]}": 0.001}): name for name in names if name in found}
    silent, deadline = list(calls), time.monotonic() + ANSWER_S
    while silent and set(names) <= nodes_alive().keys() and time.monotonic() < deadline:
        _, silent = ray.wait(silent, num_returns=len(silent), timeout=WAIT_S)
    lost = set(names) - (found.keys() & nodes_alive().keys()) or {calls[call] for call in silent}
    if lost:
        raise Stopped(f"{', '.join(sorted(lost))} of the {len(names)} nodes {'do' if len(lost) > 1 else 'does'} not answer")
    return [found[name] for name in names]


@cache
def _has_gpus(address: str | None) -> bool:
    """Whether ranks run on GPUs. Seen once: a cluster that has lost all of them is waited for."""
    return torch.cuda.is_available() if address is None else "GPU" in ray.cluster_resources()


def seats(nodes: Sequence[str], ranks: int) -> tuple[list[int], list[int]]:
    """(the places of the ranks, the places that are left), by the node of every place.

    Consecutive ranks share a node. As few nodes as can be get equally many each; where no number divides so, nodes are filled
    one after another.
    """
    by_node: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        by_node.setdefault(node, []).append(place)
    fullest = sorted(by_node.values(), key=len, reverse=True)
    for each in range(len(fullest[0]), 0, -1):
        taken, rest = divmod(ranks, each)
        if not rest and taken <= len(fullest) and len(fullest[taken - 1]) >= each:
            chosen = [place for places in fullest[:taken] for place in places[:each]]
            break
    else:
        chosen = [place for places in fullest for place in places][:ranks]
    return chosen, [place for places in by_node.values() for place in places if place not in chosen]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


@dataclass(frozen=True)
class _More:
    """Places that were asked for so that the run has `ranks`."""

    ranks: int
    group: PlacementGroup
    answers: list[ray.ObjectRef]  # of a process in each, which comes once it is there


class Placement:
    """A bundle, which is a place, for each trainer rank; engines share them in turn, or have as many of their own where they
    are `separate`. Freed at the end of the `with` block.

    `cluster.nodes` get equally many places each, and ranks take them as `seats` says. `choices`: how many ranks there may be,
    the number that is wanted first; with less room for longer than `cluster.shrink_after_s`, as many of them as have a place.
    Of separate engines `min_engines` are enough to begin with: the others get places when they are asked for and there is room.
    With fewer ranks than are wanted, Ray is asked for the places that are missing: `look`, `fill`.
    """

    def __init__(
        self,
        config: ClusterConfig,
        choices: Sequence[int],
        say: Say,
        engines: int = 0,
        separate: bool = False,
        min_engines: int | None = None,
    ) -> None:
        self.config, self.ranks, self.engines, self.separate = config, choices[0], engines, separate
        self.choices, self._say = tuple(choices), say
        self.elastic = min_engines is not None
        self.first_engines = engines if min_engines is None else min_engines
        self.later: dict[int, PlacementGroup] = {}  # of engines that are not among the first, each a group of its own
        self.actors: dict[str, Any] = {}
        self.on_gpu = _has_gpus(config.address)
        self.nodes = require_nodes(config.nodes) if config.nodes else []
        self.more: _More | None = None
        self._looked = time.monotonic()
        self.group = self._reserve()
        self._wait(choices, say)
        self.groups = [self.group]
        self._seat()

    def _seat(self) -> None:
        """Says which of the places that the groups hold are those of ranks, and which of engines.

        Raises:
            UserError: their nodes do not reach each other.
        """
        known = {node["NodeID"]: (node["NodeName"], node["NodeManagerAddress"]) for node in ray.nodes()}
        self.places, nodes = list[PlacementGroupSchedulingStrategy](), list[str]()
        for group in self.groups:
            node_of = placement_group_table(group)["bundles_to_node_id"]
            self.places += [PlacementGroupSchedulingStrategy(group, index) for index in range(len(node_of))]
            nodes += [node_of[index] for index in range(len(node_of))]
        require_reachable(dict(known[node] for node in nodes))
        self.bundles, left = seats(nodes, self.ranks)  # of ranks
        self.engine_bundles = left if self.separate else self.bundles
        self.node_ids = [nodes[bundle] for bundle in self.bundles]  # of ranks
        self.hosts = [known[node][1] for node in self.node_ids]  # of ranks

    def _places(self, ranks: int) -> int:
        return ranks + self.first_engines * self.separate

    def _reserve(self) -> PlacementGroup:
        nodes, bundle, places = self.nodes, self._bundle(self.ranks), self._places(self.ranks)
        pinned = [{f"node:{nodes[index * len(nodes) // places]}": 0.001} if nodes else {} for index in range(places)]
        return placement_group([bundle | pin for pin in pinned], strategy="PACK")

    def _bundle(self, ranks: int) -> dict[str, float]:
        """What a place is of its node: of one of this many ranks with the engines that share it, or of either by itself."""
        bundle = {"CPU": 1.0 if self.separate else 1.0 + -(-self.engines // ranks) * 0.01}
        if self.on_gpu:
            bundle["GPU"] = 1.0
        if self.config.gpu_type is not None:
            bundle[f"accelerator_type:{self.config.gpu_type}"] = 0.001
        return bundle

    def _room(self, ranks: int) -> int:
        """How many places for this many ranks the nodes that are alive have, in use or not."""
        found = [node["Resources"] for node in _nodes()]
        return sum(min(int(one.get(kind, 0.0) / amount) for kind, amount in self._bundle(ranks).items()) for one in found)

    def _wait(self, choices: Sequence[int], say: Say) -> None:
        started = time.monotonic()
        while not (self.group.wait(WAIT_S) and self._answers()):
            waited, room = time.monotonic() - started, self._room(self.ranks)
            state = f"{self._places(choices[0])} wanted, {self._found(room)}"
            fewer = [ranks for ranks in choices if self._places(ranks) <= self._room(ranks)]
            if fewer and fewer[0] != self.ranks and waited > self.config.shrink_after_s:
                remove_placement_group(self.group)
                self.ranks = fewer[0]
                say(f"going on with {_counted(self.ranks, 'trainer rank')} (cluster.min_ranks): {state}")
                self.group = self._reserve()
            else:
                say(f"waiting for a place for {self.processes} ({waited:.0f} s): {state}")
            if waited > self.config.start_timeout_s:
                remove_placement_group(self.group)
                fewer_engines = (" or rollout.min_engines" if self.elastic else " or rollout.engines") * self.separate
                raise UserError(
                    f"no place for the run after {waited:.0f} s: {state}. Add nodes, lower cluster.ranks{fewer_engines}, allow "
                    "fewer with cluster.min_ranks, or wait for other runs to end"
                )

    def _answers(self) -> bool:
        """Whether a process in each place answers; if not, other places are looked for.

        Ray takes a while to find out that a node is gone, and an actor that it places there meanwhile waits for ever.
        """
        if self.config.address is None or self.nodes:  # this machine, or nodes that have answered
            return True
        places = [PlacementGroupSchedulingStrategy(self.group, index) for index in range(self._places(self.ranks))]
        calls = [_probe(scheduling_strategy=place) for place in places]
        silent, alive, deadline = calls, nodes_alive(), time.monotonic() + ANSWER_S
        while silent and nodes_alive() == alive and time.monotonic() < deadline:
            _, silent = ray.wait(calls, num_returns=len(calls), timeout=WAIT_S)
        try:
            return not silent and all(ray.get(calls))
        except RayError:  # a node is lost right now
            silent = calls
        finally:
            if silent:
                remove_placement_group(self.group)
                self.group = self._reserve()
        return False

    def _found(self, room: int) -> str:
        """What there is, for a person who looks for what is missing or taken."""
        names, free = sorted(nodes_alive()), ray.available_resources()
        nodes = ", ".join(names[:SHOWN_NODES]) + (f" and {len(names) - SHOWN_NODES} more" if len(names) > SHOWN_NODES else "")
        bundle = self._bundle(self.ranks)
        each = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
        left = " and ".join(f"{free.get(kind, 0.0):g} {kind}" for kind in bundle)
        who = "a rank or an engine" if self.separate else "a rank"
        return f"room for {room} on the nodes that are alive ({nodes}); {who} takes {each}, free are {left}"

    @property
    def processes(self) -> str:
        """In words."""
        ranks, engines = _counted(self.ranks, "trainer rank"), _counted(self.engines, "engine")
        engines = engines if self.first_engines == self.engines else f"{self.first_engines} to {engines}"
        return f"{ranks} and {engines}{' in places of their own' * self.separate}" if self.engines else ranks

    def actor(self, kind: type, name: str, index: int, *args: Any) -> Any:
        """An actor of class `kind` named `name`, rank or engine `index`, in its place; of a GPU that they share ranks get the
        larger half.

        One that has the name already is ended first.
        """
        self._end([name] if name in self.actors else [])
        is_engine, alone = not name.startswith("trainer/"), self.separate or not self.engines
        gpu_share = 1.0 if alone else 0.4 / -(-self.engines // self.ranks) if is_engine else 0.6
        beside = self.ranks + self.engines if self.separate else self.engines if is_engine else self.ranks
        asked = self.config.threads_per_rank
        threads = max(1, (os.cpu_count() or 1) // beside) if asked == "auto" else asked
        self.actors[name] = (
            ray.remote(kind)
            .options(
                name=name,
                num_cpus=1 if alone or not is_engine else 0.01,
                num_gpus=gpu_share if self.on_gpu else 0.0,
                scheduling_strategy=self._place(index, is_engine),
                runtime_env={"env_vars": self._environment(threads)},
            )
            .remote(*args)
        )
        return self.actors[name]

    def ask(self, name: str, index: int) -> ray.ObjectRef:
        """What answers as soon as there is a place for engine `index`: one of the first, or one that the cluster gets room for.

        It ends an engine that has the name. Nobody waits here: Ray keeps the request, looks for another place when the node of
        this one is lost, and tells its autoscaler, where there is one, that a node is wanted.
        """
        if name in self.actors:
            ray.kill(self.actors[name])
        if index >= self.first_engines and index not in self.later:
            self.later[index] = placement_group([self._bundle(self.ranks)])
        return _probe(scheduling_strategy=self._place(index, is_engine=True), max_retries=-1)

    def give_up(self, name: str, index: int) -> None:
        """Ends an engine that is not to come back, and frees its place unless it was one of the first."""
        self._end([name] if name in self.actors else [])
        if index in self.later:
            remove_placement_group(self.later.pop(index))

    def _place(self, index: int, is_engine: bool) -> PlacementGroupSchedulingStrategy:
        if is_engine and index in self.later:
            return PlacementGroupSchedulingStrategy(self.later[index], placement_group_bundle_index=0)
        bundles = self.engine_bundles if is_engine else self.bundles
        return self.places[bundles[index % len(bundles)]]

    # ------------------------------------------------------------ when the cluster changes

    def look(self) -> Move | None:
        """Why the ranks should start again, if so: a node of theirs will go, or there are places for more of them.

        Between two steps; it looks every few seconds. More places are held before anybody moves, and stay so. With
        `cluster.nodes` there is nowhere to go, and the run stops.
        """
        if self.config.address is None or time.monotonic() < self._looked + WAIT_S:
            return None
        self._looked = time.monotonic()
        if going := nodes_going() & set(self.node_ids):
            names = sorted(node["NodeName"] for node in ray.nodes() if node["NodeID"] in going)
            why = f"{', '.join(names)} will go, with ranks"
            return Move(why, going, elsewhere=not self.nodes)
        if self.ranks != self.choices[0] and self._has_more():
            assert self.more is not None
            return Move(f"there are places for {_counted(self.more.ranks, 'trainer rank')}", frozenset())
        return None

    def _has_more(self) -> bool:
        """Whether places for more ranks are held and answer.

        For as many as the nodes have room; with room for no more than now for all that are wanted, as Ray's autoscaler is told.
        """
        fitting = [ranks for ranks in self.choices if ranks > self.ranks and self._places(ranks) <= self._room(ranks)]
        ranks = max(fitting, default=self.choices[0])
        if self.more is not None and (self.more.ranks != ranks or not self._as_promised(self.more)):
            self._forget_more()
        if self.more is None:
            self._say(f"asking Ray for places for {_counted(ranks - self.ranks, 'more trainer rank')}")
            group = placement_group([self._bundle(ranks)] * (ranks - self.ranks), strategy="PACK")
            places = [PlacementGroupSchedulingStrategy(group, index) for index in range(ranks - self.ranks)]
            self.more = _More(ranks, group, [_probe(scheduling_strategy=place, max_retries=-1) for place in places])
        answers = self.more.answers
        return len(ray.wait(answers, num_returns=len(answers), timeout=0)[0]) == len(answers)

    def _as_promised(self, more: _More) -> bool:
        """Whether none of these places was lost after it had answered."""
        answered, _ = ray.wait(more.answers, num_returns=len(more.answers), timeout=0)
        try:
            ray.get(answered)
        except RayError:
            return False
        return len(answered) < len(more.answers) or placement_group_table(more.group)["state"] == "CREATED"

    def _forget_more(self) -> None:
        if self.more is not None:
            remove_placement_group(self.more.group)
            self.more = None

    def fill(self, work: Callable[[], None]) -> None:
        """Does `work`, which starts ranks and engines here; again with more ranks, whenever it has moved for those.

        Raises:
            Moved: not for those, or they are lost again.
        """
        while True:
            try:
                return work()
            except Moved as moved:
                if moved.move.going or self.more is None or not self._as_promised(self.more):
                    raise
                self._say(str(moved))
            self._end(list(self.actors))
            self.ranks, self.groups = self.more.ranks, [*self.groups, self.more.group]
            self.more = None
            self._seat()

    def _environment(self, threads: int) -> dict[str, str]:
        environment = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if not self.on_gpu:
            environment["DS_ACCELERATOR"] = "cpu"
        return environment

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end(list(self.actors))
        self._forget_more()
        for group in (*self.groups, *self.later.values()):
            remove_placement_group(group)

    def _end(self, names: Sequence[str]) -> None:
        for name in names:
            ray.kill(self.actors.pop(name))
        # The next ones use the same names, and Ray takes a moment to give them back.
        deadline = time.monotonic() + NAMES_TIMEOUT_S
        while set(names) & set(ray.util.list_named_actors()) and time.monotonic() < deadline:
            time.sleep(0.05)
