"""The workspace and the report at W&B show what the table of metrics and the run have, and nothing that is secret."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from wandb_workspaces.workspaces import Section, Workspace

from kernels.errors import UserError
from launch.cli import load
from launch.report import main
from launch.wandb_report import FILE, write_at_wandb
from tests.wandb_server import ENTITY, SECRET, WandbServer, at
from trainer.config.run import PretrainConfig
from trainer.metrics import GROUPS, metrics_of
from trainer.run_dir import RunDir
from trainer.workspace import complete, ensure_workspace, panels


@pytest.fixture
def run(tmp_path: Path) -> Path:
    opened = RunDir.open(load(PretrainConfig, "pretrain", [f"runs_dir={tmp_path}", "run_name=a_run"]), "pretrain")
    records = [
        {"stage": "pretrain", "step": step, "train/loss": 7.0 - step, "moe/max_vio": 0.5, "moe/load": [[1.0]]}
        for step in range(3)
    ]
    opened.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    opened.close("finished")
    return opened.path


def shown(view: dict[str, str]) -> dict[str, list[str]]:
    """Section -> the keys of its curves, of a saved workspace."""
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    return {section["name"]: [panel["config"]["metrics"][0] for panel in section["panels"]] for section in sections}


@pytest.mark.parametrize("stage", ["pretrain", "rl"])
def test_a_workspace_has_a_section_a_group_and_a_curve_a_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with WandbServer() as server, at(server.url, tmp_path, monkeypatch):
        address = ensure_workspace(ENTITY, "tessera", stage)  # type: ignore[arg-type]
        assert ensure_workspace(ENTITY, "tessera", stage) == address and server.saved == 1  # type: ignore[arg-type]
    (view,) = server.views.values()
    expected = metrics_of(stage)  # type: ignore[arg-type]
    assert shown(view) == {GROUPS[word].title: [metric.key for metric in metrics] for word, metrics in expected.items()}
    axes = {
        panel["config"]["xAxis"]
        for section in json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
    }
    assert axes == {"train/step" if stage == "pretrain" else "rollout/round"}
    assert stage in json.dumps(json.loads(view["spec"])["section"]["runSets"]), "only runs of this stage are in it"


def test_what_a_person_made_of_a_workspace_stays_and_new_metrics_get_their_panels() -> None:
    loss = [metric for metric in metrics_of("pretrain")["train"] if metric.key == "train/loss"]
    mine = Section(name="Mine", panels=[*panels("pretrain", loss)])
    made = complete(Workspace(entity=ENTITY, project="tessera", sections=[mine]), "pretrain")
    keys = [panel.y[0] for section in made.sections for panel in section.panels]
    assert made.sections[0].name == "Mine" and len(made.sections[0].panels) == 1
    assert keys.count("train/loss") == 1 and len(keys) == sum(map(len, metrics_of("pretrain").values()))
    assert complete(made, "pretrain").sections == made.sections, "nothing is added twice"


def test_a_report_has_the_runs_curves_and_is_written_anew_in_its_place(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbServer() as server, at(server.url, tmp_path, monkeypatch):
        report, workspace = write_at_wandb([run])
        assert write_at_wandb([run])[0] == report
        copy = shutil.copytree(run, tmp_path / "copy")
        status = json.loads((copy / "status.json").read_text())
        (copy / "status.json").write_text(json.dumps(status | {"id": "another"}))  # as when the copy has gone on
        assert write_at_wandb([copy])[0] != report
    reports = [view for view in server.views.values() if view["type"] == "runs"]
    assert len({view["id"] for view in reports}) == 2 and json.loads((run / FILE).read_text())["url"] == report
    assert workspace.endswith("?nw=tesserapretrain")
    text = reports[0]["spec"]
    for part in (
        "train/loss",
        "moe/max_vio",
        "7.0000",
        "5.0000",
        "Pretraining: a_run",
        json.loads((run / "status.json").read_text())["id"],
    ):
        assert part in text, part
    assert "moe/load" not in text and "eval/loss" not in text and SECRET not in json.dumps(server.views)


def test_a_report_that_wandb_refuses_or_that_has_no_key_is_a_message(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbServer(refuses_views=True) as server, at(server.url, tmp_path, monkeypatch):
        with pytest.raises(UserError, match=r"no report at W&B about project tessera: .*permission denied") as error:
            write_at_wandb([run])
        assert SECRET not in str(error.value)
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UserError, match="needs WANDB_API_KEY"):
        write_at_wandb([run])


def test_the_command_prints_the_addresses(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.report", str(run), "--wandb"])
    with WandbServer() as server, at(server.url, tmp_path, monkeypatch):
        assert main() == 0
        page, report, workspace = capsys.readouterr().out.splitlines()
        assert page.endswith("report.html") and report.startswith(f"{server.url}/{ENTITY}/tessera/reports/")
        assert workspace.startswith(server.url)
