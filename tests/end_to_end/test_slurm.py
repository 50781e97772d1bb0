"""A run on a real SLURM of two nodes is told to stop, queued again, loses a node, is queued again, and learns what one that
nothing happened to learns: same losses, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kernels.errors import UserError
from launch.cli import load
from launch.submit import COMMANDS, job_script, submit
from tests.end_to_end.commands import REPOSITORY, records, run, series
from tests.end_to_end.slurm_cluster import SlurmCluster, require_slurm
from trainer.run_dir import read_status

STEPS = 16
WAIT_S = 250
OPTIONS = [
    *("experiment=smoke", f"train.steps={STEPS}", "train.checkpoint_every=2", "train.eval_every=100"),
    *("parallel.policy=hecate", "parallel.overlap=2", "parallel.memory=2"),  # plans that do not depend on measured times
]
CLUSTER = [
    *("cluster=slurm", "cluster.slurm.gpus_per_node=0", "cluster.slurm.time_limit='30:00'"),
    *("cluster.object_store_mib=80", "cluster.threads_per_rank=1"),
]
pytestmark = pytest.mark.timeout(900)  # three starts of Ray on two nodes, while other tests run


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


def wait_for(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        said = log.read_text() if log.exists() else "no log"
        assert time.monotonic() < deadline and "Traceback" not in said, f"{what}: not after {WAIT_S} s\n{said}"
        time.sleep(0.05)


def reached(run_dir: Path, step: int) -> Callable[[], bool]:
    return lambda: any(record["step"] >= step for record in records(run_dir))


def start_again(slurm: SlurmCluster, job: str, count: int, log: Path) -> None:
    """SLURM lets a requeued job wait two minutes; some seconds are enough for its nodes to have forgotten the killed one."""
    wait_for(lambda: slurm.job(job)["JobState"] == "PENDING" and slurm.job(job)["Restarts"] == str(count), "requeued", log)
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")


def test_stopped_requeued_robbed_of_a_node_and_requeued_it_learns_the_same(slurm: SlurmCluster, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    common = [*OPTIONS, f"runs_dir={runs}", f"data.cache_dir={tmp_path}/cache"]
    job = submit("pretrain", [*common, *CLUSTER, "cluster.slurm.nodes=2", "run_name=job"])
    assert job is not None
    log = runs / "slurm" / "job.log"
    wait_for(reached(runs / "job", 3), "step 3", log)
    assert "starting 2 trainer ranks on 127.0.0.2, 127.0.0.3, in this order" in log.read_text()
    slurm.call("scancel", "--signal=USR1", "--batch", job)
    start_again(slurm, job, 1, log)
    stopped_at = max(series(runs / "job", "train/loss"))
    assert f"stopped by SIGUSR1 after step {stopped_at}" in log.read_text()
    wait_for(reached(runs / "job", stopped_at + 3), "3 more steps", log)
    slurm.kill_node("n2")
    wait_for(lambda: "n2 of the 2 nodes does not answer" in log.read_text(), "the lost node is named", log)
    slurm.start_node("n2")
    start_again(slurm, job, 2, log)
    wait_for(lambda: slurm.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the end", log)
    assert slurm.job(job)["ExitCode"] == "0:0", log.read_text()
    assert (read_status(runs / "job")["attempt"], read_status(runs / "job")["state"]) == (3, "finished")
    assert log.read_text().count("continuing after step") == 2
    left = [process for name in slurm.names for process in slurm.steps_of(name)]
    assert not left, f"processes of the job are still there: {left}"
    run("pretrain", *common, "run_name=whole")
    assert series(runs / "job", "train/loss") == series(runs / "whole", "train/loss")


def test_the_exit_code_of_a_run_is_that_of_its_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    options = [f"runs_dir={tmp_path}/runs", "run_name=job", "data=text", f"data.paths=[{tmp_path}/empty]"]
    job = submit("pretrain", [*CLUSTER, "cluster.slurm.nodes=1", *options])
    assert job is not None
    log = tmp_path / "runs" / "slurm" / "job.log"
    wait_for(lambda: slurm.job(job)["JobState"] == "FAILED", "failed", log)
    assert slurm.job(job)["ExitCode"] == "2:0", log.read_text()
    assert "has no visible file below it" in log.read_text()


def test_a_job_that_slurm_refuses_is_a_message(slurm: SlurmCluster, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)SLURM does not take the job: .*partition.*The script is .*\.sbatch"):
        submit("pretrain", [*CLUSTER, f"runs_dir={tmp_path}", "cluster.slurm.partition=nowhere"])


def test_slurm_itself_finds_no_mistake_in_the_scripts(slurm: SlurmCluster, tmp_path: Path) -> None:
    for name, root in COMMANDS.items():
        options = ["cluster=slurm", "cluster.slurm.gpus_per_node=0", *(["checkpoint=a"] if name == "rl" else [])]
        script = tmp_path / f"{name}.sbatch"
        script.write_text(job_script(name, "job", load(root, name, options), options))
        answer = slurm.call("bash", "-c", f"sbatch --test-only {script} 2>&1")
        assert "to start at" in answer, answer
