"""FSSDP from step to step: loads come in, placements go out (Hecate, arXiv 2502.02581, section 4).

The load of the next step is predicted by the mean of the last ones. From it every rank computes the same placement, with the
same pure functions, so nothing but the loads is communicated.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallel.expert_shards import ExpertShards
from parallel.placement import Floats, Ints, Placement, without_copies
from parallel.planning import Budget, device_loads, imbalance, materialise, reshard, shares

MIB = 2**20
WINDOW = 5  # steps whose mean load predicts the next (Hecate's w)


@dataclass(frozen=True)
class MaterialisationSettings:
    budget: Budget
    rematerialise: bool  # fetch copies again for the backward pass instead of keeping those of all layers
    reshard_every: int  # updates; 0 keeps the first owners


class Materialisation:
    """Plans where the experts of `shards` lie. All ranks hold one and tell it the same loads."""

    def __init__(self, shards: ExpertShards, settings: MaterialisationSettings) -> None:
        self.shards, self.settings = shards, settings
        self.loads: deque[Ints] = deque(maxlen=WINDOW)  # (L, E) of each of the last steps

    def observe(self, counts_LE: Tensor, updates: int) -> dict[str, float]:
        """Takes the loads of the step that is done, moves owners if it is time, and places copies for the next step.

        Args:
            counts_LE: tokens per expert of all ranks.
            updates: optimizer updates done.

        Returns:
            Metrics of the step that is done. Collective.
        """
        loads_LE = counts_LE.cpu().numpy().astype(np.int64)
        metrics = self._measured(loads_LE.astype(np.float64))
        self.loads.append(loads_LE)
        every = self.settings.reshard_every
        if every and updates % every == 0:
            owner_LE = reshard(self._predicted(), self.shards.owner_LE, self.shards.world.topology, self.settings.budget)
            metrics["moe/owners_moved"] = float((owner_LE != self.shards.owner_LE).sum())
            if owner_LE is not self.shards.owner_LE:
                self.shards.reshard(owner_LE)
        self.place()
        return metrics

    def place(self) -> None:
        """Places copies by the loads seen so far; without any there are no copies. Not collective."""
        world, owner_LE = self.shards.world, self.shards.owner_LE
        if not self.loads:
            self.shards.arena.place([without_copies(owner_E, world.size) for owner_E in owner_LE])
            return
        placements = [
            materialise(loads_E, owner_E, world.topology, self.settings.budget)
            for loads_E, owner_E in zip(self._predicted(), owner_LE, strict=True)
        ]
        shares_LED = [shares(placement, world.topology, world.rank) for placement in placements]
        self.shards.arena.place(placements, shares_LED, rematerialise=self.settings.rematerialise)

    def _predicted(self) -> Floats:
        return np.mean(np.stack(list(self.loads)), axis=0)

    def _measured(self, loads_LE: Floats) -> dict[str, float]:
        arena, world = self.shards.arena, self.shards.world
        pairs = list(zip(arena.placements, loads_LE, strict=True))
        moved_bytes, exposed_s = arena.take_costs()
        sums = world.sum(torch.tensor([moved_bytes, exposed_s], dtype=torch.float64, device=world.device)).tolist()
        return {
            "moe/copies_per_layer": float(np.mean([placement.extra_D.sum() for placement in arena.placements])),
            "moe/copies_mib": arena.most_copies * arena.expert_bytes / MIB,
            "moe/moved_mib": sums[0] / MIB,
            "moe/rank_imbalance": float(np.mean([imbalance(device_loads(p, world.topology, e)) for p, e in pairs])),
            "moe/rank_imbalance_owners": float(np.mean([imbalance(_owned_load(p, e)) for p, e in pairs])),
            "time/copies_exposed_s": sums[1] / world.size,
        }

    # ------------------------------------------------------------ state

    def state(self) -> Tensor:
        """The loads of the window, (WINDOW, L, E) int64, the newest last; before the first step -1."""
        missing = [np.full(self.shards.owner_LE.shape, -1)] * (WINDOW - len(self.loads))
        return torch.from_numpy(np.stack([*missing, *self.loads]).astype(np.int64))

    def load_state(self, loads: Tensor) -> None:
        """Restores what `state` gave and places copies as then. Not collective."""
        self.loads = deque((step for step in loads.cpu().numpy() if (step >= 0).all()), maxlen=WINDOW)
        self.place()


def _owned_load(placement: Placement, loads_E: Floats) -> Floats:
    """Entries of each device if owners served them all, (D,)."""
    return np.asarray(np.bincount(placement.owner_E, weights=loads_E, minlength=placement.copies_ED.shape[1]), dtype=np.float64)
