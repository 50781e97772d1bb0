"""Ray: starts it, calls the processes of a run, and names the one that died.

The driver calls the same method on all ranks and waits for all answers. A rank that dies ends the attempt with `ProcessLost`,
which names it; `supervise` then starts the next attempt from the last checkpoint. Only actors that were made here are ever
killed.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from kernels.errors import UserError
from trainer.config.run import ClusterConfig
from trainer.guard import UpdateRefused
from trainer.hangs import CUT_OFF, TIMED_OUT, gave_up, report
from trainer.places import WAIT_S, Say, nodes_alive
from trainer.ports import listens, why_taken
from trainer.run_dir import shown
from trainer.stopping import Moved, Stopped, StopRequest

T = TypeVar("T")
MAX_AUTO_RANKS = 2
LOOK_S = 0.5  # in which an idle process answers; one that is busy does not, and is there
ANSWER_S = 10.0  # in which a head node answers, from anywhere
GOING_S = 15.0  # in which what a killed run has left on this machine notices, and ends
LOOPBACK = "127.0.0.1"
SENTENCE_END = re.compile(r"[.:]?\n|\. ")
GONE = "its connection broke, so it was killed, crashed, or its machine is lost or had no memory left"


class ProcessLost(RuntimeError):
    """A process of the run died; the message names it."""


# ---------------------------------------------------------------- Ray itself


def start_ray(config: ClusterConfig, places: int, say: Say) -> None:
    """Starts Ray for this run on `config.host` only, with a CPU at least for each of `places`, or joins the running cluster at
    `config.address`.

    Raises:
        UserError: no cluster answers at the address, or Ray does not start here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 starves the ranks beside any other program
    # Otherwise Ray starts an idle process for each CPU, which no rank or engine takes: theirs have an environment of their own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray_worker.print_to_stdstream = partial(_say_of_ray, say)  # which it calls with what its own processes report
    if config.address is not None:
        _join(config, _address(config.address), common, say)
        return
    if config.host == LOOPBACK:
        # Ray replaces a loopback address by the machine's own and then listens on all interfaces, unless it believes that
        # clusters are impossible here, as it does on a Mac. The variable tells its child processes, the constant this one.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
    say("starting Ray on this machine")
    try:
        ray.init(
            address="local",  # never one that somebody else has started on this machine
            num_cpus=max(places + 1, os.cpu_count() or 1),
            include_dashboard=config.dashboard,
            dashboard_host=config.host,
            dashboard_port=config.dashboard_port if config.dashboard else None,
            object_store_memory=config.object_store_mib * 2**20,
            _node_ip_address=config.host,
            **common,
        )
    except Exception as error:
        if type(error) is not Exception:  # what Ray raises where its processes do not come up, by itself
            raise
        raise UserError(
            f"Ray does not start on this machine: {SENTENCE_END.split(str(error), maxsplit=1)[0]}. Look for what takes its "
            "processors, memory or /tmp, then try again; Ray's logs are in /tmp/ray/session_latest/logs"
        ) from error


def _say_of_ray(say: Say, report: Mapping[str, Any], ignore_prefix: bool) -> None:
    """The first sentence of each of Ray's paragraphs. That a process of ours died is said, with its name, by who asked it."""
    for paragraph in report["lines"]:
        sentence = SENTENCE_END.split(paragraph.strip(), maxsplit=1)[0]
        if not sentence.startswith("A worker died or was killed"):
            say(f"Ray: {sentence}")


def _address(asked: str) -> str:
    """host:port of a cluster; `auto` is what RAY_ADDRESS says, or else the last one that was started on this machine."""
    try:
        address = canonicalize_bootstrap_address_or_die(asked)
        if not address.rpartition(":")[2].isdecimal():
            raise ValueError(f"Invalid address format: {address}")
    except (ConnectionError, ValueError) as error:
        why = SENTENCE_END.split(str(error), maxsplit=1)[0]
        raise UserError(
            f"cluster.address={asked} leads to no Ray cluster: {why}. Name one as host:port, start one, or use cluster=local"
        ) from None
    return address


def _join(config: ClusterConfig, address: str, common: dict[str, Any], say: Say) -> None:
    say(f"joining the Ray cluster at {address}")
    started = time.monotonic()
    while config.nodes and not listens(address):  # they are being started; otherwise a cluster is there or not
        _wait_a_little(started, config.start_timeout_s, f"Ray's head node at {address}", say)
    if not listens(address, ANSWER_S):  # Ray itself asks for a quarter of an hour
        raise UserError(
            f"nothing listens at {address}, where cluster.address={config.address} leads: the cluster has ended, or a firewall "
            "is between. Start one, name another, or use cluster=local"
        )
    try:
        ray.init(address=address, **common)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster lets this driver in at cluster.address={config.address} ({address}): {error}. Start one, or use "
            "cluster=local; a cluster that asks for a token needs RAY_AUTH_MODE=token and its token here too"
        ) from None
    if not is_token_auth_enabled():
        say("this cluster requires no token: anyone who reaches Ray can run programs; RAY_AUTH_MODE=token requires one")
    wanted = set(config.nodes or ())
    while missing := sorted(wanted - nodes_alive().keys()):
        there = f"{len(wanted) - len(missing)} of {len(wanted)} nodes are there"
        _wait_a_little(started, config.start_timeout_s, f"{', '.join(missing)}; {there}", say)


def _wait_a_little(started: float, timeout_s: float, what: str, say: Say) -> None:
    """Says what is waited for; raises Stopped after `timeout_s`, because other machines may do better."""
    waited = time.monotonic() - started
    if waited > timeout_s:
        raise Stopped(f"still waiting for {what} after {waited:.0f} s (cluster.start_timeout_s)")
    say(f"waiting for {what} ({waited:.0f} s)")
    time.sleep(WAIT_S)


def check_cluster(config: ClusterConfig, ranks: int, apart: int = 0) -> None:
    """Raises UserError if no cluster can be had, this machine has too few GPUs for `ranks` and `apart` engines on GPUs of their
    own, or the dashboard's port is taken; before anything is written or started."""
    if config.slurm is not None and config.address is None:
        raise UserError("cluster=slurm is for `python -m launch.submit`, which starts this command inside a SLURM job")
    gpus = torch.cuda.device_count()
    if config.address is None and 0 < gpus < ranks + apart:
        raise UserError(f"{_asked(ranks, apart)}, and this machine has {gpus}; {_way_out(apart)}")
    if config.dashboard and config.address is None:
        require_port(config.host, config.dashboard_port, "cluster.dashboard_port", "cluster.dashboard=false")


def require_port(host: str, port: int, option: str, without: str) -> None:
    """Raises UserError unless this process could listen at `port` of this machine, where `option` has something listen;
    `without` is what a person sets to do without it. Waits for what a killed run has left there, if it goes by itself."""
    deadline = time.monotonic() + GOING_S
    while (taken := why_taken(host, port)) is not None:
        if taken != os.strerror(errno.EADDRINUSE) or time.monotonic() > deadline:
            raise UserError(f"port {port} of {option} on {host} is not available ({taken}); choose another, or set {without}")
        time.sleep(0.2)


def rank_choices(config: ClusterConfig, ranks: int, check: Callable[[int], None]) -> tuple[int, ...]:
    """How many ranks the run may go on with: `ranks`, then fewer, down to `cluster.min_ranks`, that pass `check`.

    Raises:
        UserError: `ranks` does not pass, or is less than min_ranks.
    """
    check(ranks)
    if (config.min_ranks or 0) > ranks:
        raise UserError(f"cluster.min_ranks ({config.min_ranks}) is larger than the number of ranks ({ranks}); lower it")
    choices = [ranks]
    for fewer in range(ranks - 1, (config.min_ranks or ranks) - 1, -1):
        with suppress(UserError):
            check(fewer)
            choices.append(fewer)
    return tuple(choices)


def choose_ranks(config: ClusterConfig, apart: int = 0) -> int:
    """How many ranks train: as asked, or one for each GPU of this machine (at most 2), or 2 on CPUs; in a SLURM job one for
    each of its GPUs, or for each of its nodes. `apart` engines have GPUs of their own, which are no rank's.

    Raises:
        UserError: the ranks do not divide evenly over the nodes, or there are too few GPUs.
    """
    slurm = config.slurm
    nodes = slurm.nodes if slurm is not None else len(config.nodes or ("here",))
    gpus = nodes * slurm.gpus_per_node if slurm is not None else torch.cuda.device_count()
    if config.ranks != "auto":
        if config.ranks % nodes and not apart:
            raise UserError(f"cluster.ranks ({config.ranks}) does not divide evenly over {nodes} nodes; change either")
        if slurm is not None and 0 < gpus < config.ranks + apart:
            raise UserError(
                f"{_asked(config.ranks, apart)}, and the job has {gpus} (cluster.slurm.nodes={nodes} x "
                f"gpus_per_node={slurm.gpus_per_node}); ask for more, or {_way_out(apart)}"
            )
        return config.ranks
    if slurm is None and config.address is not None:
        apart = 0  # other machines have GPUs for them
    if 0 < gpus <= apart:
        raise UserError(f"{_asked(1, apart)} at least, and there are {gpus}; {_way_out(apart)}")
    if slurm is not None:
        return gpus - apart if gpus else nodes
    return min(gpus - apart, MAX_AUTO_RANKS) if gpus else MAX_AUTO_RANKS


def _asked(ranks: int, apart: int) -> str:
    if not apart:
        return f"cluster.ranks={ranks} needs as many GPUs"
    return f"cluster.ranks={ranks} and rollout.engines={apart} with rollout.placement=separate need {ranks + apart} GPUs"


def _way_out(apart: int) -> str:
    return "lower either, or let them share GPUs with rollout.placement=colocated" if apart else "lower it"


# ---------------------------------------------------------------- calling processes


def gather(calls: dict[str, ray.ObjectRef], logs: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """The answers of named processes, in the order given. `logs` are those of processes that meet in collectives.

    Raises:
        ProcessLost: one died, named, also when another only saw its connection break; or a collective did not end in time.
        Exception: what a process raised itself; what is told in words (UserError, UpdateRefused) as it was raised.
    """
    pending = {ref: name for name, ref in calls.items()}
    failures: dict[str, RayTaskError] = {}
    answers: dict[str, Any] = {}
    while pending:
        # After a first failure the others have a moment to show who really died; they may also hang in a collective.
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=10 if failures else None)
        if not ready:
            break
        name = pending.pop(ready[0])
        try:
            answers[name] = ray.get(ready[0])
        except RayActorError as error:
            # One that has waited too long is ended by NCCL's watchdog: not that one is lost, but the one it waited for.
            if logs and name in logs and gave_up(logs[name]):
                raise ProcessLost(report(logs)) from error
            log = f"; its log is {shown(logs[name])}" if logs and name in logs else ""
            raise ProcessLost(f"{name} died ({reason_of(error)}{log})") from error
        except RayTaskError as error:
            failures[name] = error
    for name, failure in failures.items():
        late = isinstance(failure.cause, RuntimeError) and TIMED_OUT.search(str(failure.cause))
        if logs and (late or (name in logs and gave_up(logs[name]))):
            raise ProcessLost(report(logs)) from failure
    for name, failure in failures.items():
        if logs and isinstance(failure.cause, RuntimeError) and CUT_OFF.search(str(failure.cause)):
            raise ProcessLost(f"{name} lost its connection to another rank, which does not say why") from failure
        raise told_by(failure)
    return {name: answers[name] for name in calls}


def told_by(error: RayTaskError) -> Exception:
    """What a process raised: what is told in words as it was raised, the rest with its traceback."""
    return error.cause if isinstance(error.cause, UserError | UpdateRefused) else error.as_instanceof_cause()


def reason_of(error: RayActorError) -> str:
    """The telling part of Ray's paragraph, or what it means."""
    if isinstance(error, ActorUnavailableError):
        return GONE
    detail = re.search(r"exit detail: ([^.]+)", str(error))
    if detail and detail[1].startswith("Worker unexpectedly exits with a connection error"):
        return GONE
    lines = str(error).strip().splitlines()
    return detail[1] if detail else lines[-1 if error.actor_init_failed else 0][:200]


class Processes:
    """Actors that are asked for the same thing together. `logs` of those that meet in collectives tell who did not come."""

    def __init__(self, actors: dict[str, Any], logs: Mapping[str, Path] | None = None) -> None:
        self.actors, self.logs = actors, logs

    def __len__(self) -> int:
        return len(self.actors)

    def call(self, method: str, *args: Any) -> list[Any]:
        """`method(*args)` on all of them at once; large arguments travel once."""
        refs = [ray.put(a) if _is_large(a) else a for a in args]
        calls = {name: getattr(a, method).remote(*refs) for name, a in self.actors.items()}
        return list(gather(calls, self.logs).values())

    def call_first(self, method: str, *args: Any) -> Any:
        """`method(*args)` on the first one only."""
        name, actor = next(iter(self.actors.items()))
        return gather({name: getattr(actor, method).remote(*args)})[name]

    def require_alive(self) -> None:
        """Raises ProcessLost if one is dead."""
        calls = {name: actor.pid.remote() for name, actor in self.actors.items()}
        ready = ray.wait(list(calls.values()), num_returns=len(calls), timeout=LOOK_S)[0] if calls else []
        gather({name: ref for name, ref in calls.items() if ref in ready})


def _is_large(value: Any) -> bool:
    return not isinstance(value, (int, float, str, bool, Path, type(None)))


# ---------------------------------------------------------------- surviving


def run_attempts(
    config: ClusterConfig,
    places: int,
    attempt: Callable[[], None],
    began: Callable[[], int],
    stop: StopRequest,
    bring_to_disk: Callable[[], None],
    say: Say,
) -> None:
    """Starts Ray for this many places, runs `attempt` until it ends without a lost process, and stops Ray, however it went.

    `began`: the step after which the newest attempt went on. `bring_to_disk`: before Ray goes where the run is to go on later.
    """

    def unless_stopped() -> None:
        stop.obey("before another attempt")
        attempt()

    # Ray prints what a handler raises while it starts here, and starts all the same.
    starting = stop.deferred("Ray, which is being started") if config.address is None else nullcontext()
    try:
        with stop.plainly():
            with starting:
                start_ray(config, places, say)
            stop.listen()
            supervise(unless_stopped, began, config.max_restarts, say)
    except Stopped:
        # A second signal comes too late to change anything, except for a second Ctrl-C.
        with stop.deferred("the newest checkpoint in memory, which goes to the disk"):
            bring_to_disk()
        raise
    finally:
        ray.shutdown()  # ends the cluster that was started here; of another one it only takes leave


def supervise(attempt: Callable[[], T], began: Callable[[], int], max_restarts: int, say: Say) -> T:
    """Runs `attempt` again after a lost process, and whenever it has to move.

    After losses at most `max_restarts` times in a row without a newer checkpoint: a long run has any number of them, and one
    that gets no further ends.
    """
    restarts, newest = 0, began()
    while True:
        try:
            return attempt()
        except Moved as moved:
            say(str(moved))
        except ProcessLost as error:
            if began() > newest:
                restarts, newest = 0, began()
            if restarts == max_restarts:
                raise ProcessLost(
                    f"{error}; cluster.max_restarts={max_restarts} is used up without a newer checkpoint"
                ) from error
            restarts += 1
            say(f"{error}; restart {restarts} of {max_restarts} from the last checkpoint")
