"""Reads JSON and YAML that somebody else wrote, and says what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import yaml
from pydantic import ValidationError


def parsed(text: str | bytes) -> Any:
    """As `json.loads`. Raises ValueError for whatever is no JSON, and where it is nested deeper than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Plain(yaml.SafeLoader):
    """Without aliases, by which a short text holds itself, or more than memory does."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which is not read here")
        return super().compose_node(parent, index)


def parsed_yaml(text: bytes) -> Any:
    """Plain values only. Raises ValueError for whatever is no YAML, has aliases, or is nested deeper than Python can follow."""
    try:
        return yaml.load(text, _Plain)
    except yaml.YAMLError as error:
        raise ValueError(f"neither YAML nor JSON: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong: where, unless it is the whole, and what."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])
