"""The expert weights that a rank computes with: its own, and copies of others' for the current step.

FSSDP (Hecate, arXiv 2502.02581, section 3). The arena's rows 0..O-1 are the rank's own experts over all layers, in the order of
(layer, expert); copies lie after them. Copies are fetched by SparseAllGather before they are needed, once a step; gradients of
copies go home by SparseReduceScatter, one layer behind the backward pass. With rematerialisation only one layer's copies exist
at a time, and backward fetches them again.

Letters: L MoE layers, E experts of a layer, O experts owned by a rank over all layers, S slots of the arena, D model, F expert
hidden, C = 2F, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kernels.accumulate import Sum
from kernels.host_device import to_device
from parallel.hooks import NONE, Hooks
from parallel.placement import Floats, Ints, Placement, TransportKind, missing
from parallel.sparse_collectives import Parts, Shapes, empty_parts
from parallel.stopwatch import Stopwatch
from parallel.token_exchange import boundaries
from parallel.topology import World
from parallel.transport import Gathering, Movement, Returning, transport

AddGradients = Callable[[int, Parts], None]  # (first own row, gradients of that row and those after it)
SumsOfRows = Callable[[int, int], tuple[Sum, Sum] | None]  # of (first own row, how many)


@dataclass(frozen=True)
class ExpertShape:
    """Of all experts of a model: every layer has as many, all of one shape."""

    layers: int
    experts: int  # in each layer
    hidden: int  # D
    expert_hidden: int  # F

    @property
    def parts(self) -> Shapes:
        """Of gate_up (2F, D) and down (D, F)."""
        return (2 * self.expert_hidden, self.hidden), (self.hidden, self.expert_hidden)

    def matrices(self, experts: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Uninitialised gate_up (experts, 2F, D) and down (experts, D, F)."""
        return empty_parts(experts, self.parts, dtype, device)


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer that this rank has under one placement."""

    placement: Placement
    slots: dict[int, int]  # expert -> row of the arena; own experts first, then copies, each in ascending order
    owned: int  # how many of them are own; their rows are adjacent
    slots_E: Tensor  # int32; the values of `slots`; where there are none, any row, to which no token comes
    index_E: Tensor  # int32, one for each expert of the layer: its position in `slots`, -1 where it is not here
    ends_ED: Tensor  # float64, (E * W,); see token_exchange.boundaries
    phase_E: Tensor  # float64
    split: bool  # whether this rank's tokens of one expert go to several ranks
    copied: bool  # whether any rank has copies
    stays: bool  # whether every rank serves all of its own tokens; the same on all ranks
    movement: Movement

    @property
    def first_own(self) -> int:
        return next(iter(self.slots.values()), 0)


@dataclass(frozen=True)
class Layout:
    """Where this rank has the experts of all layers."""

    layers: list[LayerExperts]
    row_LE: Ints  # in which row of its owner's arena each expert lies
    most_copies: int  # that any rank keeps
    most_in_layer: int  # copies of one layer that any rank has
    rematerialise: bool


class ExpertArena:
    """One rank's weights of experts, in the dtype of the model. All ranks make the same calls in the same order."""

    def __init__(
        self,
        shape: ExpertShape,
        owned: int,
        copies: int,
        world: World,
        dtype: torch.dtype,
        add_gradients: AddGradients,
        kind: TransportKind,
        hooks: Hooks = NONE,
        sums: SumsOfRows | None = None,
    ) -> None:
        """`copies`: how many copies there is room for, of all layers at once or, with rematerialisation, of one.

        `kind`: as transport.transport_kind finds it. `hooks`: of the layers whose experts these are. `sums`: where kernels may
        add gradients of own experts by themselves.
        """
        self.shape, self.owned, self.copies, self.world, self.dtype = shape, owned, copies, world, dtype
        self.kind, self.hooks = kind, hooks
        self.attention: Stopwatch | None = Stopwatch(world.device)  # of what lies before each layer; None: nobody asks
        self.transport = transport(world, shape.hidden, owned + copies, shape.parts, dtype, kind, hooks)
        self._add_gradients, self._sums = add_gradients, sums
        self._returning: tuple[int, Returning] | None = None
        self.walking_back = False  # between a micro-batch's loss and its gradients
        self._exposed = Stopwatch(world.device)
        self._moved_bytes = 0.0

    def travel(self, kind: TransportKind) -> None:
        """From here on tokens travel so: as messages, in one way or the other. Collective."""
        self.transport.travel(kind)
        self.kind = kind

    @property
    def peer_memory(self) -> bool:
        return self.kind == "peer_memory"

    def alone(self, layer: int) -> bool:
        """Whether nothing of the layer's tokens is exchanged: every rank serves its own. Not with messages, whose schedule is
        measured and planned for what travels; nor where backward fetches copies again. The same on all ranks."""
        return self.layers[layer].stays and self.peer_memory and not self.rematerialise

    @property
    def rows(self) -> Parts:
        """gate_up (S, 2F, D) and down (S, D, F) of the slots."""
        return self.transport.rows

    @cached_property
    def row_bytes(self) -> float:
        """Of a token on its way. Plans ask for every layer in every update."""
        return self.hooks.row_bytes(self.shape.hidden, self.dtype)

    @property
    def expert_bytes(self) -> int:
        return sum(rows[0].nbytes for rows in self.rows)

    def take_costs(self) -> tuple[float, float]:
        """(bytes of weights and gradients sent, seconds waited for copies) by this rank since the last call."""
        moved, self._moved_bytes = self._moved_bytes, 0.0
        return moved, self._exposed.take()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        with self.world.exposed, self._exposed:
            yield

    def make_room(self, copies: int) -> None:
        """Room for this many copies from here on. Own rows are unset until they are written, and `place` has to follow."""
        self.transport.make_room(self.owned + copies)
        self.copies = copies

    def layout(
        self,
        placements: Sequence[Placement],
        shares_LED: Sequence[Floats] | None = None,
        stays_L: Sequence[bool] | None = None,
        *,
        rematerialise: bool = False,
    ) -> Layout:
        """Experts as `placements` says, one for each layer, and tokens that go to them by `shares_LED`.

        `shares_LED` are this rank's (see token_exchange.boundaries); None serves placements without copies. `stays_L`: where
        on every rank all shares are its own (Plan.stays); None: nowhere. Nothing changes here, and the host waits for nothing
        that a GPU still has to do.
        """
        extra_LD = np.stack([placement.extra_D for placement in placements])
        most_copies = copies_kept(extra_LD, rematerialise=rematerialise)
        if shares_LED is None:
            shares_LED = [placement.copies_ED.astype(np.float64) for placement in placements]
        own, copy, slots_L = 0, self.owned, list[dict[int, int]]()
        for placement, here in zip(placements, extra_LD[:, self.world.rank].tolist(), strict=True):
            slots_L.append(self._slots(placement, own, range(copy, copy + here), {}))
            own += len(slots_L[-1]) - here
            copy += 0 if rematerialise else here
        row_LE = _own_rows(np.stack([placement.owner_E for placement in placements]))
        layers = self._layers(placements, shares_LED, slots_L, row_LE, stays_L or [False] * len(placements))
        return Layout(layers, row_LE, most_copies, int(extra_LD.max()), rematerialise)

    def take(self, layout: Layout) -> None:
        """From here on experts lie so. No weights move yet. Raises ValueError where a rank has no room for its copies."""
        if layout.most_copies > self.copies:
            raise ValueError(f"a rank would keep {layout.most_copies} copies and has room for {self.copies}")
        self.layers, self.rematerialise, self._row_LE = list(layout.layers), layout.rematerialise, layout.row_LE
        self.transport.expect_gradients(layout.most_in_layer)
        self.outdated()

    def place(
        self,
        placements: Sequence[Placement],
        shares_LED: Sequence[Floats] | None = None,
        stays_L: Sequence[bool] | None = None,
        *,
        rematerialise: bool = False,
    ) -> None:
        """Takes their layout."""
        self.take(self.layout(placements, shares_LED, stays_L, rematerialise=rematerialise))

    @property
    def placements(self) -> list[Placement]:
        return [found.placement for found in self.layers]

    def replace(self, layer: int, placement: Placement, shares_ED: Floats, *, stays: bool) -> None:
        """Another placement of one layer whose copies are here, until `place`: copies that stay keep their rows, new ones are
        fetched at once into rows that are free then. `stays`: as of `layout`."""
        before = self.layers[layer]
        others = () if self.rematerialise else (found for found in self.layers if found is not before)
        taken = {row for found in others for row in found.slots.values()}
        kept = {expert: row for expert, row in before.slots.items() if placement.copies_ED[expert, self.world.rank]}
        rows = [row for row in range(self.owned, self.owned + self.copies) if row not in taken and row not in kept.values()]
        slots = self._slots(placement, before.first_own, rows, kept)
        (found,) = self._layers([placement], [shares_ED], [slots], self._row_LE[layer, None], [stays])
        self.layers[layer] = found
        self.transport.expect_gradients(int(placement.extra_D.max()))
        new = self.transport.movement(missing(placement, before.placement), self._row_LE[layer])
        with self._waiting():
            new.gather(found.slots).finish()
        self._present.add(layer)
        self._moved_bytes += new.num_sends * self.expert_bytes

    def _slots(self, placement: Placement, first_own: int, rows: Sequence[int], kept: dict[int, int]) -> dict[int, int]:
        """Of a layer (see LayerExperts). `rows` are free for copies, those of which `kept` says where they are excepted."""
        mine_E, here_E = placement.owner_E == self.world.rank, placement.copies_ED[:, self.world.rank]
        owned, copies = np.flatnonzero(mine_E).tolist(), np.flatnonzero(here_E & ~mine_E).tolist()
        free = iter(rows)
        own = dict(zip(owned, range(first_own, first_own + len(owned)), strict=True))
        return own | {expert: kept[expert] if expert in kept else next(free) for expert in copies}

    def _layers(
        self,
        placements: Sequence[Placement],
        shares_LED: Sequence[Floats],
        slots_L: Sequence[dict[int, int]],
        row_LE: Ints,
        stays_L: Sequence[bool],
    ) -> list[LayerExperts]:
        rank, device = self.world.rank, self.world.device
        index_LE = np.full((len(slots_L), self.shape.experts), -1, dtype=np.int32)
        for index_E, slots in zip(index_LE, slots_L, strict=True):
            index_E[list(slots)] = np.arange(len(slots))
        ends_LED, phase_LE = zip(*[boundaries(shares_ED, rank) for shares_ED in shares_LED], strict=True)
        columns = (
            to_device([np.array(list(slots.values()) or [0], dtype=np.int32) for slots in slots_L], device),
            to_device(list(index_LE), device),
            to_device(ends_LED, device),
            to_device(phase_LE, device),
        )
        layers = zip(placements, shares_LED, slots_L, row_LE, stays_L, *columns, strict=True)
        return [
            LayerExperts(
                placement=placement,
                slots=slots,
                owned=int((placement.owner_E == rank).sum()),
                slots_E=slots_E,
                index_E=index_E,
                ends_ED=ends_ED,
                phase_E=phase_E,
                split=bool(((shares_ED > 0).sum(axis=1) > 1).any()),
                copied=bool(placement.beside_ED.any()),
                stays=stays,
                movement=self.transport.movement(placement, row_E),
            )
            for placement, shares_ED, slots, row_E, stays, slots_E, index_E, ends_ED, phase_E in layers
        ]

    # ------------------------------------------------------------ copies

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Surrounds changes of own rows: before, nobody reads them any more; after, copies of them are of no use any more."""
        with self.world.exposed:
            self.transport.quiesce()
        yield
        self.outdated()

    def outdated(self) -> None:
        """No copies are here."""
        self._present: set[int] = set()
        self._gathers: dict[int, Gathering] = {}

    def fetch(self, layer: int) -> None:
        """Starts the SparseAllGather of a layer's copies, unless they are here or on their way, or there are none."""
        found = self.layers[layer]
        if found.copied and layer not in self._present and layer not in self._gathers:
            self._gathers[layer] = found.movement.gather(found.slots)
            self._moved_bytes += found.movement.num_sends * self.expert_bytes

    def materialised(self, layer: int) -> LayerExperts:
        """A layer, once its copies may be read."""
        self.fetch(layer)
        if layer in self._gathers:
            with self._waiting():
                self._gathers.pop(layer).finish()
            self._present.add(layer)
        return self.layers[layer]

    def release(self, layer: int) -> None:
        """With rematerialisation, after a layer's forward: the next layer's copies may take the place of this one's.

        Not where activations are recomputed in the backward pass, which is about to need them.
        """
        if self.rematerialise and not self.walking_back:
            self._present.discard(layer)

    def exchange_for_previous(self, layer: int) -> None:
        """With rematerialisation, after a layer's backward: its copies make room for those of the layer below."""
        self._present.discard(layer)
        if layer > 0:
            self.fetch(layer - 1)

    # ------------------------------------------------------------ gradients

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Surrounds the backward pass of a micro-batch; after it all gradients have been added at their owners."""
        self.walking_back = True
        yield
        self.walking_back = False
        self._finish_gradients()

    def sums(self, layer: int) -> tuple[Sum, Sum] | None:
        """Where gradients of the layer's own experts are to be added, in the order of its slots, before `return_gradients`
        takes the others. None: it takes all. Messages look at own gradients, too."""
        found = self.layers[layer]
        if self._sums is None or not found.owned or not (self.world.size == 1 or self.peer_memory):
            return None
        return self._sums(found.first_own, found.owned)

    def return_gradients(self, layer: int, gradients: Parts) -> None:
        """Takes the gradients of a layer's experts, in the order of its slots, without own ones that were added to `sums`. Own
        ones stay, those of copies are sent home.

        What the layer before sent is awaited here, so it has had the attention's backward pass to arrive.
        """
        self._finish_gradients()
        found = self.layers[layer]
        added = found.slots_E.shape[0] - gradients[0].shape[0]
        if not added:
            self._add_gradients(found.first_own, tuple(part[: found.owned] for part in gradients))
        if not found.copied:
            return
        places = {expert: place - added for place, expert in enumerate(found.slots)}
        self._returning = layer, found.movement.reduce(gradients, places)
        self._moved_bytes += found.movement.num_receives * self.expert_bytes

    def _finish_gradients(self) -> None:
        if self._returning is not None:
            (layer, reduce), self._returning = self._returning, None
            with self._waiting():
                arrived = reduce.finish()
            for expert, gradients in arrived:
                self._add_gradients(self.layers[layer].slots[expert], gradients)


def copies_kept(extra_LD: Ints, *, rematerialise: bool) -> int:
    """On the rank that keeps most, of the copies that ranks have of each layer."""
    kept_D = extra_LD.max(axis=0) if rematerialise else extra_LD.sum(axis=0)
    return int(kept_D.max())


def _own_rows(owner_LE: Ints) -> Ints:
    """(L, E): in which row of its owner's arena each expert lies."""
    row_LE = np.empty_like(owner_LE)
    for rank in np.unique(owner_LE):
        own_LE = owner_LE == rank
        row_LE[own_LE] = np.arange(own_LE.sum())
    return row_LE
