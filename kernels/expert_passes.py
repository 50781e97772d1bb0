"""The two passes of kernels/expert_mlp.py through experts in an arena, part by part of the rows: for a caller who gets rows,
and needs results, a part at a time.

All parts write to matrices that hold the entries of all, in expert order, so passes may come in other parts than each other,
and gradients of the weights are one sum over all entries. No number depends, bit for bit, on how the rows come in parts.

Letters: P rows of a part, R of all, K top-k, N entries of all, D model, F expert hidden, C = 2F, E experts here, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.expert_mlp import check_hopper, swiglu
from kernels.expert_order import ExpertOrder
from kernels.limits import takes_kernels
from kernels.linear import product
from kernels.rows import combine_rows, combine_rows_and_partials, spread_rows


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
        """`like`: of the dtype and width of the rows."""
        self._experts, self._entries, self._kernels = experts, entries, takes_kernels(like)
        if self._kernels:
            check_hopper(like, experts.gate_up_SCD, experts.down_SDF)
        self.h, self._a, self._rows = (
            _room(entries, width, like) for width in (2 * experts.hidden, experts.hidden, like.shape[1])
        )

    def rows(self, x_PD: Tensor, place_PK: Tensor, weights_PK: Tensor, order: ExpertOrder) -> Tensor:
        """y_PD of a part, as `expert_mlp` has it.

        Args:
            place_PK: int32; the place of each choice among all entries, -1 of an absent one.
            weights_PK: float32.
            order: of the part (kernels/expert_order.parts_of).
        """
        if not self._entries:
            return torch.zeros_like(x_PD)
        top_k = place_PK.shape[1]
        rows_ND = _rows(self._rows, self._kernels)
        spread_rows(x_PD, place_PK.flatten(), top_k, rows_ND)
        self._products(rows_ND, order)
        return combine_rows(rows_ND, place_PK.flatten(), top_k, weights_TK=weights_PK)

    def _products(self, rows_ND: Tensor, order: ExpertOrder) -> None:
        """Results take the place of the tokens' rows."""
        experts = self._experts
        if self._kernels:
            from kernels.hopper import rows  # here, because CPU machines may lack Triton

            _, a_NF = rows.up(rows_ND, experts.gate_up_SCD, experts.slots_E, order, (self.h, self._a))
            rows.down(a_NF, experts.down_SDF, experts.slots_E, order, self._rows)
            return
        here = list(experts.in_turn(order))
        for places, gate_up_CD, _ in here:
            self.h[places] = product(rows_ND[places], gate_up_CD, self.h.dtype)
        activated = swiglu(_rows_at(self.h, here))  # of all experts at once: many small operations take longer
        for (places, _, down_DF), a_NF in zip(here, _of_each(activated, here), strict=True):
            rows_ND[places] = product(a_NF, down_DF, self.h.dtype)


class BackwardPass:
    """`rows` of all parts first, then `weights`, once."""

    def __init__(self, order: ExpertOrder, h: Tensor, weights_RK: Tensor, experts: ArenaExperts, like: Tensor) -> None:
        """`order` is that of all rows, `weights_RK` (float32) the weights of its entries."""
        self._order, self._h, self._weights_RK, self._experts = order, h, weights_RK, experts
        self._kernels, self._entries = takes_kernels(like), order.entry_N.shape[0]
        self._d_h, self._weighted, self._dy, self._d_x = (
            _room(self._entries, width, like) for width in (2 * experts.hidden, experts.hidden, like.shape[1], like.shape[1])
        )

    def rows(self, dy_PD: Tensor, place_PK: Tensor, order: ExpertOrder) -> tuple[Tensor, Tensor]:
        """(d_x_PD, d_weights_PK float32) of a part."""
        if not self._entries:
            return torch.zeros_like(dy_PD), torch.zeros(place_PK.shape, device=dy_PD.device)
        place_N, top_k = place_PK.flatten(), place_PK.shape[1]
        spread_rows(dy_PD, place_N, top_k, _rows(self._dy, self._kernels))
        dots_PN = self._products(order)
        return combine_rows_and_partials(_rows(self._d_x, self._kernels), place_N, top_k, dots_PN)

    def _products(self, order: ExpertOrder) -> Tensor:
        experts = self._experts
        if self._kernels:
            from kernels.hopper import ring, rows

            into = self._d_h, self._weighted
            dy_ND = _rows(self._dy, kernels=True)
            _, _, dots_PN = rows.d_hidden(dy_ND, self._h, self._weights_RK, experts.down_SDF, experts.slots_E, order, into)
            rows.d_rows(self._d_h[ring.HALF.value :], experts.gate_up_SCD, experts.slots_E, order, self._d_x)
            return dots_PN
        weights_N = self._weights_RK.flatten()[order.entry_N.long()].unsqueeze(1)
        dots_N = weights_N.new_zeros(self._entries, dtype=torch.promote_types(self._dy.dtype, torch.float32))
        here = list(experts.in_turn(order))
        d_a = torch.cat([product(self._dy[places], down_DF.t(), dots_N.dtype) for places, _, down_DF in here])
        weights = _rows_at(weights_N, here)
        with torch.enable_grad():
            h = _rows_at(self._h, here).requires_grad_()
            a = swiglu(h)
            (d_h,) = torch.autograd.grad(a, h, (d_a * weights).to(a.dtype))
        a = a.detach()
        parts = (_of_each(rows, here) for rows in (d_h, a * weights, (d_a * a).sum(1)))
        for (places, gate_up_CD, _), *found in zip(here, *parts, strict=True):
            self._d_h[places], self._weighted[places], dots_N[places] = found
            self._d_x[places] = product(found[0], gate_up_CD.t(), found[0].dtype)
        return dots_N.unsqueeze(0)

    def weights(self, x_RD: Tensor, place_RK: Tensor) -> tuple[Tensor, Tensor]:
        """(d_gate_up_ECD, d_down_EDF) of all entries, once their rows are done; rows in any order, with their places."""
        self._d_x = self._dy[:0]  # room for what follows
        experts, order = self._experts, self._order
        count = order.counts_E.shape[0]
        gate_up, down = (experts.gate_up_SCD, experts.down_SDF)
        if not self._entries:
            return gate_up.new_zeros(count, *gate_up.shape[1:]), down.new_zeros(count, *down.shape[1:])
        x_ND = x_RD.new_empty(self._entries, x_RD.shape[1])
        if self._kernels:
            from kernels.hopper import columns, ring

            d_down_EDF = columns.d_weights(self._dy, self._weighted[ring.HALF.value :], count, None, order)
            spread_rows(x_RD, place_RK.flatten(), place_RK.shape[1], x_ND)
            return columns.d_weights(self._d_h, x_ND, count, None, order), d_down_EDF
        spread_rows(x_RD, place_RK.flatten(), place_RK.shape[1], x_ND)
        d_gate_up_ECD, d_down_EDF = (part.new_empty(count, *part.shape[1:]) for part in (gate_up, down))
        for expert, (places, _, _) in enumerate(experts.in_turn(order)):
            torch.mm(self._d_h[places].t(), x_ND[places], out=d_gate_up_ECD[expert])
            torch.mm(self._dy[places].t(), self._weighted[places], out=d_down_EDF[expert])
        return d_gate_up_ECD, d_down_EDF


Here = Sequence[tuple[slice, Tensor, Tensor]]  # of ArenaExperts.in_turn


def _rows_at(matrix: Tensor, here: Here) -> Tensor:
    """The rows of all experts, one after the other; without a copy where they are adjacent."""
    places = [places for places, _, _ in here]
    if all(one.stop == other.start for one, other in pairwise(places)):
        return matrix[places[0].start : places[-1].stop]
    return torch.cat([matrix[one] for one in places])


def _of_each(rows: Tensor, here: Here) -> tuple[Tensor, ...]:
    return rows.split([places.stop - places.start for places, _, _ in here])


def _room(entries: int, width: int, like: Tensor) -> Tensor:
    """For rows of entries; with what the kernels need before them."""
    if takes_kernels(like):
        from kernels.hopper.ring import clippable

        return clippable(entries, width, like)[0]
    return like.new_empty(entries, width)


def _rows(room: Tensor, kernels: bool) -> Tensor:
    if kernels:
        from kernels.hopper.ring import HALF

        return room[HALF.value :]
    return room
