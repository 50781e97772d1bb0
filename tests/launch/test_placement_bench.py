"""Policies are replayed on drawn and recorded loads; the table shows what the file holds; nobody knows the future."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bench import main
from launch.benchmarks.options import SHAPES
from launch.benchmarks.placement import SYSTEMS, costs_of, moving_time, owners, packed_owners, replay
from launch.benchmarks.traces import DRAWN, capped, draw
from parallel.layer_cost import Setting
from parallel.placement import Budget, Topology

SMALL = [
    "placement",
    "tokens=512",
    "experts=16",
    "top_k=2",
    "devices=4,12",
    "per_node=4",
    "memory=2",
    "steps=4",
    "layers=3",
    "reshard_every=2",
    "machine=a100",
]


def test_the_table_shows_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "placement.json"
    assert main([*SMALL, f"out={out}"]) == 0
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line.startswith("│")]
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [case["sizes"]["devices"] for case in cases] == [4, 12] and len(lines) == 2 * len(SYSTEMS)
    assert all("over what two H200 took" in case["notes"][0] for case in cases) and "hot" in printed
    wanted = [(case["replayed"][policy], policy, case["replayed"]["plain"]) for case in cases for policy in SYSTEMS]
    for (by_trace, policy, plain), line in zip(wanted, lines, strict=True):
        assert set(by_trace) == set(DRAWN)
        seconds, baseline = (
            [sum(step.values()) for one in traces.values() for step in one["times"]] for traces in (by_trace, plain)
        )
        assert (
            line[0] == policy and line[1] == f"{1e3 * geometric_mean(seconds):.2f}" and line[2] == f"{1e3 * max(seconds):.2f}"
        )
        assert line[3] == f"{geometric_mean(baseline) / geometric_mean(seconds):.2f}x"
        assert all(one["copies"] <= 2 for one in by_trace.values())


def test_a_run_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shares = [[[0.7, 0.1, 0.1, 0.1], [0.25] * 4]] * 3  # two layers, three steps
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "moe/load": s}) + "\n" for i, s in enumerate(shares)))
    out = tmp_path / "placement.json"
    assert main([*SMALL, "experts=4", "devices=4", "trace=", f"run={run}", f"out={out}"]) == 0
    replayed = json.loads(out.read_text(encoding="utf-8"))["cases"][0]["replayed"]
    assert set(replayed["plain"]) == {"run"} and len(replayed["plain"]["run"]["times"]) == 2 * 2
    assert replayed["plain"]["run"]["imbalance"] == pytest.approx((2.8 + 1.0) / 2)
    assert replayed["cost"]["run"]["imbalance"] < 1.3
    assert main([*SMALL, f"run={tmp_path}", f"out={out}"]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    assert main([*SMALL, "trace=", f"out={out}"]) == 2
    assert "trace names no loads to replay" in capsys.readouterr().err


def test_a_single_step_is_not_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={tmp_path / 'placement.json'}"
    assert main([*SMALL, "steps=1", out]) == 2
    assert "steps" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "moe/load": [[0.7, 0.1, 0.1, 0.1]]}) + "\n")
    assert main([*SMALL, "experts=4", "devices=4", "trace=", f"run={tmp_path}", out]) == 2
    assert "has one record of moe/load; a step is planned from those before it" in capsys.readouterr().err


@given(st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=20), st.integers(1, 4))
def test_no_expert_gets_more_than_one_choice_of_a_token(popularity: list[float], top_k: int) -> None:
    popularity_E = np.array(popularity)
    share_E = capped(popularity_E, 1 / top_k)
    assert share_E.sum() == pytest.approx(1.0) and share_E.max() <= 1 / top_k * (1 + 1e-9)
    order = np.argsort(popularity_E, kind="stable")
    assert (np.diff(share_E[order]) >= -1e-12).all(), "more popular, smaller share"


@pytest.mark.parametrize("name", DRAWN)
def test_traces_count_every_entry(name: str) -> None:
    loads_SE = draw(name, 6, 32, 10_000, 4, np.random.default_rng(0))
    assert loads_SE.shape == (6, 32) and (loads_SE.sum(axis=1) == 10_000).all() and (loads_SE >= 0).all()


def test_only_those_who_plan_after_the_gate_know_the_step() -> None:
    """Two halves of a trace whose hot experts change: who plans ahead is surprised once, who plans behind the gate never."""
    loads_SE = np.ones((6, 16))
    loads_SE[:3, :2] = loads_SE[3:, 10:12] = 200.0
    costs = costs_of("h200", replace(SHAPES["tiny"], hidden=2048, expert_hidden=768), tokens=1)
    setting = Setting(Topology(8, 8), 2, Budget(16, 4), False, costs)
    loads_SE *= 1000
    for name, surprised in (("cost", True), ("hecate", True), ("llep", False), ("cost+gate", False)):
        seconds = replay(name, loads_SE[:, None], setting).seconds
        jump, steady = seconds[-3], seconds[0] if surprised else seconds[-1]
        assert (jump > 1.5 * steady) == surprised, (name, seconds)


def test_owners_move_where_that_spreads_loads_and_their_way_is_counted() -> None:
    """Each layer's hot experts have one owner. New ones share them, after the way of what moved, once."""
    loads_SLE = np.ones((7, 2, 16)) * 1000
    loads_SLE[:, :, :4] = 50_000.0
    costs = costs_of("h200", replace(SHAPES["tiny"], hidden=2048, expert_hidden=768), tokens=1)
    setting = Setting(Topology(4, 2), 2, Budget(0, 0), False, costs)
    for name in ("cost+gate+owners", "hecate", "eplb"):
        found = replay(name, loads_SLE, setting, reshard_every=3)
        moved, uneven = found.owners_moved, [step.owners_s > 0 for step in found.times]
        assert moved > 0 and uneven == [False] * 4 + [True] * 2 + [False] * 6, name  # steps 1 and 2 of two layers, then 3
        assert found.times[-1].products_s < 0.5 * found.times[0].products_s, name
        moving_s, later_s = (step.total_s - step.planning_s for step in (found.times[4], found.times[-2]))
        assert moving_s == pytest.approx(later_s + found.times[4].owners_s), name
    kept = replay("cost", loads_SLE, setting, reshard_every=3)
    assert kept.owners_moved == 0 and kept.times[-1].products_s == kept.times[0].products_s
    free = replay("laer", loads_SLE, setting)
    assert free.times[0].products_s < 0.5 * kept.times[0].products_s and free.owners_moved == 0


def test_moving_an_expert_takes_as_long_as_its_state() -> None:
    costs = costs_of("h200", SHAPES["tiny"], tokens=1)
    setting = Setting(Topology(4, 2), 2, Budget(0, 0), False, costs)
    old_LE = np.array([[0, 1, 2, 3]])
    for new, link in (([1, 0, 2, 3], costs.within), ([2, 1, 0, 3], costs.across)):
        assert moving_time(old_LE, np.array([new]), setting) == pytest.approx(
            link.latency_s + 3 * costs.sum_bytes * link.byte_s
        )
    assert moving_time(old_LE, old_LE, setting) == 0


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.integers(0, 2**32 - 1))
def test_packed_owners_are_even_and_the_hottest_are_apart(experts: int, devices: int, first: int, seed: int) -> None:
    loads_E = np.random.default_rng(seed).permutation(np.arange(1.0, experts + 1))
    owner_E = packed_owners(loads_E, devices, first)
    assert np.bincount(owner_E, minlength=devices).max() <= -(-experts // devices)
    hottest_E = np.argsort(-loads_E)[:devices]
    assert len(np.unique(owner_E[hottest_E])) == len(hottest_E)


@given(st.integers(1, 300), st.integers(1, 300))
def test_owners_are_even(experts: int, devices: int) -> None:
    owner_E = owners(experts, devices)
    counts_D = np.bincount(owner_E, minlength=devices)
    assert len(counts_D) == devices and counts_D.max() - counts_D.min() <= 1
