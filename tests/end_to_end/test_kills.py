"""Processes of every role of RL are killed at random moments, or its nodes come and go, and the run learns what an undisturbed
one learns, bit for bit.

So it has seen the same data: no prompt is lost, none is learned twice.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from tests.end_to_end.commands import REPOSITORY, WAIT_S, finish, records, series, start, untrained, wait_for_text
from tests.end_to_end.kills import APART, SEED, kill_at_random, shuffled
from tests.end_to_end.ray_cluster import RayCluster
from trainer.stopping import REQUEUE

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
ROLES = shuffled(["driver", "trainer/0", "engine/0", "reward/0"])
ROUNDS = APART * (len(ROLES) + 1)
EXACT = ("reward/mean", "reward/eval_mean", "train/loss", "train/grad_norm", "rollout/new_tokens", "rollout/length_mean")
OPTIONS = [
    *("experiment=smoke", "rollout=sync", "warmup=none", "task.name=tests.rl.scorers:Letters", "task.options={}"),
    *(f"loop.rounds={ROUNDS}", "logger.wandb=off", "rollout.max_new_tokens=12", "rollout.groups=3"),
    *("loop.checkpoint_every=2", "loop.memory_checkpoint_every=1", "loop.eval_every=3", "loop.sequence_length=64"),
    *("parallel.policy=hecate", "parallel.overlap=2", "parallel.memory=2"),  # plans that do not depend on measured times
    # Threads add up a norm in another order, and a rank with engines in places of their own gets fewer of them.
    *("cluster.ranks=1", "cluster.threads_per_rank=1", f"cluster.max_restarts={len(ROLES)}"),
]
pytestmark = pytest.mark.timeout(600 + 90 * len(ROLES))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where they go, beside the model that they begin with, which is for CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield tmp_path_factory.mktemp("kills") / "runs"


@pytest.fixture(scope="module")
def options(runs: Path) -> list[str]:
    """Of all runs; the model that they begin with knows nothing."""
    checkpoint = untrained(runs.parent)
    return [f"checkpoint={checkpoint}", f"runs_dir={runs}", *OPTIONS]


@pytest.fixture(scope="module")
def whole(runs: Path, options: list[str]) -> Path:
    """A run that nothing happens to."""
    finish(start("rl", *options, "rollout.engines=2", "run_name=whole"), timeout_s=300 + 30 * len(ROLES))
    assert all(record["train/grad_norm"] > 0 for record in records(runs / "whole")[1:]), "there was something to learn"
    return runs / "whole"


def require_the_same(whole: Path, disturbed: Path, context: str) -> None:
    """In every round."""
    expected, found = records(whole), records(disturbed)
    assert [record["step"] for record in found] == [record["step"] for record in expected] == list(range(ROUNDS + 1)), context
    for one, other in zip(expected, found, strict=True):
        told = [key for key in EXACT if key in one]
        assert {key: other[key] for key in told} == {key: one[key] for key in told}, f"round {one['step']}, {context}"


def test_rl_whose_driver_rank_engine_and_scorer_are_killed_learns_the_same(runs: Path, options: list[str], whole: Path) -> None:
    command = ["rl", *options, "resume=auto", "run_name=killed"]
    more = [*command, "rollout.engines=3", "rollout.placement=separate"]  # resumed with more engines, and elsewhere
    said = kill_at_random([*command, "rollout.engines=2"], runs / "killed", ROLES, again=more)
    context = f"TESSERA_KILLS_SEED={SEED}: {', '.join(ROLES)}\n{said}"
    require_the_same(whole, runs / "killed", context)
    assert said.count("trainer/0 died") == ROLES.count("trainer/0"), context
    assert ("1 trainer rank and 3 engines in places of their own" in said) == ("driver" in ROLES), context
    assert ("engine/0 died" in said) == ("engine/0" in ROLES), context


# ---------------------------------------------------------------- as a job on a cluster that grows and shrinks


@pytest.fixture(scope="module")
def cluster(runs: Path) -> Iterator[tuple[RayCluster, str]]:
    """A head as in the example, with the token that the page has a person make; and where it takes jobs."""
    with pytest.MonkeyPatch.context() as patch, RayCluster(runs.parent / "ray", patch) as cluster:
        patch.delenv("RAY_AUTH_TOKEN")
        with pytest.MonkeyPatch.context() as home:
            home.setenv("HOME", str(runs.parent))
            subprocess.run([*RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(runs.parent / ".ray" / "auth_token"))
        address = cluster.start_example_head("head")
        deadline = time.monotonic() + WAIT_S
        while not takes_jobs(address, runs.parent / "first_job.log"):
            assert time.monotonic() < deadline, "no agent of the head takes jobs"
        yield cluster, address


def takes_jobs(address: str, log: Path) -> bool:
    """A head answers before the agent that starts jobs is there."""
    with open(log, "w") as out:
        command = [*RAY, "job", "submit", "--address", address, "--", "true"]
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
    assert code == 0 or "No available agent" in log.read_text(), log.read_text()
    return code == 0


def submitted(address: str, log: Path, *command: str) -> subprocess.Popen[bytes]:
    """As docs/clusters.md has it, but that it is waited for."""
    entrypoint = ["env", "-C", str(REPOSITORY), sys.executable, "-m", *command]
    with open(log, "w") as out:
        submit = [*RAY, "job", "submit", "--address", address, "--", *entrypoint]
        return subprocess.Popen(submit, stdout=out, stderr=subprocess.STDOUT)


def test_a_job_that_fails_says_why_and_has_an_exit_code(cluster: tuple[RayCluster, str], runs: Path) -> None:
    log = runs.parent / "failing.log"
    failing = submitted(cluster[1], log, "launch.rl", "checkpoint=nowhere", "cluster=ray", "cluster.ranks=1")
    assert failing.wait(WAIT_S) == 1, log.read_text()
    assert "nowhere" in log.read_text() and "failed with exit code 2" in log.read_text()


def test_a_driver_waits_for_its_nodes_by_name_and_without_the_token_is_not_let_in(
    cluster: tuple[RayCluster, str], runs: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["rl", *options, "cluster=ray", f"cluster.address={cluster[0].address}", "cluster.ranks=2"]
    waiting = start(*command, "run_name=waiting", "cluster.nodes=[head,absent]", "cluster.start_timeout_s=5")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    stranger = start(*command, "run_name=stranger")
    said, _ = waiting.communicate(timeout=WAIT_S)
    assert waiting.returncode == REQUEUE, said
    assert said.count("waiting for absent; 1 of 2 nodes are there (") >= 2, said
    assert re.search(r"still waiting for absent; 1 of 2 nodes are there after \d+ s \(cluster.start_timeout_s\)", said), said
    said, _ = stranger.communicate(timeout=WAIT_S)
    assert stranger.returncode == 2 and "Traceback" not in said and "RAY_AUTH_MODE=token and its token here too" in said, said
    token = (runs.parent / ".ray" / "auth_token").read_bytes().strip()
    assert token and not [file for file in runs.rglob("*") if file.is_file() and token in file.read_bytes()]


def test_rl_on_nodes_that_come_and_go_takes_engines_and_does_without_them_and_learns_the_same(
    cluster: tuple[RayCluster, str], runs: Path, options: list[str], whole: Path
) -> None:
    nodes, address = cluster
    log, run_dir, slow = runs.parent / "elastic.log", runs / "elastic", runs.parent / "slow"
    slow.touch()
    nodes.start_node("first", cpus=2, gpu_type="H100", notice_s=120)
    command = [
        *("launch.rl", *options, "cluster=ray", "cluster.gpu_type=H100", "rollout.placement=separate", "rollout.engines=3"),
        *("rollout.min_engines=1", f"task.options.slow={slow}", "run_name=elastic", "resume=auto"),
    ]

    def engines() -> list[float]:
        """At the end of every round so far."""
        return list(series(run_dir, "rollout/engines").values())

    def wait_for_rounds(count: int, number: float) -> None:
        deadline = time.monotonic() + WAIT_S
        while engines().count(number) < count:
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    job = submitted(address, log, *command)
    wait_for_rounds(1, number=1)
    (name,) = re.findall(r"Job '(\w+)' submitted", log.read_text())
    subprocess.run([*RAY, "job", "stop", "--address", address, name], check=True, capture_output=True)
    job.wait(WAIT_S)
    stopped = log.read_text()
    assert f"stopped by SIGTERM after round {len(engines())}; resume=auto goes on" in stopped, stopped

    job = submitted(address, log, *command)
    wait_for_rounds(len(engines()) + 1, number=1)
    nodes.start_node("second", cpus=1, gpu_type="H100")
    wait_for_rounds(2, number=2)
    nodes.kill_node("second")
    nodes.start_node("third", cpus=2, gpu_type="H100")
    nodes.end_node("first")
    deadline = time.monotonic() + WAIT_S
    while "first will go, with ranks: the ranks start again after round" not in log.read_text():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    slow.unlink()
    assert job.wait(WAIT_S) == 0, log.read_text()
    said = log.read_text()
    require_the_same(whole, run_dir, said)
    assert [number for number, _ in groupby(engines())] == [1, 2, 1], said
    rates = [(one["perf/tokens_per_s"], one["perf/tokens_per_s_per_device"]) for one in records(run_dir)[1:]]
    devices = {round(rate / each) for rate, each in rates}
    assert {2, 3} <= devices <= {2, 3, 4}, "those of the rank and of the engines, a third of which may have begun to join"
    assert "starting 1 trainer rank and 1 to 3 engines in places of their own" in said
    assert "joins: 2 engines take part, of at most 3" in said
    assert "it starts again where there is room, and its" in said and "from the last checkpoint" not in said
    (left,) = re.findall(r"first will go, with ranks: the ranks start again after round (\d+)", said)
    assert f"continuing after round {left} from" in said, "a round was lost"


def test_an_autoscaler_adds_nodes_for_ranks_and_engines_and_the_run_takes_them(
    runs: Path, options: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no CPU but those that it brings."""
    log, slow = runs.parent / "scaled.log", runs.parent / "slow"
    slow.touch()
    with RayCluster(runs.parent / "scaled", monkeypatch) as cluster, open(log, "w") as out:
        cluster.start_autoscaling_head("head", nodes=3, monkeypatch=monkeypatch)
        command = ["rl", *options, "cluster=ray", f"cluster.address={cluster.address}", "run_name=scaled"]
        separate = ["rollout.placement=separate", "rollout.engines=2", "rollout.min_engines=1", f"task.options.slow={slow}"]
        process = start(*command, *separate, stdout=out)
        wait_for_text(log, "joins: 2 engines take part, of at most 2", process)
        slow.unlink()
        assert process.wait(WAIT_S) == 0, log.read_text()
    require_the_same(whole, runs / "scaled", log.read_text())
