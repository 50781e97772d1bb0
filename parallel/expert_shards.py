"""Who owns the experts of all MoE layers: float32 masters, gradients, AdamW's moments, once in the world.

FSSDP (Hecate, arXiv 2502.02581, section 3): an expert is the unit. Any rank may own any experts, but every rank owns the
same number over all layers together. The weights that the model computes with, copies included, are in the arena
(expert_arena.py). Masters, gradients and moments are with the optimizer, on the rank's device (expert_optimizer.py) or on its
host (offload.py).

Experts stay out of the dense module and out of DeepSpeed. Gradients are sums over ranks of gradients of local losses, each
multiplied by the world size (ZeRO averages, see dense.py); dividing by the world size makes them those of the global loss,
which the norm and the step do.

Letters: L MoE layers, E experts of a layer, O experts owned by a rank over all layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert_arena import ExpertArena, ExpertShape
from parallel.expert_optimizer import ExpertOptimizer
from parallel.expert_states import ExpertState
from parallel.hooks import NONE, Hooks
from parallel.placement import Ints, TransportKind, without_copies
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
        optimizer: ExpertOptimizer,
        kind: TransportKind,
        hooks: Hooks = NONE,
    ) -> None:
        """`initial(layer, expert)` gives (gate_up_CD, down_DF) in float32; it is asked for this rank's experts only, by several
        threads at once.

        `copies` is the arena's room for copies of other ranks' experts. `optimizer` is new and has as many rows as this rank
        has experts. `kind` is that of the transport, `hooks` those of the layers.
        """
        self.world = world
        self._belong(owner_LE)
        self.optimizer = optimizer
        assert optimizer.states.rows == len(self.own), "a row for every own expert"

        with closing(_ahead(initial, self.own, torch.get_num_threads())) as values:

            def begin(_: int, state: ExpertState) -> None:
                for master, value in zip(state.masters, next(values), strict=True):
                    master.copy_(value)

            optimizer.states.change(range(len(self.own)), begin)
        add, sums = optimizer.add_gradients, optimizer.sums
        self.arena = ExpertArena(shape, len(self.own), copies, world, dtype, add, kind, hooks, sums)
        self.arena.place([without_copies(owner_E, world.size) for owner_E in owner_LE])
        self.round_masters()

    def _belong(self, owner_LE: Ints) -> None:
        """Takes note of owners."""
        own_O = np.flatnonzero(owner_LE == self.world.rank)  # in the order of the masters' rows
        self.owner_LE = owner_LE
        self.own: list[tuple[int, int]] = [divmod(place, owner_LE.shape[1]) for place in own_O.tolist()]  # (layer, expert)
        self._place_O = torch.from_numpy(own_O).to(self.world.device)

    # ------------------------------------------------------------ the update

    def squared_norm(self) -> Tensor:
        """The squared gradient norm of the experts of all ranks, each counted once; the same on every rank.

        After the last micro-batch's backward. Experts are added in their own order, whoever owns them: equal gradients have
        the same bits under all owners and on any number of ranks.
        """
        norms_LE = torch.zeros(self.owner_LE.shape, dtype=torch.float64, device=self.world.device)
        norms_LE.view(-1)[self._place_O] = self.optimizer.squared_norms()
        return self.world.sum(norms_LE).sum() / self.world.size**2

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

    def make_room(self, copies: int) -> None:
        """Room in the arena for this many copies; `place` of the arena has to follow.

        Own weights are rounded from their masters again, so that a GPU never holds the old arena beside the new one.
        """
        if copies != self.arena.copies:
            self.arena.make_room(copies)
            self.round_masters()

    def reset_optimizer(self) -> None:
        """Moments and step count become zero. Local."""

        def forget(row: int, state: ExpertState) -> None:
            for moments in state.moments:
                for moment in moments.values():
                    moment.zero_()

        self.optimizer.states.change(range(len(self.own)), forget)
        self.set_step_count(0)

    def set_step_count(self, steps: int) -> None:
        self.optimizer.set_step_count(steps)

    # ------------------------------------------------------------ owners

    @torch.no_grad()
    def reshard(self, owner_LE: Ints) -> None:
        """Moves experts to new owners, masters and moments bit for bit. Placements start from the owners alone again.

        Each expert that comes takes the place of one that goes, so that no room is needed for both. Between updates only.
        """
        counts = np.bincount(owner_LE.flatten(), minlength=self.world.size).tolist()
        if set(counts) != {len(self.own)}:
            raise ValueError(f"ranks would own {counts} experts instead of {len(self.own)} each")
        assert self.optimizer.gradients() is None, "experts move between updates, when there are no gradients"
        held = {name: row for row, name in enumerate(self.own)}
        for moves in exchanges(self.owner_LE, owner_LE):
            self._exchange(moves, held)
        self._belong(owner_LE)
        self.optimizer.states.reorder([held[name] for name in self.own])
        self.arena.place([without_copies(owner_E, self.world.size) for owner_E in owner_LE])
        self.round_masters()

    def _exchange(self, moves: list[Move], held: dict[tuple[int, int], int]) -> None:
        """This rank's part of a round of `exchanges`; `held` are the rows of its experts. From device to device."""
        going = next((move for move in moves if move.source == self.world.rank), None)
        coming = next((move for move in moves if move.target == self.world.rank), None)
        if going is None or coming is None:
            return

        def swap(row: int, state: ExpertState) -> None:
            sent = [tensor.to(self.world.device) for tensor in state.tensors()]
            arriving = [torch.empty_like(tensor) for tensor in sent]
            messages = [dist.P2POp(dist.isend, tensor, going.target, tag=tag) for tag, tensor in enumerate(sent)]
            messages += [dist.P2POp(dist.irecv, tensor, coming.source, tag=tag) for tag, tensor in enumerate(arriving)]
            Pending(messages).wait()
            for tensor, arrived in zip(state.tensors(), arriving, strict=True):
                tensor.copy_(arrived)

        row = held.pop((going.layer, going.expert))
        self.optimizer.states.change([row], swap)
        held[coming.layer, coming.expert] = row

    # ------------------------------------------------------------ state

    def named_state(self, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
        """(experts.LAYER.EXPERT.PART, float32 tensor) of this rank's experts, with their moments after. Local.

        A tensor is valid until those of the next expert are asked for, and must not be written to.
        """
        for (layer, expert), state in zip(self.own, self.optimizer.states.read(range(len(self.own))), strict=True):
            yield from _named(layer, expert, state, with_moments)

    def load_state(self, tensors: Mapping[str, Tensor], with_moments: bool) -> None:
        """Sets what `named_state` names, and the weights that the model computes with."""

        def load(row: int, state: ExpertState) -> None:
            for name, tensor in _named(*self.own[row], state, with_moments):
                tensor.copy_(tensors[name])

        self.optimizer.states.change(range(len(self.own)), load)
        self.round_masters()

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


def _ahead(initial: Callable[[int, int], Parts], own: Sequence[tuple[int, int]], threads: int) -> Generator[Parts]:
    """First values in the order of `own`. Random numbers take a core a second for 100 million, and PyTorch draws with one, so
    several experts are drawn at a time; no more than two a thread, for their memory."""
    waiting: deque[Future[Parts]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for one in own:
            if len(waiting) == 2 * threads:
                yield waiting.popleft().result()
            waiting.append(pool.submit(initial, *one))
        while waiting:
            yield waiting.popleft().result()


def _named(layer: int, expert: int, state: ExpertState, with_moments: bool) -> Iterator[tuple[str, Tensor]]:
    for part, master, moments in zip(PARTS, state.masters, state.moments, strict=True):
        name = f"experts.{layer}.{expert}.{part}"
        yield name, master
        if with_moments:
            for key, moment in moments.items():
                yield f"{name}.{key}", moment


class Move(NamedTuple):
    layer: int
    expert: int
    source: int
    target: int


def exchanges(old_LE: Ints, new_LE: Ints) -> list[list[Move]]:
    """All moves from old owners to new ones, in rounds. In a round a rank gives one expert and gets one, or does neither.

    Every rank must own equally many before and after. Then whoever follows moves from rank to rank comes back to where they
    have been: moves fall into cycles, and cycles of different ranks share a round.
    """
    leaving: dict[int, deque[Move]] = {}
    for layer, expert in np.argwhere(old_LE != new_LE).tolist():
        source, target = int(old_LE[layer, expert]), int(new_LE[layer, expert])
        leaving.setdefault(source, deque()).append(Move(layer, expert, source, target))
    rounds: list[list[Move]] = []
    for start in leaving:
        path: list[Move] = []
        while path or leaving[start]:
            path.append(leaving[path[-1].target if path else start].popleft())
            passed = [move.source for move in path]
            if path[-1].target in passed:
                first = passed.index(path[-1].target)
                cycle, path = path[first:], path[:first]
                _add_cycle(rounds, cycle)
    return rounds


def _add_cycle(rounds: list[list[Move]], cycle: list[Move]) -> None:
    """Into the first round whose ranks are others."""
    ranks = {move.source for move in cycle}
    for moves in rounds:
        if ranks.isdisjoint(move.source for move in moves):
            moves.extend(cycle)
            return
    rounds.append(cycle)
