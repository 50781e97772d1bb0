"""A conversation with a tool: sums, for which the model may use a calculator that adds two numbers."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Sequence

from kernels.errors import UserError
from rl.rewards.task import Prompt, draw

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
CALL = re.compile(r"\s*calc (-?\d{1,9}) ([-+*]) (-?\d{1,9})\s*")


class Calculator:
    """`# 31 + 7 - 12 =` wants `26` as the last turn: 2 .. `terms` numbers of 0 .. `largest`, added and subtracted.

    A turn that begins with `calc`, such as `calc 31 + 7`, is answered by the calculator, ` 38`, or ` error` if it cannot read
    it, and the model goes on. Any other turn is the answer. The reward is 1 or 0.
    """

    def __init__(self, seed: int, terms: int = 3, largest: int = 99) -> None:
        if terms < 2 or largest < 9:
            raise UserError(
                f"task.options: terms is {terms} and largest is {largest}; calculator needs terms >= 2 and largest >= 9"
            )
        self.seed, self.terms, self.largest = seed, terms, largest

    def prompt(self, index: int) -> Prompt:
        return draw(self._make, self.seed, index, held_out=False)

    def held_out(self, index: int) -> Prompt:
        return draw(self._make, self.seed, index, held_out=True)

    def demonstration(self, index: int) -> tuple[Prompt, tuple[str, ...]]:
        """Every step by the calculator, from left to right."""
        prompt = self.prompt(index)
        total, *steps = prompt.text.removeprefix("# ").removesuffix(" =").split()
        turns: list[str] = []
        for sign, number in zip(steps[::2], steps[1::2], strict=True):
            turns.append(f" calc {total} {sign} {number}")
            total = str(OPERATIONS[sign](int(total), int(number)))
            turns.append(f" {total}")
        return prompt, (*turns, f" {total}")

    def reply(self, prompt: Prompt, turns: Sequence[str]) -> str | None:
        if not turns[-1].lstrip().startswith("calc"):
            return None
        call = CALL.fullmatch(turns[-1])
        return f" {OPERATIONS[call[2]](int(call[1]), int(call[3]))}" if call else " error"

    def score(self, prompt: Prompt, completion: str, ended: bool) -> float | None:
        return float(ended and completion.strip() == prompt.answer)

    def _make(self, generator: random.Random) -> Prompt:
        total = generator.randint(0, self.largest)
        text = f"# {total}"
        for _ in range(generator.randint(1, self.terms - 1)):
            sign, number = generator.choice("+-"), generator.randint(0, self.largest)
            text, total = f"{text} {sign} {number}", OPERATIONS[sign](total, number)
        return Prompt(text=f"{text} =", answer=str(total))
