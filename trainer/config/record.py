"""The base of all options: typed, frozen, validated once.

Hydra composes the files under conf/; `launch.cli.load` turns the composed mapping into one of the roots `PretrainConfig`
(run.py), `RLConfig` (rl.py) or `PlanConfig` (plan.py). Nothing past the entry point sees a Hydra object. A field's unit is in
its name or its comment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Frozen; an unknown key is an error, a wrong type is never silently accepted (`"2"` for an integer is).

    Numbers are finite, but where an option is a bound and allows `.inf`, none, itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    BRINGS: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # option -> groups whose options come with it
