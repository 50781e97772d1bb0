"""W&B's workspace for the runs of a project, made from the table of metrics: a section per group, a panel per metric.

Pretraining and RL have a workspace each, since their steps differ. The first online run makes it. After that it belongs to the
people who use it: later runs leave it alone, and `python -m launch.report RUN --wandb` adds panels for metrics that
have none in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from wandb_workspaces import expr
from wandb_workspaces.reports.v2 import Layout, LinePlot
from wandb_workspaces.workspaces import RunsetSettings, Section, Workspace, WorkspaceSettings

from trainer.metrics import AXES, GROUPS, STEP_WORDS, Metric, Stage, metrics_of

NAMES: dict[Stage, str] = {"pretrain": "Tessera pretraining", "rl": "Tessera RL"}
COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 3, 8, 6  # of a grid that is 24 units wide


def panels(stage: Stage, metrics: Sequence[Metric]) -> list[LinePlot]:
    """A curve for each metric against the stage's step, from left to right and from top to bottom."""
    return [
        LinePlot(
            title=metric.label,
            x=AXES[stage],
            y=[metric.key],
            title_x=STEP_WORDS[stage],
            title_y=metric.unit or None,
            layout=Layout(x=place % COLUMNS * PANEL_WIDTH, y=place // COLUMNS * PANEL_HEIGHT, w=PANEL_WIDTH, h=PANEL_HEIGHT),
        )
        for place, metric in enumerate(metrics)
    ]


def complete(workspace: Workspace, stage: Stage) -> Workspace:
    """The workspace with a panel for every metric of the stage. What is in it already stays where and as it is."""
    sections = {section.name: section for section in workspace.sections}
    shown = {
        str(key) for section in workspace.sections for panel in section.panels if isinstance(panel, LinePlot) for key in panel.y
    }
    for word, metrics in metrics_of(stage).items():
        missing = [metric for metric in metrics if metric.key not in shown]
        title = GROUPS[word].title
        if missing and title not in sections:
            sections[title] = Section(name=title, is_open=True)
        if missing:
            sections[title].panels = [*sections[title].panels, *panels(stage, missing)]
    workspace.sections = list(sections.values())
    return workspace


def ensure_workspace(entity: str, project: str, stage: Stage, add_panels: bool = False) -> str:
    """Makes the project's workspace of this stage where there is none; its address. `add_panels`: also to one that is there.

    W&B is asked twice at most, and an answer that does not come is an error after 20 seconds each. Raises what W&B's library
    does: it has no common class for what a server can refuse.
    """
    found = _find(entity, project, stage)
    if found is not None and not add_panels:
        return str(found.url)
    return str(complete(found or _empty(entity, project, stage), stage).save().url)


def _name(stage: Stage) -> str:
    """By which W&B finds it in the project; in its address as well."""
    return f"tessera{stage}"


def _find(entity: str, project: str, stage: Stage) -> Workspace | None:
    try:
        return Workspace.from_url(f"https://wandb.ai/{entity}/{project}?nw={_name(stage)}")  # the host is not looked at
    except ValueError as error:
        if "not found" in str(error):
            return None
        raise


def _empty(entity: str, project: str, stage: Stage) -> Workspace:
    workspace = Workspace(
        entity=entity,
        project=project,
        name=NAMES[stage],
        settings=WorkspaceSettings(x_axis=AXES[stage], max_runs=20),
        runset_settings=RunsetSettings(filters=[expr.Metric("JobType") == stage]),
    )
    workspace._internal_name = f"nw-{_name(stage)}-v"  # a drawn one otherwise, and the next run would make another
    return workspace
