"""From the command line to one validated configuration, or to a message about everything that is wrong with it.

Hydra composes the files under conf/, and pydantic validates the result. Hydra alone stops at the first option it does not
know, so this module keeps two kinds of arguments apart: group choices (`model=demo`) are checked against the folders and
given to Hydra; single options (`train.steps=10`) are written into what Hydra composed. Then pydantic sees everything, and
every problem is reported at once, with the nearest name that exists.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from inspect import isclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from kernels.errors import UserError
from launch.problems import Problem, not_as_expected, report, unknown_option, written
from trainer.cluster import ProcessLost
from trainer.config.model import ModelConfig
from trainer.config.record import Record
from trainer.config.rl import RLConfig
from trainer.config.run import PretrainConfig
from trainer.console import tell, write_any_text
from trainer.estimate import budget_lines
from trainer.guard import UpdateRefused
from trainer.memory import keep_imports
from trainer.run_dir import as_yaml, leaves
from trainer.state import choose_dtype
from trainer.stopping import REQUEUE, Interrupted, Stopped

CONF = Path(__file__).parents[1] / "conf"
CTRL_C = 130  # exit code, as shells have it
Root = TypeVar("Root", bound=Record)


def guarded(work: Callable[[], object]) -> int:
    """Does a command's work; returns the exit code: 2 for a person's mistake, 1 for a run that could not go on, 130 for Ctrl-C,
    75 for a run that should be started again with resume=auto.

    Those are said in words. Anything else that goes wrong is ours and keeps its stack trace.
    """
    write_any_text()
    try:
        work()
    except UserError as error:
        tell(str(error), sys.stderr)
        return 2
    except (ProcessLost, UpdateRefused) as error:
        tell(str(error), sys.stderr)
        return 1
    except Interrupted as error:
        tell(str(error), sys.stderr)
        return CTRL_C
    except Stopped as error:
        tell(str(error), sys.stderr)
        return REQUEUE
    except KeyboardInterrupt:
        tell("\nstopped by Ctrl-C; resume=auto goes on from the last checkpoint", sys.stderr)
        return CTRL_C
    return 0


def main(run: Callable[[Root], object], root: type[Root], config_name: str, argv: Sequence[str] | None = None) -> int:
    """A command with a configuration: reads the arguments, runs, and returns the exit code."""
    keep_imports()
    arguments = sys.argv[1:] if argv is None else argv
    if "-h" in arguments or "--help" in arguments:
        print(usage(root, config_name))
        return 0
    return guarded(lambda: run(load(root, config_name, arguments)))


def load(root: type[Root], config_name: str, argv: Sequence[str]) -> Root:
    """The configuration that conf/<config_name>.yaml and the arguments describe. UserError lists all problems at once."""
    choices, values, problems = _sort_arguments(argv, group_choices(root, config_name))
    problems += _brought(root, choices, values)
    composed = _compose(config_name, tuple(choices.items()))
    while True:
        config, found = _validate(root, composed, values)
        problems += [problem for problem in found if not _follows_from(problem, problems)]
        kept = [value for value in values if not any(_blames(problem, value.key_or_group) for problem in found)]
        if config is not None or len(kept) == len(values):
            break
        values = kept  # pydantic compares options with each other only when each is sound: look again without the faulty ones
    if config is None or problems:
        raise UserError(report(problems))
    return config


def usage(root: type[Record], config_name: str) -> str:
    """A page: the groups with their choices, and the options at the top."""
    composed = _compose(config_name, ())
    groups = group_choices(root, config_name)
    lines = [f"usage: python -m launch.{config_name} [group=choice ...] [name=value ...]", "", "groups, default first:"]
    for group, choices in groups.items():
        default = _default_choice(config_name, group)
        ordered = sorted(choices, key=lambda choice: (choice != default, choice))
        lines.append(f"  {group + '=':<13}{'  '.join(ordered)}")
    lines += ["", "options:"]
    for name in root.model_fields:
        if name in groups:
            continue
        if isinstance(composed[name] if not OmegaConf.is_missing(composed, name) else None, DictConfig):
            lines += [f"  {name}.{key}={written(value)}" for key, value in composed[name].items()]
        else:
            lines.append(f"  {name}={'(required)' if OmegaConf.is_missing(composed, name) else written(composed[name])}")
    end = "; dry_run=true prints them all and what the run would need." if "dry_run" in root.model_fields else "."
    return "\n".join([*lines, "", f"Options of a group are written group.name=value{end}"])


def print_plan(config: PretrainConfig | RLConfig, model: ModelConfig, ranks: int) -> None:
    """What dry_run shows: every option and what the run would need. Without a tokenizer yet, its size is the one asked for."""
    if model.vocab_size is None and isinstance(config, PretrainConfig):
        model = model.model_copy(update={"vocab_size": config.tokenizer.vocab_size})
    asked = config.train.dtype if isinstance(config, PretrainConfig) else config.loop.dtype
    print(as_yaml(config))
    print("\n".join(budget_lines(config, model, ranks, *choose_dtype(asked), on_gpu=torch.cuda.is_available())))
    unread = "text and tokenizer were not read" if isinstance(config, PretrainConfig) else "task and weights were not loaded"
    print(f"dry run: nothing was started, and {unread}")


def group_choices(root: type[Record], config_name: str) -> dict[str, list[str]]:
    """Each group that this command has and the files in its folder. Experiments lie in a folder per command, if it has any."""
    folders = {name: CONF / name for name in root.model_fields}
    folders["experiment"] = CONF / "experiment" / config_name
    folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
    return {name: sorted(file.stem for file in folder.glob("*.yaml")) for name, folder in folders.items()}


def option_names(record: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all options, at all levels."""
    for name, field in record.model_fields.items():
        yield prefix + name
        for inner in _records_in(field.annotation):
            yield from option_names(inner, f"{prefix}{name}.")


def _records_in(annotation: Any) -> list[type[BaseModel]]:
    if isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for part in get_args(annotation) for record in _records_in(part)]


# ---------------------------------------------------------------- problems


def _blames(problem: Problem, option: str) -> bool:
    """Whether the problem is this option's, or a disagreement inside its group."""
    return problem.name == option or (problem.name != "" and option.startswith(f"{problem.name}."))


def _follows_from(problem: Problem, known: list[Problem]) -> bool:
    """Already reported, or a disagreement in which an option takes part whose own problem is reported."""
    if problem.value is not None or problem.message.startswith("required"):
        return any(problem.name == other.name for other in known)
    involved = [other.meant or other.name for other in known]
    mentions = [text for name in involved for text in (f"{name}.", name.rpartition(".")[2])]
    return problem in known or any(text in problem.message for text in mentions)


# ---------------------------------------------------------------- the command line


def _sort_arguments(argv: Sequence[str], groups: dict[str, list[str]]) -> tuple[dict[str, str], list[Override], list[Problem]]:
    """Group choices, single options, and the arguments that are neither."""
    parser = OverridesParser.create()
    choices: dict[str, str] = {}
    values: list[Override] = []
    problems: list[Problem] = []
    for argument in argv:
        problem = _refused(argument)
        if problem is None:
            try:
                override = parser.parse_overrides([argument])[0]
            except HydraException as error:
                problem = Problem(argument, None, f"cannot be read: {str(error).splitlines()[0]}; quote special characters")
        if problem is not None:
            problems.append(problem)
            continue
        name, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            problems.append(Problem(name, override.get_value_string(), "one value is expected; a list is written [1,2]"))
        elif name in groups and not override.is_delete() and not isinstance(value, dict):
            if isinstance(value, str) and value in groups[name]:
                choices[name] = value
            else:
                problems.append(_unknown_choice(name, written(value), groups[name]))
        else:
            values.append(override)
    return choices, values, problems


def _brought(root: type[Record], choices: dict[str, str], values: list[Override]) -> list[Problem]:
    """Options of a group that another option brings with it: they would change nothing."""
    names = [*choices, *(value.key_or_group for value in values)]
    bringing = [value for value in values if value.key_or_group in root.BRINGS and value.value() is not None]
    return [
        Problem(name, None, f"{value.key_or_group}={value.get_value_string()} brings its own {group}; leave one of the two out")
        for value in bringing
        for name in names
        if (group := name.partition(".")[0]) in root.BRINGS[value.key_or_group]
    ]


def _refused(argument: str) -> Problem | None:
    """Arguments that Hydra's own command line has and this one does not, and those without a value."""
    if argument in ("-m", "--multirun"):
        return Problem(argument, None, "sweeps are not offered; start one command for each value")
    if argument.startswith("-"):
        return Problem(argument, None, "unknown flag; options are written name=value, see --help")
    if "=" not in argument and not argument.startswith("~"):
        return Problem(argument, None, "should be written name=value, see --help")
    if "@" in argument.partition("=")[0] or "/" in argument.partition("=")[0]:
        return Problem(argument, None, "should be written group=choice or group.name=value, see --help")
    return None


def _unknown_choice(group: str, choice: str, known: list[str]) -> Problem:
    close = get_close_matches(choice, known, n=1)
    hint = f"did you mean {group}={close[0]}? " if close else ""
    return Problem(group, choice, f"unknown choice; {hint}choices: {', '.join(known)}")


@cache
def _compose(config_name: str, choices: tuple[tuple[str, str], ...]) -> DictConfig:
    """What the files say, with these (group, choice). Nobody may change it: who asks again gets the same, because to read the
    files takes most of the time that a configuration takes."""
    arguments = [f"{group}={choice}" for group, choice in choices if group != "experiment"]
    # Added last, so that its values win over those of the primary file.
    arguments += [f"+experiment={config_name}/{choice}" for group, choice in choices if group == "experiment"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(config_name, arguments)
    chosen = tuple((group, choice) for group, choice in choices if group != "experiment")
    if chosen and len(chosen) < len(choices):
        _win(chosen, _compose(config_name, chosen), _compose(config_name, ()), composed)
    OmegaConf.set_readonly(composed, True)
    return composed


def _win(chosen: tuple[tuple[str, str], ...], alone: DictConfig, usual: DictConfig, composed: DictConfig) -> None:
    """Of groups that a person has chosen, what makes the choice another than the usual one wins over an experiment's values:
    warmup=none has no steps in any experiment, while rollout=sync, which has as many groups as april, leaves these to it."""
    for group, _ in chosen:
        written_down: Any = OmegaConf.to_container(alone[group])
        for name, value in leaves(written_down, f"{group}.").items():
            if OmegaConf.select(usual, name) != value:
                OmegaConf.update(composed, name, value, force_add=True)


def _default_choice(config_name: str, group: str) -> str:
    defaults = OmegaConf.load(CONF / f"{config_name}.yaml").defaults
    return next((str(entry[group]) for entry in defaults if isinstance(entry, DictConfig) and group in entry), "")


# ---------------------------------------------------------------- validation


def _validate(root: type[Root], composed: DictConfig, values: list[Override]) -> tuple[Root | None, list[Problem]]:
    """The configuration, or what is wrong with it."""
    config = composed.copy()
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    known = list(option_names(root))
    problems: list[Problem] = []
    for value in values:
        try:
            _apply(config, value)
        except (OmegaConfBaseException, UserError) as error:
            problems.append(Problem(value.key_or_group, None, f"cannot be set: {str(error).splitlines()[0]}"))
    plain = _resolved(config, "", problems)
    try:
        valid = root.model_validate(plain)
    except ValidationError as error:
        return None, _merged(problems + [_explained(detail, plain, known) for detail in error.errors(include_url=False)])
    return (None, problems) if problems else (valid, [])


def _merged(problems: list[Problem]) -> list[Problem]:
    """One problem for each option: pydantic reports every alternative of a union on its own."""
    merged: dict[str, Problem] = {}
    for problem in problems:
        key = problem.name or problem.message
        earlier = merged.get(key, problem)
        if earlier is not problem and problem.value is not None and earlier.value is not None:
            problem = replace(earlier, message=f"{earlier.message} or {problem.message.removeprefix('should be ')}")
        elif earlier is not problem:
            problem = earlier  # required, or not resolved: said already
        merged[key] = problem
    return list(merged.values())


def _apply(config: DictConfig, override: Override) -> None:
    if not override.is_delete():
        value = override.value()
        OmegaConf.update(config, override.key_or_group, value, merge=value != {}, force_add=True)  # {} empties
        return
    parent, _, last = override.key_or_group.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig) or last not in list(node.keys()):
        raise UserError("there is no such option to delete")
    del node[last]


def _resolved(node: DictConfig, prefix: str, problems: list[Problem]) -> dict[str, Any]:
    """Plain values with all interpolations followed. Required values that are still `???` and broken ones are left out."""
    plain: dict[str, Any] = {}
    for key in map(str, node.keys()):
        name = prefix + key
        try:
            if OmegaConf.is_missing(node, key):
                problems.append(Problem(name, None, f"required; give {name}=..."))
                continue
            value = node[key]
            plain[key] = _resolved(value, f"{name}.", problems) if isinstance(value, DictConfig) else _listed(value)
        except OmegaConfBaseException as error:
            problems.append(Problem(name, None, f"cannot be resolved: {str(error).splitlines()[0]}"))
    return plain


def _listed(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _explained(detail: Any, plain: dict[str, Any], known: list[str]) -> Problem:
    """One pydantic error in a person's words."""
    kind, limits = detail["type"], detail.get("ctx", {})
    name = _dotted(detail["loc"], plain, kind)
    if kind == "value_error":
        return Problem(name, None, detail["msg"].removeprefix("Value error, "))
    if kind == "missing" and isinstance(detail["loc"][-1], int):
        items = detail["input"]
        return Problem(name.rpartition(".")[0], written(items), f"has too few items ({len(items)})")
    if kind == "missing":
        return Problem(name, None, f"required; give {name}=...")
    value = written(detail["input"])
    if kind == "extra_forbidden":
        return _unknown_option(name, value, detail["loc"], known)
    if kind == "string_type":
        return Problem(name, value, f"should be text; quote it: {name}='\"{value}\"'")
    if kind in ("model_type", "model_attributes_type"):
        return Problem(name, value, f"is a group of options; they are written {name}.name=value")
    if kind.startswith("union_tag"):
        tags = ", ".join(sorted(file.stem for file in (CONF / name).glob("*.yaml")))
        told = f"comes with the group, {name}=... of {tags}" if tags else f"should be one of {limits.get('expected_tags')}"
        return Problem(f"{name}.kind", written(limits.get("tag")), told)
    return Problem(name, value, not_as_expected(detail))


def _unknown_option(name: str, value: str, location: tuple[str | int, ...], known: list[str]) -> Problem:
    if name in known:  # of another kind of the same group
        *group, kind = location[:-1]  # data, stdlib; or model, router, cosine
        chosen = f"{group[0]}={kind}" if len(group) == 1 else f"{'.'.join(map(str, group))}.kind={kind}"
        return Problem(name, value, f"is not an option of {chosen}", name)
    top = name.partition(".")[0]
    elsewhere = (CONF / top).is_dir() or top in {*PretrainConfig.model_fields, *RLConfig.model_fields}
    if elsewhere and top not in known:
        return Problem(name, value, "is a group of another command, see --help")
    return unknown_option(name, value, known)


def _dotted(location: tuple[str | int, ...], plain: dict[str, Any], kind: str) -> str:
    """The option's name: pydantic's location without the labels it adds for the members of a union."""
    names: list[str] = []
    node: Any = plain
    for position, part in enumerate(location):
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside:
            node = node[part]
        if inside or (kind == "missing" and position == len(location) - 1):
            names.append(str(part))
    return ".".join(names)
