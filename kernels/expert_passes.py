"""The forward and backward pass of kernels/expert_mlp.py through experts in an arena, for a caller who gets rows, and needs
results, one part of the rows at a time.

All parts write to matrices that hold the entries of all parts, in expert order. So the two passes may be divided differently,
and gradients of the weights are one sum over all entries. Results do not depend on the division, bit for bit.

Letters: P rows of a part, R of all, K top-k, N entries of all, D model, F expert hidden, C = 2F, E experts here, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.accumulate import Sum
from kernels.expert_mlp import Sums, check_hopper, swiglu
from kernels.expert_order import ExpertOrder
from kernels.limits import takes_kernels
from kernels.linear import product
from kernels.pullback import pullback
from kernels.rows import Room, Tokens, combine_rows, combine_rows_and_partials, of_entries, spread_rows


@dataclass(frozen=True)
class ArenaExperts:
    """Experts 0..E-1 in slots of an arena."""

    gate_up_SCD: Tensor
    down_SDF: Tensor
    slots_E: Tensor  # int32

    @property
    def hidden(self) -> int:
        return self.down_SDF.shape[2]

    def in_turn(self, order: ExpertOrder) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(places of its entries in this part, gate_up_CD, down_DF) of each expert."""
        for count, end, slot in zip(order.counts_E.tolist(), order.ends_E.tolist(), self.slots_E.tolist(), strict=False):
            yield slice(end - count, end), self.gate_up_SCD[slot], self.down_SDF[slot]


class ForwardPass:
    """`h` is what backward needs of it: pre-activations, (N, 2F), on a GPU behind room of its kernels."""

    def __init__(self, entries: int, experts: ArenaExperts, like: Tensor) -> None:
        """
        Args:
            like: of the dtype and width of the rows.
        """
        self._experts, self._entries, self._kernels = experts, entries, takes_kernels(like)
        if self._kernels:
            check_hopper(like, experts.gate_up_SCD, experts.down_SDF)
        self._h, self._a, self._rows = (
            Room.of(entries, width, like) for width in (2 * experts.hidden, experts.hidden, like.shape[1])
        )

    @property
    def h(self) -> Tensor:
        return self._h.allocation

    def rows(self, x_PD: Tensor, place_PK: Tensor, weights_PK: Tensor, order: ExpertOrder) -> Tensor:
        """y_PD of a part, as `expert_mlp` has it.

        Args:
            place_PK: int32; the place of each choice among all entries, -1 of an absent one.
            weights_PK: float32.
            order: of the part (kernels/expert_order.parts_of).
        """
        self.hidden_of_rows(x_PD, place_PK, order)
        self._down(order)
        return combine_rows(self._rows.rows, place_PK.flatten(), place_PK.shape[1], weights_TK=weights_PK)

    def hidden_of_rows(self, x_PD: Tensor, place_PK: Tensor, order: ExpertOrder) -> None:
        """The pre-activations of a part: all that backward needs, if the results are known."""
        if self._entries:
            spread_rows(x_PD, place_PK.flatten(), place_PK.shape[1], self._rows.rows)
            self._up(self._rows, order)

    def whole(self, x_RD: Tensor, weights_RK: Tensor, order: ExpertOrder, out_RD: Tensor) -> None:
        """Results of all rows at once, into `out_RD`."""
        self.hidden_of_whole(x_RD, weights_RK.shape[1], order)
        self._down(order)
        combine_rows(self._rows.rows, order.place_N, weights_RK.shape[1], weights_TK=weights_RK, out_TD=out_RD)

    def hidden_of_whole(self, x_RD: Tensor, top_k: int, order: ExpertOrder) -> None:
        """The pre-activations of all rows."""
        if self._entries:
            self._up(of_entries(x_RD, order, top_k, self._experts.hidden, self._rows), order)

    def _up(self, x: Room | Tokens, order: ExpertOrder) -> None:
        experts, h_NC = self._experts, self._h.rows
        if self._kernels:
            from kernels.hopper import rows

            rows.up(x.operand, experts.gate_up_SCD, experts.slots_E, order, (self.h, self._a.allocation))
            return
        assert isinstance(x, Room)
        for places, gate_up_CD, _ in experts.in_turn(order):
            h_NC[places] = product(x.rows[places], gate_up_CD, h_NC.dtype)

    def _down(self, order: ExpertOrder) -> None:
        """Results take the place of the tokens' rows, if those were copied."""
        experts, rows_ND, h_NC = self._experts, self._rows.rows, self._h.rows
        if not self._entries:
            return
        if self._kernels:
            from kernels.hopper import rows

            rows.down(self._a.rows, experts.down_SDF, experts.slots_E, order, self._rows.allocation)
            return
        here = list(experts.in_turn(order))
        activated = swiglu(_rows_at(h_NC, here))  # of all experts at once: many small operations take longer
        for (places, _, down_DF), a_NF in zip(here, _of_each(activated, here), strict=True):
            rows_ND[places] = product(a_NF, down_DF, h_NC.dtype)


class BackwardPass:
    """`rows` of all parts first, then `weights`, once. Or, if the gradients of all rows are given at once, `hidden`, `down`,
    `tokens` and `gate_up`, with which what one needs is gone before the next makes room for itself."""

    def __init__(
        self,
        order: ExpertOrder,
        h: Tensor,
        weights_RK: Tensor,
        experts: ArenaExperts,
        sums: Sums | None = None,
        dy_RD: Tensor | None = None,
    ) -> None:
        """
        Args:
            order: that of all rows.
            weights_RK: float32; of its entries.
            sums: of kernels/expert_mlp.py; the kernels add there what they find.
            dy_RD: of all rows; None where they come in parts.
        """
        self._order, self._h, self._weights_RK, self._experts = order, h, weights_RK, experts
        self._kernels, self._entries, self._width = takes_kernels(h), order.entry_N.shape[0], experts.gate_up_SCD.shape[2]
        self._d_h, self._weighted = (Room.of(self._entries, width, h) for width in (2 * experts.hidden, experts.hidden))
        if dy_RD is None:
            self._dy: Room | Tokens = Room.of(self._entries, self._width, h)
        else:
            self._dy = of_entries(dy_RD, order, weights_RK.shape[1], experts.hidden)
        self._d_x: Room | None = None
        self._sum_gate_up: Sum | None = None
        self._sum_down: Sum | None = None
        if sums is not None and self._kernels and self._entries:
            self._sum_gate_up, self._sum_down = sums() or (None, None)

    def rows(self, dy_PD: Tensor, place_PK: Tensor, order: ExpertOrder) -> tuple[Tensor, Tensor]:
        """(d_x_PD, d_weights_PK float32) of a part."""
        assert isinstance(self._dy, Room), "the gradients of all rows were given at once"
        if self._entries:
            spread_rows(dy_PD, place_PK.flatten(), place_PK.shape[1], self._dy.rows)
        return self.tokens(place_PK, self.hidden(order), order)

    def tokens(
        self, place_PK: Tensor, dots_PN: Tensor, order: ExpertOrder, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(d_x_PD, d_weights_PK float32) of a part from what `hidden` returned; into `out` if it is given."""
        self._d_x = self._d_x or Room.of(self._entries, self._width, self._h)
        experts, d_h_NC = self._experts, self._d_h.rows
        if self._kernels and self._entries:
            from kernels.hopper import rows

            rows.d_rows(d_h_NC, experts.gate_up_SCD, experts.slots_E, order, self._d_x.allocation)
        elif self._entries:
            for places, gate_up_CD, _ in experts.in_turn(order):
                self._d_x.rows[places] = product(d_h_NC[places], gate_up_CD.t(), d_h_NC.dtype)
        return combine_rows_and_partials(self._d_x.rows, place_PK.flatten(), place_PK.shape[1], dots_PN, out)

    def hidden(self, order: ExpertOrder) -> Tensor:
        """Gradients of the pre-activations of a part; returns the partial sums of its weights' gradients, by place."""
        experts = self._experts
        if not self._entries:
            return self._weights_RK.new_empty(1, 0)
        if self._kernels:
            from kernels.hopper import rows

            into = self._d_h.allocation, self._weighted.allocation
            weights_RK, slots_E = self._weights_RK, experts.slots_E
            _, _, dots_PN = rows.d_hidden(self._dy.operand, self._h, weights_RK, experts.down_SDF, slots_E, order, into)
            return dots_PN
        assert isinstance(self._dy, Room)
        dy_ND = self._dy.rows
        weights_N = self._weights_RK.flatten()[order.entry_N.long()].unsqueeze(1)
        dots_N = weights_N.new_zeros(self._entries, dtype=torch.promote_types(dy_ND.dtype, torch.float32))
        here = list(experts.in_turn(order))
        d_a = torch.cat([product(dy_ND[places], down_DF.t(), dots_N.dtype) for places, _, down_DF in here])
        weights = _rows_at(weights_N, here)
        with torch.enable_grad():
            h = _rows_at(self._h, here).requires_grad_()
            a = swiglu(h)
        (d_h,) = pullback(a, [h], (d_a * weights).to(a.dtype))
        a = a.detach()
        parts = (_of_each(rows, here) for rows in (d_h, a * weights, (d_a * a).sum(1)))
        for (places, _, _), *found in zip(here, *parts, strict=True):
            self._d_h.rows[places], self._weighted.rows[places], dots_N[places] = found
        return dots_N.unsqueeze(0)

    def weights(self, x_RD: Tensor, place_RK: Tensor) -> tuple[Tensor, Tensor]:
        """(d_gate_up_ECD, d_down_EDF) of all entries, once their rows are done; rows in any order, with their places."""
        d_down_EDF = self.down()
        return self.gate_up(x_RD, place_RK), d_down_EDF

    def down(self) -> Tensor:
        """d_down_EDF of all entries, once `hidden` is done with them; of experts after those that have sums."""
        d_down_EDF = self._weight_gradient(self._dy, self._weighted, self._experts.down_SDF, self._sum_down)
        del self._dy, self._weighted
        return d_down_EDF

    def gate_up(self, x_RD: Tensor, place_RK: Tensor | None = None) -> Tensor:
        """d_gate_up_ECD, likewise, once `tokens` is done too. Without places the rows are in the order of the weights'."""
        self._d_x = None
        top_k = self._weights_RK.shape[1]
        x: Room | Tokens
        if place_RK is None:
            x = of_entries(x_RD, self._order, top_k, self._experts.hidden)
        else:
            x = Room.of(self._entries, self._width, x_RD)
            if self._entries:
                spread_rows(x_RD, place_RK.flatten(), top_k, x.rows)
        return self._weight_gradient(self._d_h, x, self._experts.gate_up_SCD, self._sum_gate_up)

    def _weight_gradient(self, left: Room | Tokens, right: Room | Tokens, matrices_SAB: Tensor, sums: Sum | None) -> Tensor:
        order = self._order
        count = order.counts_E.shape[0]
        if not self._entries:
            return matrices_SAB.new_zeros(count, *matrices_SAB.shape[1:])
        if self._kernels:
            from kernels.hopper import columns

            return columns.d_weights(left.clippable, right.operand, count, None, order, sums)
        assert isinstance(left, Room) and isinstance(right, Room)
        d_EAB = matrices_SAB.new_empty(count, *matrices_SAB.shape[1:])
        for expert, (places, _, _) in enumerate(self._experts.in_turn(order)):
            torch.mm(left.rows[places].t(), right.rows[places], out=d_EAB[expert])
        return d_EAB


Here = Sequence[tuple[slice, Tensor, Tensor]]  # of ArenaExperts.in_turn


def _rows_at(matrix: Tensor, here: Here) -> Tensor:
    """The rows of all experts, one after the other; without a copy where they are adjacent."""
    places = [places for places, _, _ in here]
    if all(one.stop == other.start for one, other in pairwise(places)):
        return matrix[places[0].start : places[-1].stop]
    return torch.cat([matrix[one] for one in places])


def _of_each(rows: Tensor, here: Here) -> tuple[Tensor, ...]:
    return rows.split([places.stop - places.start for places, _, _ in here])
