"""The options of the benchmarks, and the sizes of known models by name.

Options are written name=value, lists a,b or [a,b]. Defaults differ between a GPU and a CPU, where the sizes are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from kernels.errors import UserError
from launch.problems import Problem, not_as_expected, report, unknown_option, written

Item = TypeVar("Item")


def _split(value: Any) -> Any:
    """The items of a list as a person writes it; anything that is not text stays."""
    return [item.strip() for item in value.strip("[]").split(",") if item.strip()] if isinstance(value, str) else value


Listed = Annotated[tuple[Item, ...], BeforeValidator(_split)]
OneOrMore = Annotated[tuple[Item, ...], BeforeValidator(_split), Field(min_length=1)]
ModelName = Literal["qwen3_30b_a3b", "qwen3_235b_a22b", "qwen3_next", "olmoe", "mixtral", "deepseek_v3", "moe_2b", "tiny"]


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer and of the vocabulary."""

    hidden: int
    expert_hidden: int
    experts: int
    top_k: int
    vocabulary: int


# From the config.json of each model on Hugging Face; moe_2b with 24 layers is for generation on one GPU, tiny for a CPU.
SHAPES: Mapping[ModelName, Shape] = {
    "qwen3_30b_a3b": Shape(hidden=2048, expert_hidden=768, experts=128, top_k=8, vocabulary=151936),
    "qwen3_235b_a22b": Shape(hidden=4096, expert_hidden=1536, experts=128, top_k=8, vocabulary=151936),
    "qwen3_next": Shape(hidden=2048, expert_hidden=512, experts=512, top_k=10, vocabulary=151936),
    "olmoe": Shape(hidden=2048, expert_hidden=1024, experts=64, top_k=8, vocabulary=50304),
    "mixtral": Shape(hidden=4096, expert_hidden=14336, experts=8, top_k=2, vocabulary=32000),
    "deepseek_v3": Shape(hidden=7168, expert_hidden=2048, experts=256, top_k=8, vocabulary=129280),
    "moe_2b": Shape(hidden=1024, expert_hidden=384, experts=64, top_k=8, vocabulary=32768),
    "tiny": Shape(hidden=64, expert_hidden=32, experts=8, top_k=2, vocabulary=512),
}


class FileOptions(BaseModel):
    """What every benchmark can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path = Field(description="the JSON file")

    @field_validator("out")
    @classmethod
    def _has_a_folder(cls, out: Path) -> Path:
        if not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent}")
        return out


class Options(FileOptions):
    """Of a benchmark that times. A size that is given replaces that of each model."""

    model: OneOrMore[ModelName]
    seed: int = Field(0, description="of the data and the routing")
    repeats: PositiveInt | None = Field(None, description="timed rounds; not given: at least 20, and more for a second")

    @model_validator(mode="after")
    def _tokens_have_enough_experts(self) -> Self:
        for name, shape in self.shapes().items():
            if shape.top_k > shape.experts:
                raise ValueError(f"top_k = {shape.top_k} of model = {name} is more than its {shape.experts} experts")
        return self

    def shapes(self) -> dict[ModelName, Shape]:
        return {name: self.shape(name) for name in self.model}

    def shape(self, name: ModelName) -> Shape:
        """Of a model, with the sizes that were given in place of its own."""
        given = self.model_dump(include={field.name for field in fields(Shape)}, exclude_none=True)
        return replace(SHAPES[name], **given)


class TokenOptions(Options):
    tokens: OneOrMore[PositiveInt]


AnyOptions = TypeVar("AnyOptions", bound=FileOptions)


def read_options(record: type[AnyOptions], defaults: Mapping[str, Any], arguments: Sequence[str]) -> AnyOptions:
    """The options that the arguments describe, over `defaults`. UserError lists all problems at once."""
    given: dict[str, str] = {}
    problems: list[Problem] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            problems.append(Problem(argument, None, "unknown flag; options are written name=value, see --help"))
        elif not equals:
            problems.append(Problem(argument, None, "should be written name=value, see --help"))
        else:
            given[name] = value
    try:
        options = record.model_validate({**defaults, **given})
    except ValidationError as error:
        problems += [_explained(detail, list(record.model_fields)) for detail in error.errors(include_url=False)]
    if problems:
        raise UserError(report(problems))
    return options


def _explained(detail: Any, known: Sequence[str]) -> Problem:
    if not detail["loc"]:  # options that disagree with each other
        return Problem("", None, detail["msg"].removeprefix("Value error, "))
    name, value = str(detail["loc"][0]), written(detail["input"])
    if detail["type"] == "extra_forbidden":
        return unknown_option(name, value, known)
    if detail["type"] == "value_error":
        return Problem(name, value, detail["msg"].removeprefix("Value error, "))
    return Problem(name, value, not_as_expected(detail))
