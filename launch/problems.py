"""Messages about a command's options: everything that is wrong at once, each with the nearest name that exists."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any

SUBJECT_WIDTH = 44  # columns for `name = value` in the report; a longer one pushes its message to the right
EXPECTED = {
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "path_type": "should be a path",
    "tuple_type": "should be a list, written [a,b]",
}


@dataclass(frozen=True)
class Problem:
    name: str  # dotted; empty when options of several groups disagree
    value: str | None  # as written; None where the message has the numbers
    message: str
    meant: str = ""  # the option that the person most likely wanted

    @property
    def subject(self) -> str:
        return self.name if self.value is None else f"{self.name} = {self.value}"


def report(problems: list[Problem]) -> str:
    """A heading and a line a problem, subjects and messages in two columns."""
    width = min(SUBJECT_WIDTH, max(len(problem.subject) for problem in problems))
    lines = [f"{problem.subject:<{width}}   {problem.message}" if problem.subject else problem.message for problem in problems]
    return "\n  ".join([f"config: {len(problems)} problem{'s' * (len(problems) != 1)}", *lines])


def unknown_option(name: str, value: str, known: Sequence[str]) -> Problem:
    nearest = _nearest(name, known)
    hint = f"; did you mean {nearest}?" if nearest else ", see --help"
    return Problem(name, value, f"unknown option{hint}", nearest)


def not_as_expected(detail: Any) -> str:
    """What a pydantic error (an element of `ValidationError.errors()`) says about one value."""
    kind = detail["type"]
    if kind == "literal_error":
        options = detail["ctx"]["expected"].replace("'", "")
        close = get_close_matches(str(detail["input"]), options.replace(" or ", ", ").split(", "), n=1)
        return f"should be {options}" + (f"; did you mean {close[0]}?" if close else "")
    return EXPECTED.get(kind) or re.sub("^(Input|Tuple|Value) should", "should", detail["msg"])


def written(value: Any) -> str:
    """A value as a person would write it, cut where it is long."""
    text = value if isinstance(value, str) and value else json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _nearest(name: str, names: Sequence[str]) -> str:
    """The known option closest to `name`; the right last part in the wrong place counts nearly as much as the whole."""

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, name, candidate).ratio()
        last = SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, last - 0.1)

    best = max((other for other in names if not name.startswith(f"{other}.")), key=likeness)
    return best if likeness(best) >= 0.7 else ""
