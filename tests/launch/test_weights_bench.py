"""The benchmark of the weights' way: every way brings every bit, or it would stop; changes are small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.bench import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ways of a CPU")
def test_the_table_shows_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "weights.json"
    assert main(["weights", "layers=1", "changed=0.01,0.2", "repeats=2", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    broadcast, packed, few, many = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert (broadcast["way"], packed["way"]) == ("broadcast to cpu", "packed and read")
    assert 0 <= packed["nbytes"] - broadcast["nbytes"] < 16 * 20, "the same tensors, but for what aligns them in the block"
    assert few["nbytes"] < many["nbytes"] < packed["nbytes"] and max(few["of"], many["of"]) < 1.2
    for case in (broadcast, packed, few, many):
        assert case["ms"] > 0 and f"{case['ms']:.2f}" in printed and f"{case['nbytes'] / 1e6:,.3f}" in printed
