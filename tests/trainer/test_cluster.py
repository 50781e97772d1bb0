"""Restarts, the number of ranks, and what is said before Ray is even started."""

from __future__ import annotations

import itertools
import socket
import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError, RayActorError

from kernels.errors import UserError
from launch.cli import load
from trainer.cluster import (
    GONE,
    ProcessLost,
    _say_of_ray,
    check_cluster,
    choose_ranks,
    rank_choices,
    reason_of,
    start_ray,
    supervise,
)
from trainer.config.run import ClusterConfig, PretrainConfig
from trainer.places import seats
from trainer.ports import free_port
from trainer.stopping import Move, Moved
from trainer.worker import check_division


def cluster(**changes: Any) -> ClusterConfig:
    return load(PretrainConfig, "pretrain", []).cluster.model_copy(update=changes)


def failing(times: int) -> tuple[list[int], Any]:
    attempts: list[int] = []

    def attempt() -> str:
        attempts.append(len(attempts) + 1)
        if len(attempts) <= times:
            raise ProcessLost(f"trainer/1 died (attempt {len(attempts)})")
        return "done"

    return attempts, attempt


def test_a_lost_process_leads_to_another_attempt_and_is_named() -> None:
    said: list[str] = []
    attempts, attempt = failing(2)
    assert supervise(attempt, lambda: -1, max_restarts=2, say=said.append) == "done"
    assert attempts == [1, 2, 3]
    assert said[0] == "trainer/1 died (attempt 1); restart 1 of 2 from the last checkpoint"


def test_a_process_that_was_killed_is_said_to_be_gone_with_what_may_have_been() -> None:
    killed, owner = "Worker unexpectedly exits with a connection error code 2. End of file", "Owner's node has crashed. Some"
    reasons = [reason_of(RayActorError(error_msg=f"It died. Worker exit detail: {why}")) for why in (killed, owner)]
    assert reasons == [GONE, "Owner's node has crashed"]
    assert reason_of(ActorUnavailableError("RPC error: Socket closed rpc_code: 14", b"0" * 16)) == GONE


def test_what_ray_reports_is_a_line_of_the_run_unless_it_is_told_anyway() -> None:
    said: list[str] = []
    death = "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem"
    memory = "1 Workers killed due to memory pressure (OOM) at node (IP: 127.0.0.1) over the last time period. To see more"
    _say_of_ray(said.append, {"lines": [death, memory]}, False)
    assert said == ["Ray: 1 Workers killed due to memory pressure (OOM) at node (IP: 127.0.0.1) over the last time period"]


def test_restarts_are_limited() -> None:
    attempts, attempt = failing(9)
    with pytest.raises(ProcessLost, match=r"trainer/1 died \(attempt 3\); cluster.max_restarts=2 is used up"):
        supervise(attempt, lambda: -1, max_restarts=2, say=lambda text: None)
    assert attempts == [1, 2, 3]


def test_restarts_are_counted_from_the_newest_checkpoint_on() -> None:
    """The fourth attempt begins where the third did, the fifth before that; nobody asks for a sixth."""
    began, said = iter([-1, 10, 20, 20, 10]), list[str]()
    step = -1

    def attempt() -> None:
        nonlocal step
        step = next(began)
        raise ProcessLost("trainer/1 died")

    with pytest.raises(ProcessLost, match="max_restarts=2 is used up without a newer checkpoint"):
        supervise(attempt, lambda: step, max_restarts=2, say=said.append)
    assert [line.split()[3] for line in said] == ["1", "1", "1", "2"]


def test_a_move_to_other_places_is_no_restart() -> None:
    said, moves = list[str](), 5
    attempts, lost = failing(2)

    def attempt() -> str:
        nonlocal moves
        moves -= 1
        if moves >= 0:
            raise Moved(Move("a will go", frozenset("a")), f"after step {moves}")
        return str(lost())

    assert supervise(attempt, lambda: -1, max_restarts=2, say=said.append) == "done"
    assert attempts == [1, 2, 3] and said[4:6] == [
        "a will go: the ranks start again after step 0",
        "trainer/1 died (attempt 1); restart 1 of 2 from the last checkpoint",
    ]


def test_a_mistake_of_the_user_is_not_tried_again() -> None:
    attempts: list[int] = []

    def attempt() -> None:
        attempts.append(1)
        raise UserError("no space")

    with pytest.raises(UserError, match="no space"):
        supervise(attempt, lambda: -1, max_restarts=5, say=lambda text: None)
    assert attempts == [1]


def test_a_ray_that_does_not_start_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because")  # as Ray does

    monkeypatch.setattr("trainer.cluster.ray.init", init)
    with pytest.raises(UserError, match=r"Ray does not start .*: The current node timed out during startup\. Look for what"):
        start_ray(cluster(host="10.0.0.1"), 2, lambda text: None)


def test_a_dashboard_port_in_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.cluster.GOING_S", 0.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port} of cluster\.dashboard_port on 127\.0\.0\.1 is not available .* choose another"
        ):
            check_cluster(cluster(dashboard=True, dashboard_port=port), 1)
        check_cluster(cluster(dashboard=False, dashboard_port=port), 1)


def test_a_port_that_a_killed_run_is_about_to_leave_is_waited_for() -> None:
    other = socket.create_server(("127.0.0.1", 0))
    port = other.getsockname()[1]
    leaving = threading.Timer(1.0, other.close)
    leaving.start()
    check_cluster(cluster(dashboard=True, dashboard_port=port), 1)
    assert leaving.finished.is_set(), "it was taken until then"


@pytest.mark.parametrize("asks", [True, False])
def test_a_cluster_that_lets_everybody_in_is_said(monkeypatch: pytest.MonkeyPatch, asks: bool) -> None:
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("trainer.cluster.nodes_alive", dict)
    monkeypatch.setattr("trainer.cluster.is_token_auth_enabled", lambda: asks)
    said: list[str] = []
    with socket.create_server(("127.0.0.2", 0)) as head:
        address = f"127.0.0.2:{head.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        start_ray(cluster(address="auto"), 1, said.append)
    assert said[0] == f"joining the Ray cluster at {address}"
    assert [line.partition(":")[0] for line in said[1:]] == ([] if asks else ["this cluster requires no token"])


def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would ask a head node that has ended for a quarter of an hour."""
    port = free_port("127.0.0.2")
    with pytest.raises(UserError, match=rf"nothing listens at 127\.0\.0\.2:{port}, where cluster\.address=127\..* leads"):
        start_ray(cluster(address=f"127.0.0.2:{port}"), 1, lambda _: None)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.2:{port}")
    with pytest.raises(UserError, match=rf"nothing listens at 127\.0\.0\.2:{port}, where cluster\.address=auto leads"):
        start_ray(cluster(address="auto"), 1, lambda _: None)


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "10.0.0.1", "10.0.0.1:head", "http://10.0.0.1:8265"])
def test_an_address_that_no_cluster_has_is_said(address: str) -> None:
    with pytest.raises(UserError, match=rf"cluster\.address={address} leads to no .*: Invalid address format.* as host:port"):
        start_ray(cluster(address=address), 1, lambda _: None)


def test_ranks_are_as_asked() -> None:
    assert choose_ranks(cluster(ranks=5)) == 5


def test_fewer_ranks_are_those_that_model_and_rows_divide_over() -> None:
    model = load(PretrainConfig, "pretrain", []).model  # 8 experts

    def check(ranks: int) -> None:
        check_division(model, 24, ranks)

    assert rank_choices(cluster(min_ranks=1), 8, check) == (8, 4, 2, 1)
    assert rank_choices(cluster(min_ranks=3), 8, check) == (8, 4)
    assert rank_choices(cluster(min_ranks=None), 8, check) == (8,)
    with pytest.raises(UserError, match="not divisible by the number of ranks"):
        rank_choices(cluster(min_ranks=1), 3, check)
    with pytest.raises(UserError, match=r"cluster.min_ranks \(4\) is larger than the number of ranks \(2\); lower it"):
        rank_choices(cluster(min_ranks=4), 2, check)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cluster.ranks=2", "cluster.min_ranks=4"], r"min_ranks \(4\) is larger than ranks \(2\)"),
        (["cluster.nodes=[a,b]", "cluster.min_ranks=1"], r"min_ranks \(1\) goes on without a lost node, and nodes says"),
        (["cluster=slurm", "cluster.min_ranks=1"], r"min_ranks \(1\) goes on without a lost node"),
    ],
)
def test_fewer_ranks_contradict_what_asks_for_all(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(PretrainConfig, "pretrain", options)


def slurm(**changes: Any) -> ClusterConfig:
    config = load(PretrainConfig, "pretrain", ["cluster=slurm"]).cluster
    assert config.slurm is not None
    return config.model_copy(update={"slurm": config.slurm.model_copy(update=changes)})


def test_a_slurm_job_has_a_rank_for_each_gpu_or_node() -> None:
    assert choose_ranks(slurm(nodes=3, gpus_per_node=4)) == 12
    assert choose_ranks(slurm(nodes=3, gpus_per_node=0)) == 3


def test_ranks_divide_evenly_over_nodes() -> None:
    with pytest.raises(UserError, match=r"cluster.ranks \(3\) does not divide evenly over 2 nodes"):
        choose_ranks(cluster(ranks=3, nodes=("a", "b")))
    assert choose_ranks(cluster(ranks=4, nodes=("a", "b"))) == 4


def test_a_slurm_cluster_outside_a_job_is_a_message() -> None:
    with pytest.raises(UserError, match=r"cluster=slurm is for `python -m launch.submit`"):
        check_cluster(slurm(), 1)
    check_cluster(slurm().model_copy(update={"address": "10.0.0.1:20001"}), 1)


def test_engines_apart_need_gpus_that_no_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started, with what is there and what is asked for."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [choose_ranks(cluster(), apart) for apart in (0, 2, 3)] == [2, 2, 1]
    with pytest.raises(
        UserError, match=r"ranks=1 and rollout.engines=4 with rollout.placement=separate need 5 GPUs at least.*4"
    ):
        choose_ranks(cluster(), 4)
    check_cluster(cluster(), 2, apart=2)
    check_cluster(cluster(address="auto"), 8, apart=2)  # other machines may have more
    with pytest.raises(UserError, match=r"ranks=3 and rollout.engines=2 .* need 5 GPUs, and this machine has 4; lower either"):
        check_cluster(cluster(), 3, apart=2)
    with pytest.raises(UserError, match=r"cluster.ranks=5 needs as many GPUs, and this machine has 4; lower it"):
        check_cluster(cluster(), 5)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    check_cluster(cluster(), 3, apart=2)  # processes on CPUs
    assert choose_ranks(slurm(nodes=2, gpus_per_node=8), 3) == 13
    assert choose_ranks(slurm(nodes=2, gpus_per_node=0), 3) == 2
    assert choose_ranks(slurm(nodes=2, gpus_per_node=8).model_copy(update={"ranks": 5}), 3) == 5
    with pytest.raises(UserError, match=r"need 20 GPUs, and the job has 16 \(cluster.slurm.nodes=2 x gpus_per_node=8\)"):
        choose_ranks(slurm(nodes=2, gpus_per_node=8).model_copy(update={"ranks": 12}), 8)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=24), st.data())
def test_ranks_share_as_few_nodes_as_can_be_evenly(nodes: list[str], data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, len(nodes)))
    taken, left = seats(nodes, ranks)
    assert sorted(taken + left) == list(range(len(nodes))) and len(taken) == ranks
    where = [nodes[place] for place in taken]
    assert len(list(itertools.groupby(where))) == len(set(where)), "consecutive ranks share a node"
    sizes, own = Counter(nodes), Counter(where)
    even = [count for count in range(1, ranks + 1) if ranks % count == 0]
    possible = [n for n in even if sum(size >= ranks // n for size in sizes.values()) >= n]
    if possible:
        assert set(own.values()) == {ranks // possible[0]} and len(own) == possible[0]


@pytest.mark.parametrize(
    ("rows", "ranks", "message"),
    [
        (12, 3, r"model.num_experts \(8\) is not divisible by the number of ranks \(3\); set cluster.ranks to a divisor of 8"),
        (6, 4, r"train.batch_rows \(6\) is not divisible by the number of ranks \(4\)"),
    ],
)
def test_what_does_not_divide_is_said_with_numbers(rows: int, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_division(load(PretrainConfig, "pretrain", []).model, rows, ranks)
