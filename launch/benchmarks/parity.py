"""A task for benchmarks, whose models have no tokenizer: completions are token numbers, and even ones are good."""

from __future__ import annotations

from rl.rewards.task import Prompt


class Parity:
    """Scores the share of even numbers."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def prompt(self, index: int) -> Prompt:
        return Prompt(text=f"{index}", answer="even")

    def held_out(self, index: int) -> Prompt:
        return Prompt(text=f"-{index}", answer="even")

    def demonstration(self, index: int) -> tuple[Prompt, str]:
        return self.prompt(index), "2 4 6"

    def score(self, prompt: Prompt, completion: str, ended: bool) -> float | None:
        numbers = completion.split()
        return sum(int(number) % 2 == 0 for number in numbers) / len(numbers)
