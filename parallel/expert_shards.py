"""Who owns the experts of all MoE layers, and steps them: float32 masters, gradients, AdamW's moments, once in the world.

FSSDP (Hecate, arXiv 2502.02581, section 3): an expert is the unit, any rank may own any experts, but every rank owns equally
many over all layers together. What the model computes with, copies included, lies in the arena (expert_arena.py).

Experts stay out of the dense module and out of DeepSpeed. Gradients are sums over ranks of gradients of local losses, each
multiplied by the world size (ZeRO averages, see dense.py); dividing by the world size makes them those of the global loss.

Letters: L MoE layers, E experts of a layer, O experts owned by a rank over all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.adamw import AdamWSettings, adamw, set_lr, zero_state
from parallel.expert_arena import ExpertArena, ExpertShape
from parallel.placement import Ints, without_copies
from parallel.sparse_collectives import Parts, Pending
from parallel.topology import World

MOMENTS = ("exp_avg", "exp_avg_sq")
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
    ) -> None:
        """`initial(layer, expert)` gives (gate_up_CD, down_DF) in float32; it is asked for this rank's experts only.

        `copies` is the arena's room for copies of other ranks' experts.
        """
        self.world = world
        self.owner_LE = owner_LE
        self.own = _own(owner_LE, world)
        self.masters = shape.matrices(len(self.own), torch.float32, world.device)
        for row, (layer, expert) in enumerate(self.own):
            for master, value in zip(self.masters, initial(layer, expert), strict=True):
                master[row].copy_(value)
        for master in self.masters:
            master.requires_grad_()
        self.optimizer = adamw(list(self.masters), settings)
        for master in self.masters:
            self.optimizer.state[master].update(zero_state(master))
        self.arena = ExpertArena(shape, len(self.own), copies, world, dtype, self._add_gradients)
        self.arena.place([without_copies(owner_E, world.size) for owner_E in owner_LE])
        self.round_masters()

    # ------------------------------------------------------------ gradients and the update

    def _add_gradients(self, row: int, gradients: Parts) -> None:
        for master, gradient in zip(self.masters, gradients, strict=True):
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad[row : row + gradient.shape[0]].add_(gradient)

    def average_gradients(self) -> None:
        """After the last micro-batch's backward: from the sum of scaled local losses to the gradient of the global loss."""
        for master in self.masters:
            assert master.grad is not None, "every MoE layer gives gradients, zeros where no token came"
            master.grad.div_(self.world.size)

    def squared_norm(self) -> Tensor:
        """The squared gradient norm of the experts of all ranks, each counted once; the same on every rank."""
        own = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for master in self.masters:
            assert master.grad is not None, "average_gradients comes first"
            own += master.grad.double().square().sum()
        return self.world.sum(own)

    def step(self, lr: float, scale: float) -> None:
        """One AdamW update with gradients multiplied by `scale`; gradients are gone afterwards."""
        for master in self.masters:
            assert master.grad is not None, "average_gradients comes first"
            master.grad.mul_(scale)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.round_masters()

    @torch.no_grad()
    def round_masters(self) -> None:
        """Brings the weights that the model computes with up to the masters. Local."""
        for rows, master in zip(self.arena.rows, self.masters, strict=True):
            rows[: len(self.own)].copy_(master)
        self.arena.outdated()

    # ------------------------------------------------------------ owners

    @torch.no_grad()
    def reshard(self, owner_LE: Ints) -> None:
        """Moves experts to new owners, masters and moments bit for bit. Placements start from the owners alone again.

        One tensor after the other, so that memory rises by a third of what a rank owns at most. Between updates only.
        """
        own = _own(owner_LE, self.world)
        if len(own) != len(self.own):
            raise ValueError(f"rank {self.world.rank} would own {len(own)} experts instead of {len(self.own)}")
        for master in self.masters:
            assert master.grad is None, "experts move between updates, when there are no gradients"
            for tensor in (master.data, *self.moments(master).values()):
                tensor.copy_(_resharded(tensor, self.owner_LE, owner_LE, self.world))
        self.owner_LE, self.own = owner_LE, own
        self.arena.place([without_copies(owner_E, self.world.size) for owner_E in owner_LE])
        self.round_masters()

    # ------------------------------------------------------------ state

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        return {key: self.optimizer.state[master][key] for key in MOMENTS}

    def named_state(self, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
        """(experts.LAYER.EXPERT.PART, float32 tensor) of this rank's experts, with their moments behind. Views. Local."""
        for row, (layer, expert) in enumerate(self.own):
            for part, master in zip(PARTS, self.masters, strict=True):
                name = f"experts.{layer}.{expert}.{part}"
                yield name, master.detach()[row]
                if with_moments:
                    for key, moment in self.moments(master).items():
                        yield f"{name}.{key}", moment[row]

    def set_step_count(self, steps: int) -> None:
        for master in self.masters:
            self.optimizer.state[master]["step"].fill_(steps)

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
    """The rows of this rank's experts under new owners: those that stay are copied, those that move are sent."""
    old = {name: row for row, name in enumerate(_own(old_LE, world))}
    new = {name: row for row, name in enumerate(_own(new_LE, world))}
    rows = torch.empty_like(tensor)
    for name in old.keys() & new.keys():
        rows[new[name]].copy_(tensor[old[name]])
    messages = []
    for tag, (layer, expert) in enumerate(np.argwhere(old_LE != new_LE).tolist()):
        source, target = int(old_LE[layer, expert]), int(new_LE[layer, expert])
        if source == world.rank:
            messages.append(dist.P2POp(dist.isend, tensor[old[layer, expert]], target, tag=tag))
        elif target == world.rank:
            messages.append(dist.P2POp(dist.irecv, rows[new[layer, expert]], source, tag=tag))
    Pending(messages).wait()
    return rows
