"""A run, read from its folder: what was asked for, how it ended, and its records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from trainer.metrics import LENGTHS, LOAD, Stage, Value, clock
from trainer.records import read_records
from trainer.run_dir import option, read_config, read_status, shown

HEADINGS: dict[Stage, str] = {"pretrain": "Pretraining", "rl": "Reinforcement learning"}


@dataclass(frozen=True)
class Run:
    path: Path
    stage: Stage
    status: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    records: list[dict[str, Value]]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises UserError if the folder is no run, has no records yet, or is damaged."""
        path = path.resolve()
        status = read_status(path)
        records = read_records(path / "metrics.jsonl")
        if not records:
            raise UserError(f"{shown(path)} has no records yet; the report needs at least one step")
        for key in (LOAD, LENGTHS):
            require_one_shape([record[key] for record in records if key in record], key, path / "metrics.jsonl")
        config = read_config(path)
        text = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        return cls(path, status["kind"], status, config, text, records)

    def numbers(self, key: str) -> list[float]:
        return [y for _, y in self.points(key)]

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every record that has a finite value."""
        found = [(record["step"], record[key]) for record in self.records if key in record]
        return [
            (float(x), float(y)) for x, y in found if isinstance(x, int) and isinstance(y, int | float) and math.isfinite(y)
        ]

    def facts(self) -> list[tuple[str, str]]:
        """What the run is and what it took, name and value."""
        status = self.status

        def number(name: str) -> str:
            return f"{option(self.config, name, int):,}"

        if self.stage == "pretrain":
            steps, rows, length = map(number, ("train.steps", "train.batch_rows", "train.sequence_length"))
            layers, experts, top_k = map(number, ("model.num_layers", "model.num_experts", "model.top_k"))
            what = [
                ("model", f"{layers} layers, {experts} experts, {top_k} per token"),
                ("data", option(self.config, "data.kind", str)),
                ("plan", f"{steps} steps x {rows} rows x {length} tokens"),
            ]
        else:
            rounds, groups, samples = map(number, ("loop.rounds", "rollout.groups", "rollout.samples_per_group"))
            over_provision = option(self.config, "rollout.over_provision", int, float)
            what = [
                ("task", option(self.config, "task.name", str)),
                ("plan", f"{rounds} rounds x {groups} groups x {samples} samples"),
                (
                    "over-provision",
                    f"{over_provision:g} times the groups are submitted",
                ),
            ]
        seconds, tokens = sum(self.numbers("time/step_s")), sum(self.numbers("train/tokens"))
        return [
            *what,
            ("learned", f"{tokens:,.0f} tokens in {clock(seconds)}"),
            ("state", f"{status['state']}, attempt {status['attempt']}"),
            ("started", str(status["created"])[:16].replace("T", " ")),
            ("revision", str(status["git"])),
        ]


def require_one_shape(tables: Sequence[Any], key: str, file: Path) -> None:
    """UserError unless all are tables of one shape."""
    shapes = {(len(table), *map(len, table)) if isinstance(table, list) else () for table in tables}
    if len(shapes) > 1 or any(len(set(shape[1:])) != 1 for shape in shapes):
        raise UserError(f"{shown(file)} is damaged: {key} should be tables of one shape")
