"""What the README says is so: its file map, options, metrics and example are checked against the code."""

from __future__ import annotations

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from launch import submit
from launch.bench import BENCHMARKS
from launch.benchmarks.options import read_options
from launch.benchmarks.overview import COMPARED
from launch.cli import group_choices, load, option_names
from launch.submit import job_script
from rl.rewards.task import Prompt, Task
from rl.rewards.tasks import make_task
from tests.test_architecture import ROOMS
from trainer.cluster import choose_ranks
from trainer.config.plan import PlanConfig
from trainer.config.record import Record
from trainer.config.rl import RLConfig, TaskConfig
from trainer.config.run import PretrainConfig
from trainer.metrics import METRICS, markdown_table
from trainer.worker import check_division

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MADE = ("map.md", "metrics.md")  # pages that tests compare with the code as a whole
PAGES = "\n".join([README, *(f.read_text(encoding="utf-8") for f in (REPOSITORY / "docs").glob("*.md") if f.name not in MADE)])
ROOTS: dict[str, type[Record]] = {"pretrain": PretrainConfig, "rl": RLConfig, "plan": PlanConfig}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_file_map_names_every_module_and_no_other() -> None:
    room, named = "", set()
    for line in (REPOSITORY / "docs" / "map.md").read_text(encoding="utf-8").split("```")[1].splitlines():
        if line and not line.startswith(" "):
            room = line.split("/")[0]
        named |= {f"{room}/{name}" for name in re.findall(r"[\w/]+\.py", line)}
    files = {str(f.relative_to(REPOSITORY)) for r in ROOMS for f in (REPOSITORY / r).rglob("*.py") if f.name != "__init__.py"}
    assert named == files, f"only in the map: {named - files}; only on disk: {files - named}"


def test_the_page_of_metrics_is_the_table_of_the_code() -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == f"# Metrics\n\nMade from `trainer/metrics.py`.\n\n{markdown_table()}\n"


def test_metrics_and_options_in_the_pages_exist() -> None:
    quoted = [word for code in re.findall(r"`([^`\n]+)`", PAGES) for word in code.split()]
    options = {name for root in ROOTS.values() for name in option_names(root)}
    groups = {f"{g}={c}" for name, root in ROOTS.items() for g, cs in group_choices(root, name).items() for c in cs}
    checked = 0
    for word in quoted:
        if re.fullmatch(r"(train|eval|moe|rollout|reward|policy|value|sync|perf|time|mem)/[a-z_]+", word):
            assert word in METRICS, word
        elif word.startswith("launch.") or word.endswith((".py", ".html", ".json", ".jsonl", ".svg")):
            continue
        elif re.fullmatch(r"[a-z]+\.[a-z_]+(=\S+)?", word):
            assert word.partition("=")[0] in options, word
        elif re.fullmatch(r"[a-z]+=[a-z_]+", word):
            assert word in groups or word.partition("=")[0] in options, word
        else:
            continue
        checked += 1
    assert checked > 30


INDENTED = re.findall(r"^ {4}(?:\.venv/bin/)?python -m launch\.(\w+)(.*)$", PAGES, re.MULTILINE)
INLINE = re.findall(r"`python -m launch\.(\w+)([^`]*)`", PAGES)
COMMANDS = [(module, shlex.split(rest, comments=True)) for module, rest in INDENTED + INLINE]


def test_there_are_commands_of_every_kind_in_the_pages() -> None:
    assert {"pretrain", "rl", "submit", "plan", "bench", "doctor", "watch", "trace", "report", "convert"} <= dict(
        COMMANDS
    ).keys()
    assert {name for module, arguments in COMMANDS if module == "bench" for name in arguments[:1]} <= BENCHMARKS.keys()


def require_fit(config: Record) -> None:
    """Experts and rows of the model that it is about, the demo's unless it says otherwise, divide over its ranks."""
    if isinstance(config, PretrainConfig):
        rows, model = config.train.batch_rows, config.model
    elif isinstance(config, RLConfig):
        model, rows = load(PretrainConfig, "pretrain", []).model, 0
    else:
        return
    apart = config.rollout.engines_apart if isinstance(config, RLConfig) else 0
    check_division(model, rows, choose_ranks(config.cluster, apart))


@pytest.mark.parametrize(("module", "arguments"), COMMANDS, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_a_command_in_the_pages_is_one_that_its_module_takes(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its options are read as the command reads them; nothing is started."""
    roots = {**ROOTS, "doctor": PretrainConfig}
    if module in roots:
        require_fit(load(roots[module], "pretrain" if module == "doctor" else module, arguments))
    elif module == "submit":
        name, *options = arguments
        config = load(submit.COMMANDS[name], name, options)
        require_fit(config)
        assert f"launch.slurm.job --max-requeues={config.cluster.slurm.max_requeues}" in job_script(
            name, "job", config, options
        )
    elif module == "bench":
        for name, *options in [arguments] if arguments else [[name] for name in COMPARED]:
            for defaults in BENCHMARKS[name].defaults.values():
                read_options(BENCHMARKS[name].options, {**defaults, "out": "out.json"}, options)
    else:
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit):
            import_module(f"launch.{module}").main()
        helped = capsys.readouterr().out
        assert all(argument in helped for argument in arguments if argument.startswith("--"))


def test_the_task_in_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    (tmp_path / "capitals.py").write_text(code[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    task = make_task(TaskConfig(name="capitals:Capitals", options={}, eval_prompts=1), seed=0)
    assert isinstance(task, Task)
    prompt, text = task.demonstration(1)
    assert isinstance(prompt, Prompt) and task.score(prompt, text, True) == 1.0 and task.score(prompt, text, False) == 0.0
