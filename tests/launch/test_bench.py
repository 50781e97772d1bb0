"""The benchmarks run for real on a CPU: what they print is what they write, and mistakes are said in words."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.bench import BENCHMARKS, main
from launch.benchmarks.contest import Difference, Inputs, compete
from launch.benchmarks.experts import draw_experts
from launch.benchmarks.options import Shape
from launch.benchmarks.timing import Ceilings
from launch.benchmarks.vocab_loss import Amount

REPOSITORY = Path(__file__).parents[2]
SMALL = {
    "experts": ["tokens=24,40", "routing=even,uniform", "hidden=16", "expert_hidden=8", "experts=4", "top_k=2", "peers="],
    "vocab_loss": ["tokens=40", "hidden=16", "vocabulary=96", "peers="],
    "router": ["tokens=40", "experts=12", "top_k=3"],
    "fssdp": ["tokens=24", "routing=even,hot", "hidden=16", "expert_hidden=8", "experts=4", "top_k=2", "memory=1"],
}
CASES = {"experts": 4, "vocab_loss": 1, "router": 1, "fssdp": 2}
PEERS = {
    "experts": {"torch"},
    "vocab_loss": {"naive", "chunked"},
    "router": {"torch"},
    "fssdp": {"ep", "no_copies", "local", "waits"},
}


Ran = tuple[dict[str, Any], list[list[str]]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ran]:
    """Runs a benchmark, once: what its JSON file holds, and the cells of its tables' lines."""

    @cache
    def run(name: str) -> Ran:
        out, printed = tmp_path_factory.mktemp(name) / "bench.json", io.StringIO()
        with redirect_stdout(printed):
            assert main([name, *SMALL[name], "repeats=3", f"out={out}"]) == 0
        lines = [line.strip() for line in printed.getvalue().splitlines() if line.startswith("│")]
        return json.loads(out.read_text(encoding="utf-8")), [
            [cell.strip() for cell in line.strip("│").split("│")] for line in lines
        ]

    return run


def test_ranks_act_as_if_on_several_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fssdp", *SMALL["fssdp"], "repeats=3", "nodes=2", f"out={tmp_path / 'bench.json'}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("tokens between 2 nodes, one way, experts on their owners: ") == CASES["fssdp"]
    assert printed.count("its parts alone (predicted): products ") == 2 * CASES["fssdp"], "with copies and without"
    for wrong, message in (
        ("nodes=3", "do not spread evenly over nodes = 3"),
        ("nodes=1 transport=two_level", "leave one level"),
    ):
        assert main(["fssdp", *SMALL["fssdp"], *wrong.split()]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tables of a GPU have columns for memory")
@pytest.mark.parametrize("name", SMALL)
def test_the_file_holds_what_the_table_printed(name: str, ran: Callable[[str], Ran]) -> None:
    record, lines = ran(name)
    assert len(record["cases"]) == CASES[name]
    rows = [row for case in record["cases"] for row in case["rows"]]
    assert len(lines) == len(rows) == CASES[name] * len(PEERS[name]) * 2
    for row, (direction, peer, *numbers) in zip(rows, lines, strict=True):
        theirs, ours = row["theirs"], row["ours"]
        assert (direction, peer) == (row["direction"], row["peer"])
        errors = [
            side["errors"]["output"]
            if direction == "forward"
            else max(error for of, error in side["errors"].items() if of != "output")
            for side in (theirs, ours)
        ]
        assert numbers == [
            f"{theirs['time']['median_ms']:.3f}", f"{theirs['rate']:.4g}", f"{ours['time']['median_ms']:.3f}",
            f"{ours['rate']:.4g}", f"{row['ratio']:.2f}x", f"{row['ceiling_fraction']:.1%}", *(f"{e:.1e}" for e in errors),
        ]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_the_numbers_belong_together(name: str, ran: Callable[[str], Ran]) -> None:
    record, _ = ran(name)
    assert record["benchmark"] == name and record["torch"] == torch.__version__ and record["options"]["seed"] == 0
    for case in record["cases"]:
        assert not case["failures"] and {row["peer"] for row in case["rows"]} >= PEERS[name]
        ceiling = record["ceilings"]["tflops" if case["unit"] == "TF/s" else "copy_tbytes"]
        for row in case["rows"]:
            theirs, ours = row["theirs"], row["ours"]
            assert row["ratio"] == theirs["time"]["median_ms"] / ours["time"]["median_ms"]
            assert row["ceiling_fraction"] == ours["rate"] / ceiling
            for side in (theirs, ours):
                time = side["time"]
                assert side["rate"] == case["counted"][row["direction"]] / time["median_ms"] / 1e9
                assert time["samples"] == 3 and 0 < time["min_ms"] <= time["median_ms"] and time["spread"] >= 0
                assert all(error < (2e-2 if torch.cuda.is_available() else 1e-5) for error in side["errors"].values())


def test_every_gradient_is_checked(ran: Callable[[str], Ran]) -> None:
    record, _ = ran("experts")
    assert set(record["cases"][0]["rows"][0]["ours"]["errors"]) == {"output", "x_TD", "weights_TK", "gate_up_ECD", "down_EDF"}
    sizes = record["cases"][0]["sizes"]
    products = sizes["tokens"] * sizes["top_k"] * sizes["hidden"] * sizes["expert_hidden"]
    assert record["cases"][0]["counted"] == {"forward": 6 * products, "forward+backward": 18 * products}


def test_mistakes_are_all_reported_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", "tokns=5", "repeats=x", "routing=zipf,evn", "hidden=0", "tokens=", "--fast", "out=no/x.json"]) == 2
    heading, *lines = capsys.readouterr().err.splitlines()
    assert heading == "config: 7 problems"
    assert {" ".join(line.split()) for line in lines} == {
        "--fast unknown flag; options are written name=value, see --help",
        "tokns = 5 unknown option; did you mean tokens?",
        "repeats = x should be a whole number",
        "routing = evn should be even, zipf or uniform; did you mean even?",
        "hidden = 0 should be greater than 0",
        'tokens = "" should have at least 1 item after validation, not 0',
        "out = no/x.json there is no folder no",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["expert"],
            "expert is not a benchmark; did you mean experts? choices: " + ", ".join(BENCHMARKS),
        ),
        (["router", "top_k=9", "experts=8"], "top_k = 9 of model = tiny is more than its 8 experts"),
        (["vocab_loss", "peers=liger"], "peers = liger needs a GPU, and torch finds none here"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the defaults of a CPU")
def test_a_mistake_ends_with_code_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].strip() == said


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for benchmark in BENCHMARKS.values():
        assert all(f"  {name}=" in printed for name in benchmark.options.model_fields)
    assert main(["placement", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "options of placement" in printed and printed.count("options of ") == 1


def test_the_command_needs_none_of_the_packages_that_runs_need() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['ray', 'hydra', 'omegaconf', 'deepspeed', 'wandb']));"
        "from launch.bench import main; sys.exit(main(['--help']))"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


@settings(max_examples=40, deadline=None)
@given(experts=st.integers(1, 24), top_k=st.integers(1, 24), tokens=st.integers(1, 50), seed=st.integers(0, 99))
def test_routings_choose_different_experts_and_even_ones_are_even(experts: int, top_k: int, tokens: int, seed: int) -> None:
    top_k = min(top_k, experts)
    generator = torch.Generator().manual_seed(seed)
    for routing in ("even", "zipf", "uniform"):
        experts_TK = draw_experts(Shape(1, 1, experts, top_k, 1), tokens, routing, generator)
        assert experts_TK.shape == (tokens, top_k) and experts_TK.dtype == torch.int64
        assert experts_TK.min() >= 0 and experts_TK.max() < experts
        assert all(len(set(row)) == top_k for row in experts_TK.tolist())
        if routing == "even":
            counts_E = experts_TK.flatten().bincount(minlength=experts)
            assert counts_E.max() - counts_E.min() <= (tokens * top_k % experts != 0)


def test_a_peer_that_cannot_is_named_and_the_others_are_timed() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this size\nand more")

    case = compete(
        work="double",
        sizes={},
        amount=Amount({"forward": 1.0, "forward+backward": 2.0}, "TB/s"),
        ours=lambda x: 2 * x,
        peers={"broken": lambda: broken, "sum": lambda: lambda x: x + x},
        sets=[Inputs({"x": torch.ones(3, requires_grad=True)}, pull=torch.ones(3))],
        errors_of=lambda work: {"output": 0.0, "x": float(work(torch.ones(3)).sum()) - 6.0},
        matrices=set(),
        ceilings=Ceilings("", 1.0, "", 1.0),
        repeats=2,
    )
    assert [row.peer for row in case.rows] == ["sum", "sum"]
    assert case.failures["broken"].startswith("RuntimeError: no kernel for this size (test_bench.py:")


def test_the_error_is_a_relative_frobenius_norm() -> None:
    difference = Difference()
    difference.add(torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    difference.add(torch.tensor([[12.0]]), torch.tensor([[12.0]]))
    assert difference.relative == pytest.approx(4 / 13)


def test_collectives_are_timed_between_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert main(["collectives", "hidden=16", "expert_hidden=8", "copies=1,2", "repeats=3", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [case["sizes"]["copies"] for case in cases] == [1, 2]
    for case in cases:
        expert = 3 * 16 * 8 * (2 if torch.cuda.is_available() else 4)
        assert case["moved"]["gather"]["received_bytes"] == case["sizes"]["copies"] * expert
        for name, moved in case["moved"].items():
            assert f"{name} " in printed and moved["time"]["median_ms"] > 0 and moved["time"]["samples"] == 3
    assert main(["collectives", "copies=5", f"out={out}"]) == 2
    assert "2 ranks own fewer of 8 experts each" in capsys.readouterr().err
