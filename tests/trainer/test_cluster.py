"""Restarts, the number of ranks, and what is said before Ray is even started."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from kernels.errors import UserError
from launch.cli import load
from trainer.cluster import ProcessLost, check_cluster, choose_ranks, supervise
from trainer.config import ClusterConfig, PretrainConfig
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
    assert supervise(attempt, max_restarts=2, say=said.append) == "done"
    assert attempts == [1, 2, 3]
    assert said[0] == "trainer/1 died (attempt 1); restart 1 of 2 from the last checkpoint"


def test_restarts_are_limited() -> None:
    attempts, attempt = failing(9)
    with pytest.raises(ProcessLost, match=r"trainer/1 died \(attempt 3\); cluster.max_restarts=2 is used up"):
        supervise(attempt, max_restarts=2, say=lambda text: None)
    assert attempts == [1, 2, 3]


def test_a_mistake_of_the_user_is_not_tried_again() -> None:
    attempts: list[int] = []

    def attempt() -> None:
        attempts.append(1)
        raise UserError("no space")

    with pytest.raises(UserError, match="no space"):
        supervise(attempt, max_restarts=5, say=lambda text: None)
    assert attempts == [1]


def test_a_dashboard_port_in_use_is_an_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"cluster.dashboard_port={port} on 127.0.0.1 is in use .* choose another"):
            check_cluster(cluster(dashboard=True, dashboard_port=port))
        check_cluster(cluster(dashboard=False, dashboard_port=port))


def test_ranks_are_as_asked() -> None:
    assert choose_ranks(cluster(ranks=5)) == 5


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
