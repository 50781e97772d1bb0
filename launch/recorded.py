"""A run as its folder tells it: what was asked for, how it ended, and its records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kernels.errors import UserError
from trainer.metrics import Stage, Value, clock, read_records
from trainer.run_dir import read_status, shown

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
        """Raises UserError if the folder is no run or has no records yet."""
        path = path.resolve()
        status = read_status(path)
        records = read_records(path / "metrics.jsonl")
        if not records:
            raise UserError(f"{shown(path)} has no records yet; the report needs at least one step")
        text = (path / "config.yaml").read_text(encoding="utf-8")
        return cls(path, status["kind"], status, yaml.safe_load(text), text, records)

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
        config, status = self.config, self.status
        if self.stage == "pretrain":
            model, train = config["model"], config["train"]
            what = [
                ("model", f"{model['num_layers']} layers, {model['num_experts']} experts, {model['top_k']} per token"),
                ("data", str(config["data"]["kind"])),
                ("plan", f"{train['steps']:,} steps x {train['batch_rows']:,} rows x {train['sequence_length']:,} tokens"),
            ]
        else:
            rollout, loop = config["rollout"], config["loop"]
            what = [
                ("task", str(config["task"]["name"])),
                ("plan", f"{loop['rounds']:,} rounds x {rollout['groups']} groups x {rollout['samples_per_group']} samples"),
                ("over-provision", f"{rollout['over_provision']:g} times the groups are submitted"),
            ]
        seconds, tokens = sum(self.numbers("time/step_s")), sum(self.numbers("train/tokens"))
        return [
            *what,
            ("learned", f"{tokens:,.0f} tokens in {clock(seconds)}"),
            ("state", f"{status['state']}, attempt {status['attempt']}"),
            ("started", str(status["created"])[:16].replace("T", " ")),
            ("revision", str(status["git"])),
        ]
