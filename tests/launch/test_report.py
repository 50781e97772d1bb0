"""The report is one file that asks the network for nothing, shows what was recorded and escapes what it did not write."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kernels.errors import UserError
from launch.cli import load
from launch.figures import LINES, PANELS
from launch.report import write_report
from trainer.config.rl import RLConfig
from trainer.config.run import PretrainConfig
from trainer.metrics import METRICS, Value, metrics_of
from trainer.run_dir import RunDir

REPOSITORY = Path(__file__).parents[2]
VOID = {"meta", "br"}


def pretraining(steps: int) -> Iterable[Mapping[str, Value]]:
    for step in range(1, steps + 1):
        skewed = 0.25 + 0.25 / step
        load_LE = [[skewed, *[(1 - skewed) / 3] * 3], [0.25] * 4]
        yield {"train/loss": 7 / step, "moe/max_vio": 1 / step, "perf/tokens_per_s": 9000.0 + step, "moe/load": load_LE,
               "train/tokens": 100, "time/step_s": 0.5, "eval/bits_per_byte": 3 / step}  # fmt: skip


def rounds(count: int) -> Iterable[Mapping[str, Value]]:
    for done in range(1, count + 1):
        yield {"reward/mean": done / count, "rollout/stale_token_share": 0.25, "rollout/length_mean": 20.0, "train/tokens": 50,
               "moe/max_vio": 0.5, "moe/dead_experts": 3.0, "rollout/lengths": [[0.75, 0.25], [0.5, 0.5]]}  # fmt: skip


def record(run: RunDir, records: Iterable[Mapping[str, Value]]) -> Path:
    lines = [json.dumps({"stage": run.kind, "step": step, **values}) for step, values in enumerate(records, start=1)]
    run.metrics_file.write_text("".join(line + "\n" for line in lines))
    run.close("finished")
    return run.path


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    config = load(PretrainConfig, "pretrain", [f"runs_dir={tmp_path}", "run_name=base"])
    return record(RunDir.open(config, "pretrain"), pretraining(30))


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    config = load(RLConfig, "rl", [f"runs_dir={tmp_path}", "run_name=tuned", "checkpoint='<script>alert(1)</script>'"])
    return record(RunDir.open(config, "rl"), rounds(12))


class Page(HTMLParser):
    """Checks that elements close in order; collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_one_page_shows_both_stages(pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert write_report([pretrained, tuned], out) == out
    page = Page(out.read_text(encoding="utf-8"))
    text = " ".join(page.words)
    for part in (
        "Pretraining",
        "Reinforcement learning",
        "base",
        "tuned",
        "finished, attempt 1",
        "3,000 tokens in 0:15",
        "Bits per byte",
    ):
        assert part in text
    assert text.index("Pretraining") < text.index("Reinforcement learning")
    assert "7.0000" in text and "0.2333" in text  # first and last loss
    assert "top_k: 2" in text  # the configuration


def test_rounds_show_their_balance_and_the_lengths_that_were_trained_and_drawn(tuned: Path, tmp_path: Path) -> None:
    page = Page(write_report([tuned], tmp_path / "r.html").read_text(encoding="utf-8"))
    labels = [attributes.get("aria-label") or "" for tag, attributes in page.tags if tag == "svg"]
    assert "Lengths after round 12: trained 12.0 tokens in the mean, drawn 16.0" in labels  # bins of 1..16 and 17..32
    assert any(label.startswith("Balance of the experts: MaxVio from 0.500") for label in labels)
    assert any(label.startswith("Experts without a token: dead experts from 3 to 3") for label in labels)
    assert {"trained", "drawn"} <= {word.strip() for word in page.words}


def test_every_figure_has_a_text_for_those_who_cannot_see_it(pretrained: Path, tmp_path: Path) -> None:
    page = Page(write_report([pretrained], tmp_path / "r.html").read_text(encoding="utf-8"))
    labels = [attributes.get("aria-label") or "" for tag, attributes in page.tags if tag == "svg"]
    assert len(labels) == 6  # five panels that have values, and the load of the experts
    assert "Loss: loss from 7.0000 to 0.2333" in labels
    assert any("Load of 4 experts in 2 layers: the fullest from 2.00 to 1.03 times the mean" in label for label in labels)


def test_axes_have_labels_and_panels_have_meanings(pretrained: Path, tmp_path: Path) -> None:
    text = " ".join(Page(write_report([pretrained], tmp_path / "r.html").read_text(encoding="utf-8")).words)
    for label in ("step", "nats", "bits/byte", "tokens/s", "expert", "load / mean load", METRICS["moe/max_vio"].meaning):
        assert label in text


def test_the_page_asks_the_network_for_nothing(pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    text = write_report([pretrained, tuned], tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|<script|<link|<iframe", text)
    for tag, attributes in Page(text).tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, value)


def test_ids_are_unique_and_references_lead_somewhere(pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    text = write_report([pretrained, tuned], tmp_path / "r.html").read_text(encoding="utf-8")
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', text)) != set()
    for pair in re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', text):
        assert (pair[0] or pair[1]) in ids


def test_what_came_from_outside_is_escaped(tuned: Path, tmp_path: Path) -> None:
    text = write_report([tuned], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_the_same_records_give_the_same_page(pretrained: Path, tmp_path: Path) -> None:
    pages = [write_report([pretrained], tmp_path / name).read_text() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_values_that_are_not_finite_and_single_points_do_no_harm(tmp_path: Path) -> None:
    config = load(PretrainConfig, "pretrain", [f"runs_dir={tmp_path}"])
    broken = [
        {"train/loss": float("nan")},
        {"train/loss": 2.0, "eval/loss": 1.0},
        {"train/loss": float("inf")},
        {"train/loss": 1.0},
    ]
    run = record(RunDir.open(config, "pretrain"), broken)
    text = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Loss: loss from 2.0000 to 1.0000" in text


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    config = load(PretrainConfig, "pretrain", [f"runs_dir={tmp_path}"])
    run = record(RunDir.open(config, "pretrain"), pretraining(5000))
    assert write_report([run], tmp_path / "r.html").stat().st_size < 600_000


def test_panels_show_metrics_of_their_stage() -> None:
    assert all(len(panel.keys) <= len(LINES) for panels in PANELS.values() for panel in panels), "a colour for every line"
    for stage, panels in PANELS.items():
        known = {metric.key for metrics in metrics_of(stage).values() for metric in metrics}
        assert {key for panel in panels for key in panel.keys} <= known


def test_the_command_writes_beside_the_last_run_and_names_what_is_missing(pretrained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.report"]
    done = subprocess.run([*command, str(pretrained)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(pretrained / "report.html")), done.stderr
    (tmp_path / "empty").mkdir()
    done = subprocess.run([*command, str(tmp_path / "empty")], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "is not a run folder" in done.stderr and "Traceback" not in done.stderr


def test_a_run_without_records_is_a_message(tmp_path: Path) -> None:
    run = RunDir.open(load(PretrainConfig, "pretrain", [f"runs_dir={tmp_path}"]), "pretrain")
    with pytest.raises(UserError, match="has no records yet"):
        write_report([run.path], tmp_path / "r.html")


def test_a_run_without_its_configuration_is_a_message(pretrained: Path, tmp_path: Path) -> None:
    shutil.copytree(pretrained, copy := tmp_path / "copy")
    (copy / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"copy/config\.yaml cannot be read: No such file"):
        write_report([copy], tmp_path / "r.html")


def test_a_place_that_cannot_be_written_is_a_message(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_report([pretrained], tmp_path / "no" / "such" / "folder.html")
