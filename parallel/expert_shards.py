"""Who owns the experts of all MoE layers: float32 masters, gradients, AdamW's moments, once in the world.

FSSDP (Hecate, arXiv 2502.02581, section 3): an expert is the unit, any rank may own any experts, but every rank owns equally
many over all layers together. What the model computes with, copies included, lies in the arena (expert_arena.py). Masters,
gradients and moments lie with the optimizer, on the rank's device (expert_optimizer.py) or on its host (offload.py).

Experts stay out of the dense module and out of DeepSpeed. Gradients are sums over ranks of gradients of local losses, each
multiplied by the world size (ZeRO averages, see dense.py); dividing by the world size makes them those of the global loss,
which the norm and the step do.

Letters: L MoE layers, E experts of a layer, O experts owned by a rank over all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.adamw import AdamWSettings
from parallel.expert_arena import ExpertArena, ExpertShape
from parallel.expert_optimizer import DeviceAdamW, ExpertOptimizer
from parallel.offload import CPUAdamW
from parallel.placement import Ints, without_copies
from parallel.sparse_collectives import Parts, Pending
from parallel.topology import World

PARTS = ("gate_up", "down")


class ExpertShards:
    """One rank's experts. Every method is collective unless it says otherwise."""

    def __init__(
        self,
        shape: ExpertShape,
        initial: Callable[[int, int], Parts],
        owner_LE: Ints,
        copies: int,
        world: World,
        dtype: torch.dtype,
        settings: AdamWSettings,
        offload: bool,
        peer_memory: bool,
    ) -> None:
        """`initial(layer, expert)` gives (gate_up_CD, down_DF) in float32; it is asked for this rank's experts only.

        `copies` is the arena's room for copies of other ranks' experts. With `offload` the optimizer lies on the host. With
        `peer_memory` ranks read each other's memory.
        """
        self.world = world
        self.owner_LE = owner_LE
        self.own = _own(owner_LE, world)
        masters = shape.matrices(len(self.own), torch.float32, torch.device("cpu") if offload else world.device)
        for row, (layer, expert) in enumerate(self.own):
            for master, value in zip(masters, initial(layer, expert), strict=True):
                master[row].copy_(value)
        self.optimizer: ExpertOptimizer
        self.optimizer = CPUAdamW(masters, settings, world.device) if offload else DeviceAdamW(masters, settings)
        add = self.optimizer.add_gradients
        self.arena = ExpertArena(shape, len(self.own), copies, world, dtype, add, peer_memory=peer_memory)
        self.arena.place([without_copies(owner_E, world.size) for owner_E in owner_LE])
        self.round_masters()

    # ------------------------------------------------------------ the update

    def squared_norm(self) -> Tensor:
        """The squared gradient norm of the experts of all ranks, each counted once; the same on every rank.

        After the last micro-batch's backward.
        """
        return self.world.sum(self.optimizer.squared_norm()) / self.world.size**2

    def step(self, lr: float, scale: float) -> None:
        """One AdamW update with the global loss's gradients multiplied by `scale`; gradients are gone afterwards."""
        with self.arena.changing():
            self.optimizer.step(lr, scale / self.world.size, self.arena.rows)

    def drop_gradients(self) -> None:
        """Forgets what has been added since the last step. Local."""
        self.optimizer.drop_gradients()

    def bad_gradient(self) -> str | None:
        """The name of the first of this rank's experts whose gradient is not finite. Local; after the last backward."""
        for part, gradient in zip(PARTS, self.optimizer.gradients() or (), strict=False):
            bad = torch.nonzero(~torch.isfinite(gradient).flatten(1).all(dim=1)).flatten().tolist()
            if bad:
                layer, expert = self.own[bad[0]]
                return f"experts.{layer}.{expert}.{part}"
        return None

    def round_masters(self) -> None:
        """Brings the weights that the model computes with up to the masters."""
        with self.arena.changing():
            self.optimizer.round_masters(self.arena.rows)

    def reset_optimizer(self) -> None:
        """Moments and step count become zero. Local."""
        for moments in self.optimizer.moments:
            for moment in moments.values():
                moment.zero_()
        self.set_step_count(0)

    def set_step_count(self, steps: int) -> None:
        self.optimizer.set_step_count(steps)

    # ------------------------------------------------------------ owners

    @torch.no_grad()
    def reshard(self, owner_LE: Ints) -> None:
        """Moves experts to new owners, masters and moments bit for bit. Placements start from the owners alone again.

        One tensor after the other, so that memory rises by a third of what a rank owns at most. Between updates only.
        """
        own = _own(owner_LE, self.world)
        if len(own) != len(self.own):
            raise ValueError(f"rank {self.world.rank} would own {len(own)} experts instead of {len(self.own)}")
        assert self.optimizer.gradients() is None, "experts move between updates, when there are no gradients"
        for master, moments in zip(self.optimizer.masters, self.optimizer.moments, strict=True):
            for tensor in (master, *moments.values()):
                tensor.copy_(_resharded(tensor, self.owner_LE, owner_LE, self.world))
        self.owner_LE, self.own = owner_LE, own
        self.arena.place([without_copies(owner_E, self.world.size) for owner_E in owner_LE])
        self.round_masters()

    # ------------------------------------------------------------ state

    def named_state(self, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
        """(experts.LAYER.EXPERT.PART, float32 tensor) of this rank's experts, with their moments behind. Views. Local."""
        for row, (layer, expert) in enumerate(self.own):
            for part, master, moments in zip(PARTS, self.optimizer.masters, self.optimizer.moments, strict=True):
                name = f"experts.{layer}.{expert}.{part}"
                yield name, master.detach()[row]
                if with_moments:
                    for key, moment in moments.items():
                        yield f"{name}.{key}", moment[row]

    def gathered(self, layer: int) -> Parts | None:
        """All experts of a layer in the dtype of the model, (E, 2F, D) and (E, D, F), on rank 0; None elsewhere."""
        owner_E, slots = self.owner_LE[layer], self.arena.layers[layer].slots
        shape, rows = self.arena.shape, self.arena.rows
        whole = shape.matrices(shape.experts, self.arena.dtype, self.world.device) if self.world.rank == 0 else None
        messages = []
        for expert, owner in enumerate(owner_E.tolist()):
            for index in range(len(PARTS)):
                if owner == self.world.rank and whole is not None:
                    whole[index][expert].copy_(rows[index][slots[expert]])
                elif owner == self.world.rank:
                    messages.append(dist.P2POp(dist.isend, rows[index][slots[expert]], 0, tag=2 * expert + index))
                elif whole is not None:
                    messages.append(dist.P2POp(dist.irecv, whole[index][expert], owner, tag=2 * expert + index))
        Pending(messages).wait()
        return whole


def _own(owner_LE: Ints, world: World) -> list[tuple[int, int]]:
    """(layer, expert) of what this rank owns, in the order of the masters' rows."""
    return [(layer, expert) for layer, expert in np.argwhere(owner_LE == world.rank).tolist()]


def _resharded(tensor: Tensor, old_LE: Ints, new_LE: Ints, world: World) -> Tensor:
    """The rows of this rank's experts under new owners: those that stay are copied, those that move are sent.

    They go from device to device, wherever `tensor` lies, a few at a time, so that what lies on a host needs little room there.
    """
    old = {name: row for row, name in enumerate(_own(old_LE, world))}
    new = {name: row for row, name in enumerate(_own(new_LE, world))}
    rows = torch.empty_like(tensor)
    for name in old.keys() & new.keys():
        rows[new[name]].copy_(tensor[old[name]])
    moved = np.argwhere(old_LE != new_LE).tolist()
    for first in range(0, len(moved), world.size):  # about one expert to send and one to receive for every rank
        messages, arriving = [], []
        for tag, (layer, expert) in enumerate(moved[first : first + world.size]):
            source, target = int(old_LE[layer, expert]), int(new_LE[layer, expert])
            if source == world.rank:
                messages.append(dist.P2POp(dist.isend, tensor[old[layer, expert]].to(world.device), target, tag=tag))
            elif target == world.rank:
                row = rows[new[layer, expert]]
                arriving.append((row, torch.empty_like(row, device=world.device)))
                messages.append(dist.P2POp(dist.irecv, arriving[-1][1], source, tag=tag))
        Pending(messages).wait()
        for row, arrived in arriving:
            row.copy_(arrived)
    return rows
