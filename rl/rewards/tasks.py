"""Tasks by name, and your own by import path."""

from __future__ import annotations

import inspect

from kernels.errors import UserError
from rl.rewards.calculator import Calculator
from rl.rewards.dataset import Dataset
from rl.rewards.lists import Brackets, Countdown, Sort
from rl.rewards.task import Task, imported
from trainer.config.rl import TaskConfig

TASKS: dict[str, type[Task]] = {
    "countdown": Countdown,
    "sort": Sort,
    "brackets": Brackets,
    "calculator": Calculator,
    "dataset": Dataset,
}
METHODS = ("prompt", "held_out", "demonstration", "score")


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task `config.name`, a key of TASKS or "package.module:Class", made with `seed` and `config.options`.

    Raises UserError when there is no such task, when the class lacks a method of `Task`, or when it does not take an option.
    """
    task_class = _own_class(config.name) if ":" in config.name else TASKS.get(config.name)
    if task_class is None:
        raise UserError(
            f"task.name is {config.name!r}; known tasks: {', '.join(sorted(TASKS))}. "
            'For a task of your own give its import path, "package.module:Class"'
        )
    found = inspect.signature(task_class).parameters.values()
    parameters = [one.name for one in found if one.name != "seed" and one.kind != one.VAR_KEYWORD]
    try:
        inspect.signature(task_class).bind(seed=seed, **config.options)
    except TypeError as problem:
        raise UserError(
            f"task {config.name} cannot be made with task.options {config.options}: {problem}; "
            f"it takes seed and: {', '.join(parameters) or 'no options'}"
        ) from problem
    return task_class(seed=seed, **config.options)


def check_task(task: Task, warmup_steps: int) -> None:
    """Draws what the run will draw first, so that a task that cannot give it says so before anything is started."""
    task.prompt(0)
    task.held_out(0)
    if warmup_steps:
        task.demonstration(0)


def _own_class(path: str) -> type:
    module_name, _, class_name = path.partition(":")
    found = imported(path, "task.name", TASKS)
    if not inspect.isclass(found):
        raise UserError(f"task.name is {path!r}, but module {module_name} has no class {class_name!r}")
    missing = [name for name in METHODS if not callable(inspect.getattr_static(found, name, None))]
    if missing:
        raise UserError(f"task class {path} lacks {', '.join(missing)}; a task has the methods {', '.join(METHODS)}")
    return found
