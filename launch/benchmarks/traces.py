"""Loads of experts from step to step: drawn as training shows them, or recorded by a run.

A trace is the entries of one layer, (steps, E). An expert gets at most one entry per token, so at most 1 / K of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from kernels.errors import UserError
from launch.recorded import require_one_shape
from parallel.placement import Floats
from trainer.metrics import LOAD
from trainer.records import read_records

Draw = Callable[[int, int, np.random.Generator], Floats]  # (steps, E, random) -> popularity (steps, E)


def zipf(steps: int, experts: int, random: np.random.Generator) -> Floats:
    """Zipf's law with exponent 1, the same experts hot in every step."""
    return np.tile(random.permutation(1.0 / np.arange(1, experts + 1)), (steps, 1))


def drift(steps: int, experts: int, random: np.random.Generator) -> Floats:
    """Starts as Zipf's law; the logarithm of every popularity walks at random, by a fifth of its spread in a step."""
    start_E = np.log(random.permutation(1.0 / np.arange(1, experts + 1)))
    walk = random.normal(0.0, start_E.std() / 5, (steps, experts)).cumsum(axis=0)
    return np.asarray(np.exp(start_E + walk))


def burst(steps: int, experts: int, random: np.random.Generator) -> Floats:
    """Nearly even, but every four steps other experts, one in sixteen, become ten times as popular."""
    found = random.uniform(0.8, 1.2, (steps, experts))
    for first in range(0, steps, 4):
        found[first : first + 4, random.choice(experts, max(experts // 16, 1), replace=False)] *= 10
    return found


def settling(steps: int, experts: int, random: np.random.Generator) -> Floats:
    """The beginning of a run with balancing: from an exponent of 1.5 to nearly even."""
    order_E = random.permutation(np.arange(1, experts + 1)).astype(np.float64)
    exponent_S = np.linspace(1.5, 0.1, steps)
    return np.asarray(order_E ** -exponent_S[:, None])


DRAWN: Mapping[str, Draw] = {"zipf": zipf, "drift": drift, "burst": burst, "settling": settling}


def draw(name: str, steps: int, experts: int, entries: int, top_k: int, random: np.random.Generator) -> Floats:
    """A trace of `entries` a step, counted out at random in proportion to the popularity."""
    popularity_SE = DRAWN[name](steps, experts, random)
    return np.stack([random.multinomial(entries, capped(p_E, 1 / top_k)) for p_E in popularity_SE]).astype(np.float64)


def capped(popularity_E: Floats, most: float) -> Floats:
    """Shares that sum to one, in proportion to the popularity except where that is more than `most`."""
    share_E = popularity_E / popularity_E.sum()
    full_E = np.zeros(len(share_E), dtype=np.bool_)
    while (share_E > most * (1 + 1e-12)).any():
        full_E |= share_E >= most
        rest_E = np.where(full_E, 0.0, popularity_E)
        left = 1 - most * full_E.sum()
        share_E = np.where(full_E, most, rest_E * (left / rest_E.sum() if rest_E.any() else 0.0))
    return np.asarray(share_E / share_E.sum())


def recorded(run_dir: Path, entries: int) -> Floats:
    """(S, L, E): the loads of a run's MoE layers, from its metrics.jsonl, scaled to `entries` a step."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{run_dir} holds no metrics.jsonl; name the folder of a run")
    steps = [record[LOAD] for record in read_records(file) if LOAD in record]
    if not steps:
        raise UserError(f"{file} has no record of {LOAD}")
    if len(steps) == 1:
        raise UserError(f"{file} has one record of {LOAD}; a step is planned from those before it, so name a run with more")
    require_one_shape(steps, LOAD, file)
    shares_SLE = np.array(steps, dtype=np.float64)
    shares_SLE /= np.maximum(shares_SLE.sum(axis=2, keepdims=True), 1e-12)
    return shares_SLE * entries
