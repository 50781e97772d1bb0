"""One page about one or more runs: `python -m launch.report RUN [RUN ...] [--out FILE] [--wandb]`.

The page is a single file that needs no network: curves are inline SVG, and all text from outside is escaped. It
follows the reader's light or dark setting. `--wandb` also writes a report about the runs at W&B.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from kernels.errors import UserError
from launch.cli import guarded
from launch.figures import figures
from launch.picture import draw_schedule
from launch.recorded import HEADINGS, Run
from trainer.records import summary
from trainer.run_dir import shown, write_atomically
from trainer.stopping import finished_first


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page about the run folders, in this order, to `out` and returns it.

    Raises:
        UserError: a folder is no run or has no records yet, or `out` cannot be written.
    """
    loaded = [Run.read(path) for path in runs]
    sections = [_section(run, f"r{number}") for number, run in enumerate(loaded)]
    title = " and ".join(run.path.name for run in loaded)
    page = PAGE.format(title=escape(title), css=CSS, lead=escape(_lead(loaded)), sections="\n".join(sections))
    try:
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"the report {shown(out)} cannot be written: {error.strerror}") from error
    return out


def conclude(run: Path) -> None:
    """The pages and pictures that a run folder gets once the run has ended; who stops the process meanwhile waits for them."""
    with finished_first("the report"):
        write_report([run], run / "report.html")
        draw_schedule(run)


# ---------------------------------------------------------------- the page


def _lead(runs: Sequence[Run]) -> str:
    kinds = {run.stage for run in runs}
    if kinds == {"pretrain", "rl"}:
        return "A sparse mixture-of-experts language model, pretrained and then fine-tuned by reinforcement learning."
    if kinds == {"rl"}:
        return "Reinforcement learning of a sparse mixture-of-experts language model on a task with a verifiable reward."
    return "Pretraining of a sparse mixture-of-experts language model."


def _section(run: Run, mark: str) -> str:
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in run.facts())
    return SECTION.format(
        heading=HEADINGS[run.stage],
        name=escape(run.path.name),
        facts=facts,
        table=_summary_table(run),
        figures="\n".join(figures(run, mark)),
        config=escape(run.config_text),
    )


def _summary_table(run: Run) -> str:
    rows = ""
    for change in summary(run.stage, run.records):
        cells = "".join(f"<td>{escape(text)}</td>" for text in (change.unit, change.first, change.last))
        rows += f"<tr><th scope='row'>{escape(change.label)}</th>{cells}</tr>"
    return f"<table><thead><tr><th></th><th>unit</th><th>first</th><th>last</th></tr></thead><tbody>{rows}</tbody></table>"


CSS = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #22262b; --soft: #667078; --line: #dfe2e4; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #dfe3e6; --soft: #98a1a9; --line: #30353a; --card: #1c1f23; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 22px; margin: 56px 0 4px; }
h3 { font-size: 15px; margin: 0 0 6px; }
p { margin: 0; color: var(--soft); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 13px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 14px 24px; margin: 22px 0 26px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
table { border-collapse: collapse; min-width: min(560px, 100%); font-variant-numeric: tabular-nums; }
th, td { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); text-align: left; font-weight: 400; }
thead th { color: var(--soft); font-size: 13px; }
th:nth-child(n+3), td:nth-child(n+3) { text-align: right; padding: 6px 0 6px 28px; }
td:nth-child(2) { color: var(--soft); }
td:last-child { font-weight: 600; }
.figures { display: grid; gap: 18px; margin: 30px 0 18px; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
figure { margin: 0; padding: 16px 18px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
figure.wide { grid-column: 1 / -1; }
figcaption { color: var(--soft); font-size: 13px; line-height: 1.45; margin-top: 8px; }
figcaption b { font-weight: 600; }
details { margin-top: 18px; }
summary { cursor: pointer; color: var(--soft); }
pre { overflow: auto; padding: 16px 18px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tessera: {title}</title>
<style>{css}</style>
</head>
<body>
<main>
<h1>Tessera</h1>
<p>{lead}</p>
{sections}
</main>
</body>
</html>
"""

SECTION = """<section>
<h2>{heading}</h2>
<p><code>{name}</code></p>
<dl>{facts}</dl>
{table}
<div class="figures">
{figures}
</div>
<details><summary>Configuration</summary><pre>{config}</pre></details>
</section>"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="Writes one page about one or more runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder, such as runs/latest-pretrain")
    parser.add_argument("--out", type=Path, help="the file to write; default: report.html in the last run folder")
    parser.add_argument("--wandb", action="store_true", help="write one at W&B too, and complete the project's workspace there")
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[-1] / "report.html"

    def work() -> None:
        print(shown(write_report(arguments.runs, out)))
        if arguments.wandb:
            from launch.wandb_report import write_at_wandb  # here, because the page needs none of it

            for address in write_at_wandb(arguments.runs):
                print(address)

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
