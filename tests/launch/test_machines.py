"""Machines of conf/machine, and measured times in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from kernels.errors import UserError
from launch.benchmarks.two_gpus import predicted_over_measured
from launch.cli import group_choices
from launch.machines import MachineName, layer_costs, link, profiled, read_machine, topology_of
from trainer.config.plan import PlanConfig

NAMES = group_choices(PlanConfig, "plan")["machine"]


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_is_known_and_has_links_that_are_slower_between_nodes(name: str) -> None:
    assert TypeAdapter(MachineName).validate_python(name) == name
    machine = read_machine(name)
    assert machine.across.gbytes < machine.within.gbytes and machine.across.latency_s >= machine.within.latency_s
    assert machine.memory_gib > 30 and machine.gpus_per_node == 8


def test_other_names_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValidationError, match="there are a100, h100, h200, v100"):
        TypeAdapter(MachineName).validate_python("h300")


def test_costs_are_work_over_rates() -> None:
    machine = read_machine("h200")
    costs = layer_costs(machine, 1024, 512, attention_flops=6e12)
    assert costs.entry_s == pytest.approx(6 * 1024 * 512 / 600e12) and costs.attention_s == pytest.approx(0.01)
    assert costs.expert_bytes == 6 * 1024 * 512 and costs.sum_bytes == 2 * costs.expert_bytes
    assert costs.expert_s == pytest.approx(costs.expert_bytes / 4.2e12) and costs.row_bytes == 2048
    assert costs.row_s == pytest.approx(4096 / 4.2e12) and costs.exchange_s == machine.exchange_s
    assert machine.exchange_s > costs.order_s == machine.order_s > 0
    assert costs.sum_s == pytest.approx(10 * 3 * 1024 * 512 / 4.2e12)
    assert costs.across == link(machine.across) and costs.across.byte_s == pytest.approx(1 / 50e9)


def test_two_h200_are_predicted_within_a_tenth_of_what_was_measured() -> None:
    """Forward and backward of a layer. Only `exchange_s` comes from there, from the even profile."""
    ratios = predicted_over_measured()
    assert ratios.keys() == {"even", "zipf", "hot"}
    for routing, by_policy in ratios.items():
        assert by_policy == {name: pytest.approx(1, abs=0.1) for name in ("cost", "plain")}, routing


@given(st.integers(1, 64))
def test_a_cluster_has_full_nodes_or_a_part_of_one(gpus: int) -> None:
    machine = read_machine("h200")
    if gpus <= 8:
        assert topology_of(machine, gpus).nodes == 1
    elif gpus % 8 == 0:
        assert topology_of(machine, gpus).nodes == gpus // 8


def test_measured_times_replace_what_they_measure(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    amounts = [2**20 * (1 + i) for i in range(12)]
    samples = {
        "across": [[n, 1e-5 + n / 25e9] for n in amounts],
        "products": [[n * 1e6, 2e-5 + n * 1e6 / 400e12] for n in amounts],
    }
    file.write_text(json.dumps(samples))
    before = read_machine("h200")
    machine, lines = profiled(before, file)
    assert machine.across.gbytes == pytest.approx(25) and machine.across.latency_s == pytest.approx(1e-5)
    assert machine.product_tflops == pytest.approx(400) and machine.within == before.within
    assert machine.memory_tbytes == before.memory_tbytes
    assert len(lines) == 2 and all("r² 1.0000" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "neither YAML nor JSON"),
        ("acros: [[1, 2], [2, 3]]", "acros"),
        ("across: [[1, 2], [2]]", "across.1"),
        ("- 1", "the whole file"),
        ("across: [[1, 2]]", "two amounts or more"),
        ("across: []", "two amounts or more"),
        ("across: [[1, 2], [2, -3]]", "not negative"),
        ("within: [[1, 3], [2, 2], [3, 1]]", "larger amounts took no longer"),
    ],
)
def test_what_is_no_profile_is_explained(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        profiled(read_machine("h200"), file)


def test_a_profile_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-file"):
        profiled(read_machine("h200"), tmp_path / "no-such-file")
