"""What a task is: prompts that can be drawn forever, and a reward that a program can check.

Tasks speak text only; they never see a tokenizer. A prompt is a pure function of (seed, index), so a run that resumes needs
nothing but the index, and every process can draw it.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kernels.errors import UserError

HELD_OUT_SHARE = 8  # one distinct prompt in this many is held out
MAX_DRAWS = 1000


@dataclass(frozen=True)
class Prompt:
    """`text` is what the model reads; `answer` is what it should write, in whatever form the task's score understands."""

    text: str
    answer: str


@runtime_checkable
class Task(Protocol):
    """A task is made by `Class(seed=..., **task.options)`."""

    def prompt(self, index: int) -> Prompt:
        """Training prompt `index`, any index >= 0; the same index gives the same prompt."""

    def held_out(self, index: int) -> Prompt:
        """Evaluation prompt `index`, never the text of a training prompt."""

    def demonstration(self, index: int) -> tuple[Prompt, str | tuple[str, ...]]:
        """Example `index` of the supervised warm-up: a training prompt and a completion to imitate; <eos> is added to it.

        Of a `Conversation`: its turns, the model's and the environment's alternately, beginning with the model's.
        """

    def score(self, prompt: Prompt, completion: str, ended: bool) -> float | None:
        """Reward in [0, 1] of `completion`, the text before <eos> or a stop string; `ended` is False when it was cut off at
        max_new_tokens.

        Of a `Conversation`, the completion is the model's last turn.

        None when it could not be judged (a service was down): then the sample is left out of the update.
        """


@runtime_checkable
class Conversation(Task, Protocol):
    """A task whose environment replies: a tool, a game, a person in a play. The model goes on after the reply."""

    def reply(self, prompt: Prompt, turns: Sequence[str]) -> str | None:
        """What is said to the last of `turns`, which alternate and begin with the model's; None or no text: it is over.

        It is also over after rollout.max_turns turns of the model. The same arguments must give the same reply.
        """


def imported(path: str, option: str, known: Iterable[str]) -> object:
    """What is at "package.module:name", None if the module has no such name. Raises UserError where there is no such module."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as problem:
        raise UserError(
            f"{option} is {path!r}, and module {problem.name!r} cannot be imported; "
            f"check PYTHONPATH, or take one of: {', '.join(sorted(known))}"
        ) from problem
    return vars(module).get(name)


def is_held_out(text: str) -> bool:
    """Whether the prompt `text` is one of those for evaluation. Its hash decides, whatever the seed and its place."""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw(make: Callable[[random.Random], Prompt], seed: int, index: int, held_out: bool) -> Prompt:
    """Prompt `index` of one side of the split: draws from a generator seeded with (seed, side, index) until the side fits.

    `is_held_out` decides the side of a prompt, so the two sides are disjoint whatever the seed and the indices.
    """
    generator = random.Random(f"{seed}/{'held out' if held_out else 'training'}/{index}")
    for _ in range(MAX_DRAWS):
        prompt = make(generator)
        if is_held_out(prompt.text) == held_out:
            return prompt
    raise UserError(
        f"no {'held-out' if held_out else 'training'} prompt in {MAX_DRAWS} draws, the last was {prompt.text!r}; "
        "the task has too few distinct prompts, widen its range in task.options"
    )


def item_reward(expected: Sequence[str], given: Sequence[str], ended: bool) -> float:
    """Reward of a list of items: 1 for exactly the expected ones and an end.

    Otherwise 0.7 times the share of the correct prefix in the longer of the two lists, less 0.1 when it did not end, never
    below 0. So a longer correct prefix, fewer items too many, and stopping each pay, and nothing comes near a right answer.
    """
    if ended and list(given) == list(expected):
        return 1.0
    right = 0
    for wanted, item in zip(expected, given, strict=False):
        if wanted != item:
            break
        right += 1
    credit = 0.7 * right / max(len(expected), len(given))
    return max(0.0, credit - (0.0 if ended else 0.1))
