"""Three small tasks whose answer is a list of items separated by spaces, for models that learn within minutes.

Their answers differ in length, so a rollout round has the tail that APRIL is about. Prompts look like a comment of a Python
program, which is what the demo's model has read. Rewards: `item_reward`, with white space ignored.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod

from kernels.errors import UserError
from rl.rewards.task import Prompt, draw, item_reward

CLOSING = {"(": ")", "[": "]", "{": "}"}


class ListTask(ABC):
    """A task whose answer is a list of items; a subclass makes the prompts.

    `mistakes` is the share of demonstrations with one mistake in them. Imperfect demonstrations are what people and the web
    provide: imitation reproduces their mistakes at their rate, and reinforcement learning is what removes them.
    """

    def __init__(self, seed: int, mistakes: float) -> None:
        if not 0 <= mistakes <= 1:
            raise UserError(f"task.options.mistakes is {mistakes}; it is a share of the demonstrations, from 0 to 1")
        self.seed, self.mistakes = seed, mistakes

    @abstractmethod
    def make(self, generator: random.Random) -> Prompt:
        """A random prompt."""

    def prompt(self, index: int) -> Prompt:
        return draw(self.make, self.seed, index, held_out=False)

    def held_out(self, index: int) -> Prompt:
        return draw(self.make, self.seed, index, held_out=True)

    def demonstration(self, index: int) -> tuple[Prompt, str]:
        prompt = self.prompt(index)
        generator = random.Random(f"{self.seed}/demonstration/{index}")
        items = prompt.answer.split()
        if generator.random() < self.mistakes:
            items = with_mistake(items, generator)
        return prompt, "".join(f" {item}" for item in items)

    def score(self, prompt: Prompt, completion: str, ended: bool) -> float | None:
        return item_reward(prompt.answer.split(), completion.split(), ended)


def with_mistake(items: list[str], generator: random.Random) -> list[str]:
    """The items with one of them left out or said twice; a single item is said twice."""
    place = generator.randrange(len(items))
    if len(items) == 1 or generator.random() < 0.5:
        return items[: place + 1] + items[place:]
    return items[:place] + items[place + 1 :]


class Countdown(ListTask):
    """`# 4. count down from 2 to 8:` wants `2 1 0 9 8`: digits downwards, with 9 after 0; 2 .. 10 of them.

    There are 90 countdowns. The number before them, one of this many `exercises`, plays no role; 10 of them make 900 prompts,
    of which 116 are held out. Without exercises there is no number, and 8 of the 90 prompts are held out.
    """

    def __init__(self, seed: int, mistakes: float = 0.0, exercises: int = 10) -> None:
        super().__init__(seed, mistakes)
        if exercises < 0:
            raise UserError(f"task.options.exercises is {exercises}; countdown needs a number >= 0")
        self.exercises = exercises

    def make(self, generator: random.Random) -> Prompt:
        first, length = generator.randrange(10), generator.randint(2, 10)
        number = f"{generator.randrange(self.exercises)}. " if self.exercises else ""
        digits = [(first - place) % 10 for place in range(length)]
        return Prompt(text=f"# {number}count down from {first} to {digits[-1]}:", answer=" ".join(map(str, digits)))


class Sort(ListTask):
    """`# sort 5 1 8:` wants `1 5 8`; 2 .. longest distinct numbers of 0 .. largest."""

    def __init__(self, seed: int, longest: int = 8, largest: int = 9, mistakes: float = 0.0) -> None:
        super().__init__(seed, mistakes)
        if not 4 <= longest <= largest + 1:
            raise UserError(
                f"task.options: longest is {longest} and largest is {largest}; sort needs 4 <= longest <= largest + 1, "
                "its numbers are distinct"
            )
        self.longest, self.largest = longest, largest

    def make(self, generator: random.Random) -> Prompt:
        numbers = generator.sample(range(self.largest + 1), generator.randint(2, self.longest))
        text = " ".join(str(number) for number in numbers)
        return Prompt(text=f"# sort {text}:", answer=" ".join(str(number) for number in sorted(numbers)))


class Brackets(ListTask):
    """`# close ( [ {:` wants `} ] )`; up to `longest` brackets, short lists more often than long ones."""

    def __init__(self, seed: int, longest: int = 16, mistakes: float = 0.0) -> None:
        super().__init__(seed, mistakes)
        if longest < 5:
            raise UserError(f"task.options.longest is {longest}; brackets needs at least 5 to have enough distinct prompts")
        self.longest = longest

    def make(self, generator: random.Random) -> Prompt:
        length = 1 + int(self.longest * generator.random() ** 2)
        opened = generator.choices(tuple(CLOSING), k=length)
        answer = " ".join(CLOSING[bracket] for bracket in reversed(opened))
        return Prompt(text=f"# close {' '.join(opened)}:", answer=answer)
