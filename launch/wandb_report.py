"""A report about runs at W&B: their settings and results, and a curve for each metric that they logged, by group.

A second call rewrites it at the same address. The runs must be at W&B, online or after `wandb sync`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
from wandb_workspaces import expr
from wandb_workspaces.reports.v2 import H2, H3, MarkdownBlock, PanelGrid, Report, Runset

from kernels.errors import UserError
from launch.recorded import HEADINGS, Run
from trainer.metrics import GROUPS, Metric, metrics_of
from trainer.records import summary
from trainer.run_dir import write_atomically
from trainer.workspace import ensure_workspace, panels

FILE = "wandb_report.json"  # in the last run's folder: which report it is
TITLE = 128  # characters that a title may have


def write_at_wandb(paths: Sequence[Path]) -> list[str]:
    """The addresses of the report and of the workspaces of the runs' project, which get the panels that they have not.

    Raises:
        UserError: there is no key, W&B cannot be reached, or it refuses.
    """
    runs = [Run.read(path) for path in paths]
    if not os.environ.get("WANDB_API_KEY"):
        raise UserError("a report at W&B needs WANDB_API_KEY in the environment")
    logger = runs[-1].config["logger"]
    project = str(logger["project"])
    try:
        entity = str(logger["entity"] or wandb.Api().default_entity)
        workspaces = [ensure_workspace(entity, project, stage, add_panels=True) for stage in {run.stage: 0 for run in runs}]
        return [_save(report(runs, entity, project), runs[-1]), *workspaces]
    except Exception as error:  # of many libraries and of a server: all of it is told
        why = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"no report at W&B about project {project}: {why}. Look at WANDB_API_KEY, logger.entity, logger.project, network"
        ) from error


def report(runs: Sequence[Run], entity: str, project: str) -> Report:
    """Of each run its facts, first and last values, and the curves of all numbers that it logged more than once."""
    blocks: list[Any] = []
    for run in runs:
        curves = {
            GROUPS[word].title: [metric for metric in metrics if len(run.points(metric.key)) > 1]
            for word, metrics in metrics_of(run.stage).items()
        }
        blocks += [H2(f"{HEADINGS[run.stage]}: {run.path.name}"), MarkdownBlock(_words(run))]
        for title, metrics in curves.items():
            if metrics:
                blocks += [H3(title), _grid(run, metrics, entity, project)]
    title = " and ".join(run.path.name for run in runs)
    return Report(entity=entity, project=project, title=f"Tessera: {title}"[:TITLE], blocks=blocks, width="fluid")


def _grid(run: Run, metrics: Sequence[Metric], entity: str, project: str) -> PanelGrid:
    only = Runset(entity=entity, project=project, name=run.path.name, filters=[expr.Metric("ID") == run.status["id"]])
    return PanelGrid(runsets=[only], hide_run_sets=True, panels=[*panels(run.stage, metrics)])


def _words(run: Run) -> str:
    """Facts and the table from first to last, in Markdown."""
    facts = "\n".join(f"- {name}: {_plain(value)}" for name, value in run.facts())
    changes = [(change.label, change.unit, change.first, change.last) for change in summary(run.stage, run.records)]
    rows = "\n".join(f"| {' | '.join(change)} |" for change in changes)
    return f"{facts}\n\n| metric | unit | first | last |\n|---|---|---:|---:|\n{rows}"


def _plain(text: str) -> str:
    """What came from outside as text, whatever Markdown would make of it."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def _save(made: Report, run: Run) -> str:
    """Saves it in the place of the one that FILE tells of, unless the folder was another W&B run then; its address, which FILE
    keeps."""
    file, about = run.path / FILE, run.status["id"]
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if earlier is not None and earlier["run"] == about:
        made.id = earlier["id"]
    made.save()
    write_atomically(file, json.dumps({"id": made.id, "url": made.url, "run": about}))
    return str(made.url)
