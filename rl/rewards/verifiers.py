"""Verifiers: they compare a completion with the answer in the data.

Reward workers call them, and stop one that takes too long. No verifier raises because of what a model wrote, except math: if
math-verify itself fails, nobody knows whether the completion was right, so it has no reward and is counted. Slow imports happen
when a verifier is made, since the time of the first score is limited.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import secrets
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kernels.errors import UserError
from rl.rewards.sandbox import Isolation, Limits, Outcome, check_isolation, run_program
from rl.rewards.task import imported

# completion, answer -> reward in [0, 1], or None where it could not be judged; raises for an answer that is no answer
Verifier = Callable[[str, str], float | None]
Option = int | float | str | bool
MATH_CHARACTERS = 4000  # of the end of a completion, where the result is
JSON_LEVELS = 64  # of arrays and objects in each other; a schema that refers to itself takes Python's stack for each


@dataclass(frozen=True)
class Exact:
    """1 if the completion is the answer, white space around them aside.

    With `pattern`, a regular expression, its last match in the completion is compared: group 1 of it if there is one.
    """

    pattern: str = ""
    ignore_case: bool = False

    def __call__(self, completion: str, answer: str) -> float:
        found = last_match(self.pattern, completion) if self.pattern else completion
        if found is None:
            return 0.0
        given, wanted = found.strip(), answer.strip()
        return float(given.casefold() == wanted.casefold() if self.ignore_case else given == wanted)


@dataclass(frozen=True)
class Regex:
    """1 if the whole completion, without white space around it, matches the answer, which is a regular expression."""

    ignore_case: bool = False

    def __call__(self, completion: str, answer: str) -> float:
        flags = re.DOTALL | (re.IGNORECASE if self.ignore_case else 0)
        return float(re.fullmatch(answer, completion.strip(), flags) is not None)


@dataclass(frozen=True)
class Math:
    """1 if what math-verify takes for the result at the end of the completion equals the answer as mathematics: a \\boxed{},
    LaTeX between dollars, or a number. Digits may be those of any script, and all may be full-width."""

    def __post_init__(self) -> None:
        import math_verify  # noqa: F401

    def __call__(self, completion: str, answer: str) -> float:
        from math_verify import parse, verify

        # Its own timeouts are signal.alarm, and it takes an exception for a wrong answer: both are left to the worker.
        def read(text: str) -> list[object]:
            found: list[object] = parse(in_ascii(text), parsing_timeout=None, raise_on_error=True)
            return found

        wanted = read(answer) or read(f"${answer}$")
        if not wanted:
            raise ValueError(f"the answer {answer[:200]!r} cannot be read as mathematics")
        given = read(completion[-MATH_CHARACTERS:])
        return float(verify(wanted, given, timeout_seconds=None, raise_on_error=True))


@dataclass(frozen=True)
class JsonSchema:
    """1 if the completion, or its last fenced block, is JSON that the answer, a JSON schema, allows. References to other
    documents are not followed. JSON of more than JSON_LEVELS levels, or with numbers beyond float64, is worth 0."""

    def __call__(self, completion: str, answer: str) -> float:
        from jsonschema.validators import validator_for
        from referencing import Registry

        schema = json.loads(answer)
        kind = validator_for(schema)
        kind.check_schema(schema)
        try:
            given = json.loads(last_block(completion), parse_constant=_refuse_constant, parse_float=_finite)
        except (ValueError, RecursionError):  # no JSON, or none that a parser reads
            return 0.0
        if _levels(given) > JSON_LEVELS:
            return 0.0
        try:
            return float(kind(schema, registry=Registry()).is_valid(given))
        except OverflowError:  # an integer with hundreds of digits, beside a float of the schema
            return 0.0


@dataclass(frozen=True)
class RunsPrograms:
    """What verifiers share that run programs of the model."""

    timeout_s: float = 4.0
    memory_mib: int = 1024
    isolation: Isolation = "namespaces"

    def __post_init__(self) -> None:
        check_isolation(self.isolation)

    def run(self, source: str, stdin: str, timeout_s: float) -> Outcome:
        return run_program(source, stdin, Limits(timeout_s, self.memory_mib), self.isolation)


@dataclass(frozen=True)
class CodeTests(RunsPrograms):
    """1 if the Python code of the completion, its last fenced block, passes the answer: statements that run after it, such as
    asserts. `timeout_s` must be below reward.timeout_s, so that an endless loop is worth 0.

    The tests run in the code's own process. Leaving early does not pass them, but a program can read and fool them; if yours
    learns to, take `code_io`.
    """

    def __call__(self, completion: str, answer: str) -> float:
        passed = secrets.token_hex(16)
        source = f"{last_block(completion)}\n\n{answer}\n\nprint({passed!r})\n"
        outcome = self.run(source, "", self.timeout_s)
        return float(outcome.exit_code == 0 and outcome.output.rstrip().endswith(passed))


@dataclass(frozen=True)
class CodeIO(RunsPrograms):
    """1 if the Python program of the completion, its last fenced block, prints what is expected for every case of the answer, a
    JSON list of {"input": text, "output": text}; amounts of white space do not matter. `timeout_s` is for all cases together
    and must be below reward.timeout_s, so that an endless loop is worth 0."""

    def __call__(self, completion: str, answer: str) -> float:
        cases = [(case["input"], case["output"]) for case in json.loads(answer)]
        if not cases:
            raise ValueError("the answer has no case to test")
        source, deadline = last_block(completion), time.monotonic() + self.timeout_s
        for given, expected in cases:
            left = deadline - time.monotonic()
            if left <= 0:
                return 0.0
            outcome = self.run(source, given, left)
            if outcome.exit_code != 0 or outcome.output.split() != expected.split():
                return 0.0
        return 1.0


@dataclass(frozen=True)
class Bleu:
    """BLEU of the completion's words and punctuation against the answer's; `rl/rewards/bleu.py` has the formula."""

    max_order: int = 4

    def __post_init__(self) -> None:
        import rl.rewards.bleu  # noqa: F401

    def __call__(self, completion: str, answer: str) -> float:
        import torch

        from rl.rewards.bleu import bleu

        given, wanted = (re.findall(r"\w+|[^\w\s]", text) for text in (completion, answer))
        numbers = {word: number for number, word in enumerate({*given, *wanted})}
        rows = [torch.tensor([[numbers[word] for word in words]], dtype=torch.int64) for words in (given, wanted)]
        lengths = [torch.tensor([len(words)]) for words in (given, wanted)]
        return float(bleu(rows[0], lengths[0], rows[1], lengths[1], self.max_order))


VERIFIERS: dict[str, Callable[..., Verifier]] = {
    "exact": Exact,
    "regex": Regex,
    "math": Math,
    "json_schema": JsonSchema,
    "code_tests": CodeTests,
    "code_io": CodeIO,
    "bleu": Bleu,
}


def make_verifier(name: str, options: Mapping[str, Option]) -> Verifier:
    """A key of VERIFIERS, or "package.module:function" for a function of one's own that takes (completion, answer, **options).

    Raises UserError when there is no such verifier or it does not take an option.
    """
    if ":" in name:
        return _own_function(name, options)
    if name not in VERIFIERS:
        raise UserError(
            f"task.options.verifier is {name!r}; known verifiers: {', '.join(sorted(VERIFIERS))}. "
            'For a function of your own give its import path, "package.module:function"'
        )
    kind = VERIFIERS[name]
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as problem:
        known = ", ".join(inspect.signature(kind).parameters)
        raise UserError(
            f"verifier {name} cannot be made with {options}: {problem}; it takes: {known or 'no options'}"
        ) from problem
    return kind(**options)


def _own_function(path: str, options: Mapping[str, Option]) -> Verifier:
    found = imported(path, "task.options.verifier", VERIFIERS)
    if not inspect.isroutine(found):
        module, _, name = path.partition(":")
        raise UserError(f"task.options.verifier is {path!r}, but module {module} has no function {name!r}")
    try:
        inspect.signature(found).bind("completion", "answer", **options)
    except TypeError as problem:
        raise UserError(
            f"verifier {path} cannot be called with a completion, an answer and {dict(options)}: {problem}; it takes "
            f"{inspect.signature(found)}"
        ) from problem
    return functools.partial(found, **options)


def in_ascii(text: str) -> str:
    """With ASCII for decimal digits of all scripts, which math-verify finds and cannot read, and for full-width characters.

    Not NFKC, which makes 42 of a 4 with a superscript 2.
    """
    return text if text.isascii() else "".join(map(_in_ascii, text))


def _in_ascii(character: str) -> str:
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    wide = unicodedata.decomposition(character).startswith("<wide>")
    return unicodedata.normalize("NFKC", character) if wide else character


def last_match(pattern: str, text: str) -> str | None:
    """Group 1 of the last match, or all of it where the pattern has no group; None without a match."""
    found = deque(re.finditer(pattern, text), maxlen=1)
    return found[0][min(1, found[0].re.groups)] if found else None


def last_block(text: str) -> str:
    """The last complete block between ``` fences, without the language after the first; the whole text if there is none."""
    parts = text.split("```")
    blocks = (len(parts) - 1) // 2
    if blocks == 0:
        return text
    language, line_end, block = parts[2 * blocks - 1].partition("\n")
    return block if line_end and re.fullmatch(r"[\w+-]*\s*", language) else parts[2 * blocks - 1]


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is beyond float64")
    return number


def _levels(value: object) -> int:
    """How deep arrays and objects lie in each other; 0 of anything else."""
    levels, layer = 0, [value]
    while layer := [item for item in layer if isinstance(item, list | dict)]:
        levels += 1
        layer = [inner for item in layer for inner in (item.values() if isinstance(item, dict) else item)]
    return levels
