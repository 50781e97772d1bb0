"""The records of a run: the lines of its metrics.jsonl, and a summary from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from kernels.errors import UserError
from trainer.metrics import METRICS, Stage, Value, Values

SUMMARY: dict[Stage, tuple[str, ...]] = {  # the table from first to last, at the end of a run
    "pretrain": (
        "train/loss",
        "eval/loss",
        "eval/bits_per_byte",
        "moe/max_vio",
        "eval/max_vio",
        "perf/tokens_per_s",
        "perf/checkpoint_share",
        "mem/peak_gib",
    ),
    "rl": (
        "reward/mean",
        "reward/eval_mean",
        "rollout/length_mean",
        "rollout/truncated_share",
        "rollout/stale_token_share",
        "train/entropy",
        "rollout/tokens_per_s",
        "perf/checkpoint_share",
        "mem/peak_gib",
    ),
}


@dataclass(frozen=True)
class Change:
    """A metric's first and last value in a run, as text."""

    label: str
    unit: str
    first: str
    last: str


_Number = Annotated[int, Field(ge=-(2**63), lt=2**63)] | float
_RECORD: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, _Number | str | list[list[float]]])


def parsed_record(line: str | bytes, file: Path) -> dict[str, Any]:
    """A line of a metrics.jsonl: `stage`, `step`, and values. UserError, which names the file, if it is something else."""
    try:
        record = _RECORD.validate_json(line)
    except ValidationError as error:
        raise UserError(f"{file} holds a line that is not a record: {error.errors(include_url=False)[0]['msg']}") from None
    if type(record.get("step")) is not int:
        raise UserError(f"{file} holds a record without a step")
    return record


def read_records(file: Path) -> list[dict[str, Value]]:
    """The records of a metrics.jsonl, each with `step` and `stage`; a last line that was cut off is left out."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [parsed_record(line, file) for line in lines if line.endswith(b"\n")]


def summary(stage: Stage, records: Sequence[Values]) -> list[Change]:
    """First and last value of each metric that says how the run went."""
    changes = []
    for key in SUMMARY[stage]:
        metric = METRICS[key]
        found = [value for record in records if isinstance(value := record.get(key), int | float)]
        if found:
            changes.append(Change(metric.label, metric.unit, metric.text(found[0]), metric.text(found[-1])))
    return changes
