"""A run on a real SLURM of two nodes comes near its time limit, is queued again, loses a node, is queued again, is preempted by
a job of more priority, is queued again, and learns what one that nothing happened to learns: same losses, bit for bit. So does
one of RL that has no time left to stop."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kernels.errors import UserError
from launch.cli import load
from launch.submit import COMMANDS, job_script, submit
from tests.end_to_end.commands import REPOSITORY, records, run, series, untrained
from tests.end_to_end.slurm_cluster import SlurmCluster, require_slurm
from trainer.run_dir import read_status

STEPS = 20
WAIT_S = 250
OPTIONS = [
    *("experiment=smoke", f"train.steps={STEPS}", "train.checkpoint_every=2", "train.eval_every=100"),
    *("parallel.policy=hecate", "parallel.overlap=2", "parallel.memory=2"),  # plans that do not depend on measured times
]
CLUSTER = [
    *("cluster=slurm", "cluster.slurm.gpus_per_node=0", "cluster.slurm.time_limit='30:00'"),
    *("cluster.object_store_mib=80", "cluster.threads_per_rank=1"),
]
RL = [
    *("experiment=smoke", "rollout=sync", "warmup=none", "task.name=tests.rl.scorers:Letters", "task.options={}"),
    *("loop.rounds=4", "loop.eval_every=100", "rollout.engines=2"),
    *("parallel.policy=hecate", "parallel.overlap=2", "parallel.memory=2"),
]
pytestmark = pytest.mark.timeout(900)  # four starts of Ray on two nodes, while other tests run


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    require_slurm()
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=2) as cluster:
        yield cluster


@pytest.fixture
def slurm(running: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """As a person has it who submits from here."""
    monkeypatch.setenv("SLURM_CONF", running.environment["SLURM_CONF"])
    monkeypatch.chdir(REPOSITORY)
    return running


def wait_for(condition: Callable[[], bool], what: str, log: Path, error: str = "Traceback") -> None:
    """Not after `error` is in the log."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        said = log.read_text() if log.exists() else "no log"
        assert time.monotonic() < deadline and error not in said, f"{what}: not after {WAIT_S} s\n{said}"
        time.sleep(0.05)


def submitted(command: str, runs: Path, *options: str) -> tuple[str, Path]:
    """A run called job: its number at SLURM, and its log."""
    job = submit(command, [*options, *CLUSTER, f"runs_dir={runs}", "run_name=job"])
    assert job is not None
    return job, runs / "slurm" / "job.log"


def reached(run_dir: Path, step: int) -> Callable[[], bool]:
    return lambda: any(record["step"] >= step for record in records(run_dir))


def said(log: Path, text: str) -> Callable[[], bool]:
    return lambda: log.exists() and text in log.read_text()


def driver_of(slurm: SlurmCluster, command: str) -> psutil.Process:
    """On the first node."""
    (found,) = (one for one in slurm.steps_of("n1") if one.cmdline()[2:4] == ["-m", f"launch.{command}"])
    return found


def start_again(slurm: SlurmCluster, job: str, count: int, log: Path) -> None:
    """SLURM lets a requeued job wait two minutes; some seconds are enough for its nodes to have forgotten the killed one."""
    wait_for(lambda: slurm.job(job)["JobState"] == "PENDING" and slurm.job(job)["Restarts"] == str(count), "requeued", log)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=30", "StartTime=now+3")


def require_finished(slurm: SlurmCluster, job: str, run_dir: Path, attempt: int, log: Path) -> None:
    """And nothing of the job is left."""
    wait_for(lambda: slurm.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the end", log)
    assert slurm.job(job)["ExitCode"] == "0:0", log.read_text()
    assert (read_status(run_dir)["attempt"], read_status(run_dir)["state"]) == (attempt, "finished")
    left = [process for name in slurm.names for process in slurm.steps_of(name)]
    assert not left, f"processes of the job are still there: {left}"


def test_stopped_robbed_of_a_node_preempted_and_each_time_requeued_it_learns_the_same(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    """SLURM itself tells it to stop. It looks at the limits of jobs every 30 s, so the driver stands still until then."""
    runs = tmp_path / "runs"
    common = [*OPTIONS, f"data.cache_dir={tmp_path}/cache"]
    job, log = submitted("pretrain", runs, *common, "cluster.slurm.nodes=2")
    wait_for(reached(runs / "job", 3), "step 3", log)
    assert "starting 2 trainer ranks on 127.0.1.2, 127.0.1.3, in this order" in log.read_text()
    driver = driver_of(slurm, "pretrain")
    driver.suspend()
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=5")  # from its start: now it is as near as stop_before_s
    wait_for(said(log, "SIGUSR1 came"), "the signal", log)
    driver.resume()
    start_again(slurm, job, 1, log)
    stopped_at = max(series(runs / "job", "train/loss"))
    assert f"stopped by SIGUSR1 after step {stopped_at}" in log.read_text()
    # SLURM says so of a step that is still there when its job is requeued: it would keep the nodes for KillWait.
    assert " DUE TO JOB REQUEUE" not in "".join(re.findall(r"\*\*\* STEP .*", log.read_text()))
    wait_for(reached(runs / "job", stopped_at + 3), "3 more steps", log)
    slurm.kill_node("n2")
    wait_for(said(log, "n2 of the 2 nodes does not answer"), "the lost node is named", log)
    slurm.start_node("n2")
    start_again(slurm, job, 2, log)
    wait_for(reached(runs / "job", stopped_at + 6), "3 more steps", log)
    driver = driver_of(slurm, "pretrain")
    driver.suspend()
    slurm.call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_for(said(log, "SIGTERM came to its nodes"), "preempted", log)
    wait_for(lambda: log.read_text().count("SIGUSR1 came") == 2, "the driver is told", log)
    driver.resume()
    start_again(slurm, job, 3, log)
    preempted_at = max(series(runs / "job", "train/loss"))
    assert f"stopped by SIGUSR1 after step {preempted_at}" in log.read_text()
    require_finished(slurm, job, runs / "job", 4, log)
    assert f"continuing after step {preempted_at}" in log.read_text()
    assert log.read_text().count("continuing after step") == 3
    run("pretrain", *common, f"runs_dir={runs}", "run_name=whole")
    assert series(runs / "job", "train/loss") == series(runs / "whole", "train/loss")


def test_rl_that_reaches_its_time_limit_before_it_could_stop_goes_on_from_its_checkpoint(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    common = [*RL, f"checkpoint={untrained(tmp_path)}"]
    job, log = submitted("rl", runs, *common, "cluster.slurm.nodes=2")
    wait_for(reached(runs / "job", 2), "round 2", log)
    driver_of(slurm, "rl").suspend()
    slurm.call("scontrol", "update", f"JobId={job}", "EndTime=now+1")
    start_again(slurm, job, 1, log)
    assert "the time limit has come before the step ended" in log.read_text()
    require_finished(slurm, job, runs / "job", 2, log)
    assert "starting 2 trainer ranks and 2 engines on 127.0.1.2, 127.0.1.3, in this order" in log.read_text()
    assert log.read_text().count("continuing after round") == 1
    run("rl", *common, f"runs_dir={runs}", "run_name=whole", "cluster.threads_per_rank=1")
    for key in ("train/loss", "reward/mean"):
        assert series(runs / "job", key) == series(runs / "whole", key)


def test_a_job_that_is_cancelled_does_not_come_back(slurm: SlurmCluster, tmp_path: Path) -> None:
    job, log = submitted("pretrain", tmp_path / "runs", *OPTIONS, "cluster.slurm.nodes=1")
    wait_for(said(log, "joining the Ray cluster"), "the driver listens", log)
    slurm.call("scancel", job)
    wait_for(lambda: slurm.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), "the end", log)
    assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("CANCELLED", "0"), log.read_text()


def test_where_ray_does_not_start_the_job_fails_and_is_not_queued_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    nowhere = "cluster.slurm.shell=['export RAY_TMPDIR=/proc/none']"  # nobody can write there
    job, log = submitted("pretrain", tmp_path / "runs", *OPTIONS, "cluster.slurm.nodes=1", nowhere)
    wait_for(lambda: slurm.job(job)["JobState"] == "FAILED", "the end", log, error="back into the queue")
    assert slurm.job(job)["ExitCode"] == "1:0", log.read_text()
    assert "Ray has not started" in log.read_text()


def test_the_exit_code_of_a_run_is_that_of_its_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    options = ["data=text", f"data.paths=[{tmp_path}/empty]"]
    job, log = submitted("pretrain", tmp_path / "runs", *options, "cluster.slurm.nodes=1")
    wait_for(lambda: slurm.job(job)["JobState"] == "FAILED", "failed", log)
    assert slurm.job(job)["ExitCode"] == "2:0", log.read_text()
    assert "has no visible file below it" in log.read_text()


def test_a_job_that_slurm_refuses_is_a_message(slurm: SlurmCluster, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)SLURM refuses the job: .*partition.*The script is .*\.sbatch"):
        submit("pretrain", [*CLUSTER, f"runs_dir={tmp_path}", "cluster.slurm.partition=nowhere"])


def test_slurm_itself_finds_no_mistake_in_the_scripts(slurm: SlurmCluster, tmp_path: Path) -> None:
    for name, root in COMMANDS.items():
        options = ["cluster=slurm", "cluster.slurm.gpus_per_node=0", *(["checkpoint=a"] if name == "rl" else [])]
        script = tmp_path / f"{name}.sbatch"
        script.write_text(job_script(name, "a job", load(root, name, options), options))
        answer = slurm.call("bash", "-c", f"sbatch --test-only {script} 2>&1")
        assert "to start at" in answer, answer
