"""Every file in conf/ says what it is, composes and is valid; experiments hold deltas only."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.cli import CONF, group_choices, load
from rl.rewards.task import Task
from rl.rewards.tasks import TASKS, make_task
from trainer.config.plan import PlanConfig
from trainer.config.record import Record
from trainer.config.rl import RLConfig
from trainer.config.run import PretrainConfig

ROOTS: dict[str, type[Record]] = {"pretrain": PretrainConfig, "rl": RLConfig, "plan": PlanConfig}
REQUIRED = {  # what a choice leaves to the person
    ("data", "text"): ["data.paths=[a]"],
    ("data", "jsonl"): ["data.paths=[a]"],
    ("data", "parquet"): ["data.paths=[a]"],
    ("tokenizer", "file"): ["tokenizer.file=a"],
    ("cluster", "ray"): ["cluster.ranks=8"],
    ("task", "dataset"): ["task.options.path=a.jsonl"],
    ("model", "qwen3_30b_a3b"): ["balance=frozen"],
    ("model", "olmoe_7b_a1b"): ["balance=frozen"],
    ("experiment", "qwen3_30b_a3b"): ["data.paths=[a]", "tokenizer.file=a", "cluster.ranks=8"],
    ("experiment", "glm4_5_air_like"): ["data.paths=[a]", "tokenizer.file=a", "cluster.ranks=8"],
}
REQUIRED_TO_PLAN = {("model", "demo"): ["sequence_length=1024"]}
CHOICES = [
    (name, group, choice) for name, root in ROOTS.items() for group, cs in group_choices(root, name).items() for choice in cs
]
FILES = sorted(CONF.rglob("*.yaml"))


def composed(name: str, *arguments: str) -> Record:
    needed = ["checkpoint=a"] if name == "rl" else []
    return load(ROOTS[name], name, [*needed, *arguments])


@pytest.mark.parametrize(("name", "group", "choice"), CHOICES)
def test_every_choice_composes_into_a_valid_configuration(name: str, group: str, choice: str) -> None:
    required = REQUIRED_TO_PLAN if name == "plan" else REQUIRED
    config = composed(name, f"{group}={choice}", *required.get((group, choice), []))
    assert isinstance(config, ROOTS[name])


def test_every_file_is_reached_by_some_command() -> None:
    reached = {CONF / f"{name}.yaml" for name in ROOTS}
    for name, group, choice in CHOICES:
        folder = CONF / group / name if group == "experiment" else CONF / group
        reached.add(folder / f"{choice}.yaml")
    assert reached == set(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_file_begins_with_a_comment_that_says_what_it_is(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").removeprefix("# @package _global_\n").splitlines()
    comment = " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("# "), lines))
    assert comment.endswith((".", "`.")), comment
    assert max(map(len, lines)) <= 128


@pytest.mark.parametrize("name", ROOTS)
def test_a_primary_file_takes_its_own_values_last(name: str) -> None:
    assert OmegaConf.load(CONF / f"{name}.yaml").defaults[-1] == "_self_"


def leaves(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in leaves(value, f"{prefix}.{key}".lstrip(".")).items()}


@pytest.mark.parametrize(("name", "choice"), [(n, c) for n, g, c in CHOICES if g == "experiment"])
def test_an_experiment_holds_only_what_differs(name: str, choice: str) -> None:
    """Against the same groups without the experiment, each of its values must make a difference."""
    file = OmegaConf.load(CONF / "experiment" / name / f"{choice}.yaml")
    plain = OmegaConf.to_container(file)
    assert isinstance(plain, dict)
    overrides = [next(iter(entry.items())) for entry in plain.pop("defaults", [])]
    groups = [f"{str(key).removeprefix('override /')}={value}" for key, value in overrides]
    required = REQUIRED.get(("experiment", choice), [])
    extra = ["model.selection_bias=true"] if choice == "qwen3_30b_a3b" else []  # without it the groups alone are not valid
    without = leaves(composed(name, *groups, *required, *extra).model_dump(mode="json"))
    for key, value in leaves(plain).items():
        if f"{key}=true" not in extra:
            assert without[key] != value, f"{key} is {value} without the experiment too"


def test_the_tasks_of_conf_are_those_of_the_code() -> None:
    assert set(group_choices(RLConfig, "rl")["task"]) == set(TASKS)
    for name in TASKS:
        config = composed("rl", f"task={name}", *REQUIRED.get(("task", name), []))
        assert isinstance(config, RLConfig)
        assert isinstance(make_task(config.task, seed=0), Task)


def test_the_cache_follows_its_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_CACHE", "/somewhere/else")
    config = composed("pretrain")
    assert isinstance(config, PretrainConfig)
    assert config.data.cache_dir == Path("/somewhere/else")
    monkeypatch.delenv("TESSERA_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    config = composed("pretrain")
    assert isinstance(config, PretrainConfig)
    assert config.data.cache_dir == Path("/home/someone/.cache/tessera")
