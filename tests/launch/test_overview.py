"""All benchmarks that have others beside ours, in one command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.bench import BENCHMARKS, main
from launch.benchmarks import overview


def times(**medians: float) -> dict[str, dict[str, dict[str, float]]]:
    return {name: {"time": {"median_ms": median_ms}} for name, median_ms in medians.items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU")
def test_each_runs_and_the_table_has_the_fastest_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(overview, "COMPARED", ("router", "nothing"))
    assert main([]) == 1, "one of them cannot run"
    printed = capsys.readouterr().out
    (forward, both) = overview.read(tmp_path / "bench-router.json")
    assert forward.peer == both.peer == "torch" and forward.peer_ms is not None
    (line,) = (line for line in printed.splitlines() if f"{forward.work} " in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    ratio = f"{forward.peer_ms / forward.ours_ms:.2f}x"
    assert cells == [forward.work, "torch", f"{forward.peer_ms:.3f}", f"{forward.ours_ms:.3f}", ratio]
    assert "nothing: ended with code 2" in printed and "not to be fast" in printed


def test_the_fastest_is_another_one_and_none_of_our_variants() -> None:
    rows = [
        {"direction": "forward", "peer": peer, "theirs": found, "ours": times(ours=2.0)["ours"]}
        for peer, found in times(ep=3.0, faster=2.5, local=1.0, waits=1.5, no_copies=1.2).items()
    ]
    cases = [{"work": "a layer", "rows": rows}, {"work": "an update", "updates": times(tessera=4.0, transformers=9.0)}]
    alone = {"work": "an update alone", "updates": times(tessera=4.0)}
    assert list(overview.lines({"cases": [*cases, alone]})) == [
        overview.Line("a layer: forward", 2.0, "faster", 2.5),
        overview.Line("an update", 4.0, "transformers", 9.0),
        overview.Line("an update alone", 4.0, None, None),
    ]


@pytest.mark.parametrize(("gpus", "told"), [(0, []), (1, []), (2, ["ranks=2"]), (8, ["ranks=8"]), (3, [])])
def test_updates_take_all_gpus_among_which_experts_divide(gpus: int, told: list[str]) -> None:
    assert overview.options("pretrain", gpus) == told


def test_one_gpu_has_no_exchange_to_compare() -> None:
    assert overview.options("fssdp", 1) is None
    assert set(overview.COMPARED) <= {name for name, one in BENCHMARKS.items() if one.peers}
