"""A run that is killed and resumed learns exactly what an uninterrupted one learns: same rows, same losses, bit for bit."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from launch.cli import CTRL_C
from tests.end_to_end.commands import (
    WAIT_S,
    press_ctrl_c,
    run,
    series,
    start,
    wait_for_memory,
    wait_for_step,
    wait_for_text,
)
from tests.end_to_end.kills import APART, SEED, kill_at_random, shuffled
from tests.end_to_end.ray_cluster import RayCluster
from tests.listening import beyond_loopback
from tests.processes import actor_of, process_of
from trainer import checkpoint
from trainer.run_dir import read_status
from trainer.stopping import REQUEUE

RANK = f"trainer/{SEED % 2}"
ROLES = shuffled(["driver", RANK])
STEPS = APART * (len(ROLES) + 1)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "brew", "ink"]

pytestmark = pytest.mark.timeout(900)  # up to five starts of ranks, while other tests run


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small text; runs and caches go beside it."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text").mkdir()
    generator = random.Random(0)
    for index in range(40):
        (folder / "text" / f"{index}.txt").write_text(" ".join(generator.choices(WORDS, k=400)))
    return folder


def arguments(workplace: Path, name: str) -> list[str]:
    return [
        *("experiment=smoke", "data=text", f"data.paths=[{workplace}/text]", f"data.cache_dir={workplace}/cache"),
        *(f"runs_dir={workplace}/runs", f"run_name={name}", f"train.steps={STEPS}", "train.checkpoint_every=2"),
        *("train.eval_every=100", "logger.wandb=off", "data.validation_share=0.2"),
        *("parallel.policy=hecate", "parallel.overlap=2", "parallel.memory=2"),  # plans that do not depend on measured times
    ]


def losses(workplace: Path, name: str) -> dict[int, float]:
    return series(workplace / "runs" / name, "train/loss")


@pytest.fixture(scope="module")
def uninterrupted(workplace: Path) -> dict[int, float]:
    run("pretrain", *arguments(workplace, "whole"))
    found = losses(workplace, "whole")
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def test_processes_killed_at_random_moments_change_nothing(workplace: Path, uninterrupted: dict[int, float]) -> None:
    options = ["train.memory_checkpoint_every=1", f"cluster.max_restarts={len(ROLES)}"]  # on the disk those of even steps
    command = ["pretrain", *arguments(workplace, "killed"), *options, "resume=auto"]
    said = kill_at_random(command, workplace / "runs" / "killed", ROLES)
    context = f"TESSERA_KILLS_SEED={SEED}: {', '.join(ROLES)}\n{said}"
    assert losses(workplace, "killed") == uninterrupted, context
    assert said.count(f"{RANK} died") == ROLES.count(RANK), context
    assert said.count("continuing after step") >= 1, context


def test_a_request_to_stop_ends_the_step_writes_a_checkpoint_and_asks_to_be_started_again(
    workplace: Path, uninterrupted: dict[int, float]
) -> None:
    """So does Ctrl-C, and while ranks begin anew; then the checkpoint is the newest of those that are in memory."""
    options = ["train.checkpoint_every=100", "train.memory_checkpoint_every=1"]
    process = start("pretrain", *arguments(workplace, "asked"), *options)
    wait_for_step(workplace / "runs" / "asked", 3, process)
    assert beyond_loopback(process.pid) == {}
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == REQUEUE, output
    last = max(losses(workplace, "asked"))
    assert f"stopped by SIGUSR1 after step {last}; resume=auto goes on" in output
    assert [p.name for p in checkpoint.available(workplace / "runs" / "asked" / "checkpoints")] == [f"step_{last:06d}"]
    assert read_status(workplace / "runs" / "asked")["state"] == "stopped"
    process = start("pretrain", *arguments(workplace, "asked"), *options, "resume=auto", at_a_terminal=True)
    wait_for_memory(workplace / "runs" / "asked", process, after=last)
    lost = process_of("trainer/1", process.pid)
    assert lost is not None
    lost.kill()
    driver_log = workplace / "runs" / "asked" / "logs" / "attempt_2" / "driver.log"
    wait_for_text(driver_log, "restart 1 of", process)
    press_ctrl_c(process)  # no ranks are there, and what they had learned is in memory
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == CTRL_C and "stopped by Ctrl-C" in output, output
    brought = re.search(r"bringing the checkpoint of step (\d+) from the memory of 1 node to the disk", output)
    assert brought is not None and int(brought[1]) > last, output
    output = run("pretrain", *arguments(workplace, "asked"), "resume=auto")
    assert f"continuing after step {brought[1]}" in output
    assert losses(workplace, "asked") == uninterrupted


def test_a_rank_that_stands_still_is_named_and_the_run_restarts_by_itself(
    workplace: Path, uninterrupted: dict[int, float]
) -> None:
    options = ["train.checkpoint_every=100", "train.memory_checkpoint_every=1", "cluster.collective_timeout_s=15"]
    run_dir = workplace / "runs" / "still"
    process = start("pretrain", *arguments(workplace, "still"), *options)
    wait_for_memory(run_dir, process)
    keeper = actor_of("Keeper", process.pid)
    assert keeper is not None
    keeper.kill()
    wait_for_text(run_dir / "logs" / "attempt_1" / "driver.log", "cannot be written", process)
    wait_for_memory(run_dir, process, after=max(losses(workplace, "still")))  # with another keeper
    stopped = process_of("trainer/1", process.pid)
    assert stopped is not None
    stopped.suspend()
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output
    assert "trainer/1 hangs (it wrote no stack, so its whole process or machine stands still); trainer/0 waits in" in output
    assert "restart 1 of" in output
    assert not stopped.is_running(), "the rank that stood still is still there"
    assert output.count("The run goes on without it") <= 2, output
    continued = re.search(r"continuing after step (\d+) from the memory of 1 node", output)
    assert continued is not None and int(continued[1]) > 0, output
    assert losses(workplace, "still") == uninterrupted


def test_a_run_that_loses_nodes_goes_on_with_what_is_left_and_waits_where_nothing_is(
    workplace: Path, uninterrupted: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real Ray cluster whose nodes die; ranks run only on those with the GPUs that are asked for.

    There is no checkpoint on a disk: what is left is what a lost node had sent to the other one. The first that is lost is
    replaced by a node that has nothing in its memory and reads all from the other, the second by none.
    """
    log, run_dir = workplace / "nodes.log", workplace / "runs" / "nodes"
    with RayCluster(workplace / "ray", monkeypatch) as cluster, open(log, "w") as out:
        for name, kind in (("plain", None), ("first", "H100"), ("second", "H100"), ("third", "H100")):
            cluster.start_node(name, cpus=1, gpu_type=kind)
        options = [
            *("cluster=ray", f"cluster.address={cluster.address}", "cluster.ranks=2", "cluster.gpu_type=H100"),
            *("cluster.min_ranks=1", "cluster.shrink_after_s=5", "cluster.max_restarts=9", "cluster.threads_per_rank=1"),
            *("train.checkpoint_every=100", "train.memory_checkpoint_every=1"),
            "train.micro_rows=1",  # slow, so that there is time to kill nodes
        ]
        process = start("pretrain", *arguments(workplace, "nodes"), *options, stdout=out)

        def wait_for_attempt(number: int) -> tuple[list[str], int]:
            """Until that many have gone on from memory; the nodes of the ranks, and the step after which the last one did."""
            deadline = time.monotonic() + WAIT_S
            while len(steps := re.findall(r"continuing after step (\d+) from the memory of 1 node", log.read_text())) < number:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            found = re.findall(r"starting (\d) trainer ranks?(?: on ([\d.]+), ([\d.]+), in this order)?", log.read_text())
            return [cluster.names[address] for address in found[-1][1:] if address], int(steps[-1]) if steps else 0

        wait_for_memory(run_dir, process)
        (lost, left), _ = wait_for_attempt(0)
        cluster.kill_node(lost)
        nodes, step = wait_for_attempt(1)
        assert len(nodes) == 2 and left in nodes and lost not in nodes and step > 0
        wait_for_memory(run_dir, process, after=step + 1)
        cluster.kill_node(left)
        wait_for_text(log, "going on with 1 trainer rank (cluster.min_ranks): 2 wanted, room for 1 on the nodes", process)
        _, later = wait_for_attempt(2)
        assert later > step
        wait_for_step(run_dir, later + 1, process)
        cluster.kill_node(next(name for name in nodes if name != left))
        wait_for_text(log, "2 wanted, room for 0 on the nodes that are alive (plain); a rank takes 1 CPU and 0.001", process)
        cluster.start_node("fourth", cpus=1, gpu_type="H100")
        assert process.wait(timeout=WAIT_S) == 0, log.read_text()
    assert losses(workplace, "nodes") == pytest.approx(uninterrupted, rel=1e-3), "the same rows, on another number of ranks"


def test_ranks_grow_back_where_there_is_room_again_and_leave_a_node_that_is_to_go_and_lose_no_step(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real Ray cluster. No checkpoint is on a disk: the ranks go on from what is in memory.

    The driver stands still while nodes start, so that there are steps left. Another run there is bound to its nodes: it stops.
    """
    log, run_dir = workplace / "moves.log", workplace / "runs" / "moves"
    moved = re.compile(r": the ranks start again after step (\d+)")
    with RayCluster(workplace / "moves", monkeypatch) as cluster, open(log, "w") as out:
        cluster.start_node("head", cpus=0, gpu_type=None)
        cluster.start_node("first", cpus=1, gpu_type=None)
        cluster.start_node("second", cpus=1, gpu_type=None)
        options = [
            *("cluster=ray", f"cluster.address={cluster.address}", "cluster.ranks=2", "cluster.min_ranks=1"),
            *("cluster.shrink_after_s=1", "cluster.max_restarts=1", "cluster.threads_per_rank=1"),
            *("train.steps=60", "train.checkpoint_every=100", "train.memory_checkpoint_every=1", "train.micro_rows=1"),
        ]
        process = start("pretrain", *arguments(workplace, "moves"), *options, stdout=out)
        driver = psutil.Process(process.pid)
        wait_for_memory(run_dir, process)
        cluster.kill_node("second")
        wait_for_text(log, "asking Ray for places for 1 more trainer rank", process)
        driver.suspend()
        cluster.start_node("third", cpus=1, gpu_type=None, notice_s=120)
        driver.resume()
        wait_for_text(log, "starting 2 trainer ranks on", process, times=2)
        wait_for_memory(run_dir, process, after=int(moved.findall(log.read_text())[0]))
        cluster.end_node("third")
        wait_for_text(log, "starting 1 trainer rank", process, times=2)
        wait_for_step(run_dir, int(moved.findall(log.read_text())[1]) + 2, process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=WAIT_S) == REQUEUE, log.read_text()
        assert cluster.nodes["third"].wait(timeout=60) != 0, "a node that nobody is on any more goes"
        cluster.start_node("fourth", cpus=1, gpu_type=None, notice_s=120)
        bound = ["run_name=bound", "cluster.nodes=[first,fourth]", "cluster.min_ranks=null"]
        process = start("pretrain", *arguments(workplace, "moves"), *options, *bound)
        wait_for_memory(workplace / "runs" / "bound", process)
        cluster.end_node("fourth")
        output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == REQUEUE, output
    last = max(losses(workplace, "bound"))
    assert f"fourth will go, with ranks, and cluster.nodes has all of them take part: stopped after step {last}" in output
    on_disk = [folder.name for folder in checkpoint.available(workplace / "runs" / "bound" / "checkpoints")]
    assert on_disk == [f"step_{last:06d}"], "what is in memory goes with the run"
    said = log.read_text()
    assert "there are places for 2 trainer ranks: the ranks start again after step" in said, said
    assert "third will go, with ranks: the ranks start again after step" in said, said
    continued = re.findall(r"continuing after step (\d+) from the memory of 1 node", said)
    assert continued[1:] == moved.findall(said) and len(continued) == 3, "a step was lost\n" + said
    assert re.findall(r"starting (\d) trainer rank", said) == ["2", "1", "2", "1"] and "restart 2" not in said, said
    found = losses(workplace, "moves")
    calm = start("pretrain", *arguments(workplace, "calm"), "train.steps=60")
    wait_for_step(workplace / "runs" / "calm", max(found), calm)
    calm.send_signal(signal.SIGUSR1)
    calm.communicate(timeout=WAIT_S)
    expected = losses(workplace, "calm")
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-3), "the same rows, on other ranks"
