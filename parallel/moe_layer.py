"""The experts of one MoE layer: order -> dispatch -> experts -> combine, on one device or over all ranks.

If tokens travel as messages, over one level or two, chunked_experts.py does the last three in chunks. If ranks read each
other's memory, peer_layer.py does them for the whole layer, because the device itself reads.

The gate is in the model (its weight is a dense parameter); its decisions arrive here as a `Routing`.
Letters: T tokens, K top-k, N = T * K entries, R rows received, D model, F expert hidden, C = 2F, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.destinations import destinations
from kernels.expert_mlp import expert_mlp
from kernels.expert_order import ExpertOrder, expert_order
from kernels.expert_passes import ArenaExperts
from kernels.router import Routing
from parallel.chunked_experts import Chunked, Collect, Direction, chunked_experts, unmarked
from parallel.expert_arena import ExpertArena, LayerExperts
from parallel.gradient_slices import GradientSlices
from parallel.peer_exchange import PeerCounts, PeerTokens
from parallel.peer_layer import InPlace, experts_in_place
from parallel.schedule.pipeline import ATTENTION, COPIES, WHOLE, Degrees
from parallel.schedule.slices import UNDER_DENSE, UNDER_LAYER, place_of
from parallel.token_exchange import Counts, exchange


@dataclass
class Recomputation:
    """Of a layer that is computed once forward and once more, `again`, for its backward pass. Then its results are known, and
    so is how many rows travel, for which the host has waited."""

    again: bool = False
    counts: tuple[Counts, ...] | None = None  # if tokens travel as messages
    peer_counts: PeerCounts | None = None  # if ranks read each other's memory


@dataclass(frozen=True)
class LocalExperts:
    """All experts of a layer on this device."""

    gate_up_ECD: Tensor
    down_EDF: Tensor

    def prepare(self) -> None:
        """Everything is here."""

    def start(self, x_TD: Tensor, routing: Routing, recomputation: Recomputation | None = None) -> Collect:
        order = expert_order(routing.experts_TK, self.gate_up_ECD.shape[0], num_entries=routing.num_entries)
        again = recomputation is not None and recomputation.again
        return _known(expert_mlp(x_TD, order, routing.weights_TK, self.gate_up_ECD, self.down_EDF, again=again))

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return self.start(x_TD, routing)()


def _known(y_TD: Tensor) -> Collect:
    return lambda: y_TD


PREPARES = "a layer prepares"  # the first mark of a forward pass


@dataclass(frozen=True)
class ShardedExperts:
    """A layer's experts on all ranks, owned ones and copies. All ranks call it together; gradients go to the arena."""

    layer: int
    arena: ExpertArena
    calibrate: Callable[[int, Tensor], None] | None = None  # called with the gate's result: (layer, tokens per expert)
    degrees: Degrees = WHOLE  # numbers of chunks, if tokens travel as messages
    mark: Callable[[str], None] = unmarked  # of chunked_experts.Chunked
    slices: GradientSlices | None = None  # of dense gradients, which travel while the layer runs backward

    def prepare(self) -> None:
        """Sends copies. Everything computed until the experts' products, the dispatch included, hides their transfer."""
        if not (self.arena.walking_back and torch.is_grad_enabled()):  # what is computed again is in no timeline
            self.mark(PREPARES)
        self.arena.fetch(self.layer)
        if self.arena.attention is not None:
            self.arena.attention.start()

    def start(self, x_TD: Tensor, routing: Routing, recomputation: Recomputation | None = None) -> Collect:
        """Until results are on their way; what it returns collects them: y_TD (T, D).

        Args:
            recomputation: of a layer that is computed twice; what is collected the second time may be zeros.
        """
        hooks = self.arena.hooks
        collect = self._started(hooks.before_start(x_TD), routing, recomputation or Recomputation())
        return lambda: hooks.after_end(collect())

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return self.start(x_TD, routing)()

    def _started(self, x_TD: Tensor, routing: Routing, recomputation: Recomputation) -> Collect:
        if self.arena.attention is not None:
            self.arena.attention.stop()
        again = recomputation.again
        mark = unmarked if again else self.mark
        mark(ATTENTION)
        self.arena.fetch(self.layer)
        # Recomputed activations must go where they went before, and evaluation must not change the plans of training.
        if self.calibrate is not None and torch.is_grad_enabled() and not self.arena.walking_back:
            self.arena.materialised(self.layer)  # new copies may take the rows of those under way
            self.calibrate(self.layer, routing.counts_E)
        experts = self.arena.layers[self.layer]
        num_experts = experts.index_E.shape[0]
        if self.arena.world.size == 1:
            order = expert_order(routing.experts_TK, num_experts, num_entries=routing.num_entries)
            return _known(self._alone(x_TD, order, routing.weights_TK, experts, again))
        if self.arena.alone(self.layer):
            here_TK = experts.index_E[routing.experts_TK]
            if routing.num_entries is not None:
                here_TK = here_TK.where(routing.experts_TK >= 0, -1)
            order = expert_order(here_TK, num_experts, num_entries=routing.num_entries)
            return _known(self._alone(x_TD, order, routing.weights_TK, experts, again))
        split = expert_order(routing.experts_TK, num_experts, num_entries=routing.num_entries) if experts.split else None
        rank_TK = destinations(routing.experts_TK, split, experts.ends_ED, experts.phase_E)
        here = experts.index_E, experts.slots_E.shape[0]
        weights_TK = routing.weights_TK.float()
        gate_up_SCD, down_SDF = self.arena.rows
        slots = ArenaExperts(gate_up_SCD, down_SDF, experts.slots_E)
        first_rows, tokens = partial(self._slice, UNDER_LAYER), self.arena.transport.tokens
        if isinstance(tokens, PeerTokens):
            known = recomputation.peer_counts
            x_RD, way = tokens.dispatch(x_TD, weights_TK, routing.experts_TK, rank_TK, *here, known)
            recomputation.peer_counts = way.counts
            sums = partial(self.arena.sums, self.layer)
            whole = InPlace(way, slots, partial(self._ready, mark=mark), self._return_gradients, sums, first_rows, again)
            collect = _known(experts_in_place(x_TD, weights_TK, x_RD, whole))
        else:
            told = weights_TK.detach(), routing.experts_TK, rank_TK
            sent = exchange(tokens, *told, *here, self.degrees, recomputation.counts)
            recomputation.counts = sent.counts
            ready, gradients = partial(self._ready, mark=mark), self._return_gradients
            run = Chunked(sent, slots, ready, gradients, first_rows, mark, self.degrees.in_sequence, again)
            collect = chunked_experts(x_TD, weights_TK, run)
        self.arena.release(self.layer)
        return collect

    def _alone(self, x_TD: Tensor, order: ExpertOrder, weights_TK: Tensor, experts: LayerExperts, again: bool) -> Tensor:
        """All experts are here, owned or copies, and no token travels."""
        self.arena.materialised(self.layer)
        gate_up_SCD, down_SDF = self.arena.rows
        return expert_mlp(
            x_TD,
            order,
            weights_TK,
            gate_up_SCD,
            down_SDF,
            slots_E=experts.slots_E,
            gradients=self._all_gradients,
            sums=partial(self.arena.sums, self.layer),
            again=again,
        )

    def _ready(self, direction: Direction, mark: Callable[[str], None]) -> None:
        """Tokens have been sent; waits until the copies are there."""
        self.arena.materialised(self.layer)
        mark(COPIES)

    def _slice(self, which: int) -> None:
        if self.slices is not None:
            self.slices.set_out(place_of(self.layer, self.arena.shape.layers, which))

    def _all_gradients(self, gate_up_ECD: Tensor, down_EDF: Tensor) -> None:
        """Here no rows travel in the backward pass, so slices delay nothing."""
        self._slice(UNDER_LAYER)
        self._return_gradients(gate_up_ECD, down_EDF)

    def _return_gradients(self, gate_up_ECD: Tensor, down_EDF: Tensor) -> None:
        """Backward no longer needs the copies. Copies of the previous layer travel during the attention's backward pass
        (Hecate, section 3.2)."""
        self.arena.return_gradients(self.layer, (gate_up_ECD, down_EDF))
        if self.arena.rematerialise:
            self.arena.exchange_for_previous(self.layer)
        self._slice(UNDER_DENSE)
