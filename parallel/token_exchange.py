"""Tokens to the ranks that hold their experts, and their results back, as messages: every rank is told what it will serve.

A token goes to a rank once, whatever its K: with the choices that the rank will serve, and with their combine weights, so that
its results are summed there and return as one row (the deduplication of DeepSeek-V3, arXiv 2412.19437, section 3.2.2, here by
rank). A way of degree r takes the rows in r messages to each rank, each of an r-th of every rank's tokens, so that some travel
while others are computed (FSMoE, arXiv 2501.10714, section 4); rows that stay at their rank may be apart from these (cuts.py).
All ranks call everything here together, in the same order.

Over two levels (two_level_exchange.py) a way has a leg between nodes and one inside them: who takes a row on the first passes
it on to the ranks that serve its choices, and sums their results before one row goes back.

Rows that arrive are worked on in an order that no degree changes: by their cell (cuts.py), then by the member of the level
that sent them, then by the order in which that one had them. The rows of a chunk are adjacent in it at any degree, and sums
over rows run in it.

Letters: T tokens of this rank, or rows that it passes on, K top-k, S rows sent, R rows received, C chunks, P rows of one,
D model, E experts, W members of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from kernels.expert_order import ExpertOrder, expert_order, parts_of
from parallel.all_to_all import AllToAll
from parallel.cuts import FINEST, Cut, backward_cut, forward_cut, stay_apart
from parallel.placement import Floats
from parallel.schedule.pipeline import Degrees
from parallel.ways import Apart, Hop, InFlight, Leg, Level, Levels, Splits, Way


def boundaries(shares_ED: Floats, rank: int) -> tuple[Floats, Floats]:
    """For kernels/destinations.py: where each device's part of an expert's entries ends, and where this rank starts to count.

    Args:
        shares_ED: the shares of this rank's entries of each expert that go to each device; rows sum to one.

    Returns:
        (E * D,) ascending: e + the sum of shares up to a device; (E,) in [0, 1): a phase that differs between ranks and
        experts, so that single entries, which have no parts, do not all go to the same copy.
    """
    experts = shares_ED.shape[0]
    ends_ED: Floats = shares_ED.cumsum(axis=1)
    ends_ED /= ends_ED[:, -1:].copy()  # the last share ends at exactly 1
    golden = 0.6180339887498949  # its multiples spread evenly over [0, 1) (Weyl)
    phase_E = np.asarray(((rank + 1) * golden + np.arange(experts) * golden * golden) % 1.0, dtype=np.float64)
    flat: Floats = (np.arange(experts)[:, None] + ends_ED).ravel()
    return flat, phase_E


@dataclass(frozen=True)
class Counts:
    """Of a hop: how many rows go where. They take a wait for the device, of which an exchange that is repeated needs none."""

    rows_WC: list[Tensor]  # this and the next of each cut: rows from here to each member in each chunk
    splits: list[list[Splits]]  # what is sent and received of each chunk
    entries: int  # choices that come here


@dataclass(frozen=True)
class Exchange:
    """Which row goes where, and what of it is served here."""

    counts: tuple[Counts, ...]  # of each hop
    forward: Way
    backward: Way
    hops: tuple[Hop, ...]
    order: ExpertOrder  # of the choices served here, by their place among this rank's experts
    forward_parts: list[ExpertOrder]  # of each chunk
    backward_parts: list[ExpertOrder]
    weights_RK: Tensor  # float32; combine weights of the choices served here, elsewhere anything

    def places(self, way: Way) -> Tensor:
        """(R, K) int32: of choices among the entries in `order`, row by row as they arrive."""
        return self.order.place_N.view(-1, self.weights_RK.shape[1])[way.row_R]

    def return_weights(self, d_weights_RK: Tensor) -> InFlight:
        """Gradients of combine weights, row by row as they arrive in the backward pass, are sent on the last leg back."""
        worked_RK = torch.empty_like(d_weights_RK)
        worked_RK[self.backward.row_R] = d_weights_RK
        return self.hops[-1].give_back(worked_RK)

    def pass_weights_on(self, back: InFlight) -> InFlight:
        """And on the first."""
        for behind, before in zip(self.hops[:0:-1], self.hops[-2::-1], strict=True):
            back = before.give_back(behind.collect(back))
        return back

    def collect_weights(self, back: InFlight) -> Tensor:
        """(T, K)."""
        return self.hops[0].collect(back)


@dataclass(frozen=True)
class _Rows:
    """Rows somewhere on their ways, in the order in which they are worked on."""

    experts_TK: Tensor
    rank_TK: Tensor  # who serves each choice, -1 of one that is not this row's to carry
    weights_TK: Tensor  # float32
    cell_T: Tensor  # ascending (cuts.py)


def exchange(
    levels: Levels,
    weights_TK: Tensor,
    experts_TK: Tensor,
    rank_TK: Tensor,
    index_E: Tensor,
    num_here: int,
    degrees: Degrees,
    known: tuple[Counts, ...] | None = None,
) -> Exchange:
    """Tells every rank which choices it will serve: on each level in a message of a few numbers to each member, in which lies
    a wait for the device, and in one of the choices.

    Args:
        weights_TK: float32.
        rank_TK: int32; who serves each choice (kernels/destinations.py), -1 of one that is absent.
        index_E: int32; which of the `num_here` experts on this rank an expert is.
        known: of an exchange that is repeated; then nobody waits, on any rank.
    """
    tokens, apart = rank_TK.shape[0], stay_apart(levels[0].size, two_level=len(levels) > 1)
    forward, backward = forward_cut(degrees.forward, apart=apart), backward_cut(degrees.backward, apart=apart)
    cuts = tuple(dict.fromkeys((forward, backward)))
    cell_T = torch.arange(tokens, device=rank_TK.device) * FINEST // max(tokens, 1)
    rows = _Rows(experts_TK, rank_TK, weights_TK, cell_T)
    hops: list[Hop] = []
    counts: list[Counts] = []
    legs: dict[Cut, list[Leg]] = {cut: [] for cut in cuts}
    arrivals: dict[Cut, _Arrivals] = {}
    for number, level in enumerate(levels):
        rows, hop, chunked, counted = _hop(level, rows, cuts, apart, None if known is None else known[number])
        hops.append(hop)
        counts.append(counted)
        for cut, chunks in zip(cuts, chunked, strict=True):
            legs[cut].append(_leg(level, cut, chunks, arrivals.get(cut), tokens))
            arrivals[cut] = _Arrivals(_as_they_arrive(rows.cell_T, hop.source_R, cut), chunks.splits)
    slots_RK = torch.where(rows.experts_TK >= 0, index_E[rows.experts_TK.long()], -1)
    order = expert_order(slots_RK, num_here, num_entries=counts[-1].entries)
    ways = {cut: Way(tuple(legs[cut]), arrivals[cut].row_R) for cut in cuts}
    parts = {cut: parts_of(order, slots_RK, cut.chunk_of(rows.cell_T), len(cut)) for cut in cuts}
    return Exchange(
        counts=tuple(counts),
        forward=ways[forward],
        backward=ways[backward],
        hops=tuple(hops),
        order=order,
        forward_parts=parts[forward],
        backward_parts=parts[backward],
        weights_RK=rows.weights_TK,
    )


@dataclass(frozen=True)
class _Chunks:
    """The rows of a hop in chunks."""

    place_TK: Tensor  # this and the next as of a Leg, for rows in the order in which they are worked on
    apart: Apart | None
    splits: list[Splits]


@dataclass(frozen=True)
class _Arrivals:
    """What came over a leg."""

    row_R: Tensor  # as of a Way
    splits: list[Splits]


def _leg(level: Level, cut: Cut, chunks: _Chunks, came: _Arrivals | None, tokens: int) -> Leg:
    """Rows are sent as they came over the leg before; from the first one this rank's tokens do."""
    if came is None:
        rows = [cut.tokens_of(chunk, tokens) for chunk in range(len(cut))]
        return Leg(level, cut, rows, chunks.place_TK, chunks.apart, chunks.splits)
    ends = [0, *accumulate(sum(splits.receive_W) for splits in came.splits)]
    return Leg(level, cut, [slice(*pair) for pair in pairwise(ends)], chunks.place_TK[came.row_R], None, chunks.splits)


def _hop(
    level: Level, rows: _Rows, cuts: Sequence[Cut], apart: bool, known: Counts | None
) -> tuple[_Rows, Hop, list[_Chunks], Counts]:
    """(the rows after it, what of it no cut changes, and what each does). `apart`: rows that stay."""
    target_TK, top_k = level.member_of(rows.rank_TK), rows.rank_TK.shape[1]
    same_TKK = target_TK.unsqueeze(2) == target_TK.unsqueeze(1)
    first_TK = same_TKK.int().argmax(dim=2)  # the first choice with the same target
    leaders_TK = torch.where(first_TK == torch.arange(top_k, device=target_TK.device), target_TK, -1)  # absent ones stay -1
    cell_TK = rows.cell_T.unsqueeze(1) + FINEST * (apart * (leaders_TK != level.here).long())
    chunk_TK = [cut.chunk_of(cell_TK) for cut in cuts]
    counts = known or _tell_counts(level, leaders_TK, target_TK, chunk_TK, cuts)
    whole = Splits(
        [sum(rows) for rows in zip(*(one.send_W for one in counts.splits[0]), strict=True)],
        [sum(rows) for rows in zip(*(one.receive_W for one in counts.splits[0]), strict=True)],
    )
    sent = expert_order(leaders_TK, level.size, num_entries=sum(whole.send_W))  # by member, then in the order of the rows
    place_TK, entry_S = sent.place_N.view(target_TK.shape), sent.entry_N.long()
    behind, source_R = _tell(level, rows, target_TK, cell_TK, entry_S, whole)
    row_TK = place_TK.long().gather(1, first_TK)
    hop = Hop(level, whole, torch.where(row_TK >= 0, row_TK, len(entry_S)), source_R)
    chunked = []
    for cut, of_cut_TK, counts_WC, split in zip(cuts, chunk_TK, counts.rows_WC, counts.splits, strict=True):
        places_TK = _places_in_chunks(leaders_TK, place_TK, of_cut_TK, counts_WC)
        chunked.append(_Chunks(places_TK, _apart(places_TK, of_cut_TK, counts_WC) if cut.staying else None, split))
    return behind, hop, chunked, counts


def _apart(places_TK: Tensor, chunk_TK: Tensor, rows_WC: Tensor) -> Apart:
    rows_C = rows_WC.sum(dim=0)
    before_C = rows_C.cumsum(dim=0) - rows_C
    return Apart(chunk_TK, torch.where(places_TK >= 0, places_TK + before_C[chunk_TK], -1).int())


def _tell(
    level: Level, rows: _Rows, target_TK: Tensor, cell_TK: Tensor, entry_S: Tensor, splits: Splits
) -> tuple[_Rows, Tensor]:
    """(rows after a hop, where each of them stands by sender and order there). `entry_S`: for which choice a row is sent."""
    top_k = target_TK.shape[1]
    row_S = entry_S // max(top_k, 1)
    here_SK = target_TK[row_S] == target_TK.flatten()[entry_S].unsqueeze(1)
    # A member that stands for itself alone need not be told for whom a choice is.
    chosen = (rows.experts_TK, rows.rank_TK) if level.each > 1 else (rows.experts_TK,)
    chosen_S = [torch.where(here_SK, part[row_S].int(), -1) for part in chosen]
    cell_S1 = cell_TK.flatten()[entry_S].unsqueeze(1).int()
    told_S = torch.cat([*chosen_S, rows.weights_TK[row_S].view(torch.int32), cell_S1], dim=1)
    heard_R = InFlight(level, told_S, splits).wait()
    cell_R, source_R = heard_R[:, -1].sort(stable=True)  # the order in which rows are worked on
    experts_RK, *rank_RK, bits_RK = heard_R[source_R, :-1].split(top_k, dim=1)
    here_RK = rank_RK[0] if rank_RK else torch.where(experts_RK >= 0, level.world.rank, -1)
    return _Rows(experts_RK, here_RK, bits_RK.contiguous().view(torch.float32), cell_R), source_R


def _tell_counts(
    level: Level, leaders_TK: Tensor, target_TK: Tensor, chunk_TK: Sequence[Tensor], cuts: Sequence[Cut]
) -> Counts:
    """`chunk_TK`: of each cut."""
    members = level.size
    rows_WC = []
    for cut, of_cut_TK in zip(cuts, chunk_TK, strict=True):
        chunks = len(cut)
        box_N = torch.where(leaders_TK >= 0, leaders_TK * chunks + of_cut_TK, members * chunks).flatten()
        rows_WC.append(_count(box_N, members * chunks).view(members, chunks))
    served_W = _count(torch.where(target_TK >= 0, target_TK, members).flatten(), members)
    told = torch.cat([*rows_WC, served_W.unsqueeze(1)], dim=1)
    heard = torch.empty_like(told)
    with level.world.exposed:
        AllToAll(heard, told, [1] * members, [1] * members, level.group).wait()
    sent, received = torch.stack([told.t(), heard.t()]).tolist()
    every = [Splits(*pair) for pair in zip(sent, received, strict=True)]
    ends = [0, *accumulate(len(cut) for cut in cuts)]
    return Counts(rows_WC, [every[start:end] for start, end in pairwise(ends)], sum(received[-1]))


def _count(box_N: Tensor, boxes: int) -> Tensor:
    """How many there are in each box; int64. Those in the box after the last count nowhere."""
    counts = torch.zeros(boxes + 1, dtype=torch.int64, device=box_N.device)
    return counts.scatter_add_(0, box_N, torch.ones_like(box_N))[:-1]


def _places_in_chunks(leaders_TK: Tensor, place_TK: Tensor, chunk_TK: Tensor, rows_WC: Tensor) -> Tensor:
    """`place_TK`, which counts rows by member and order, from the start of each chunk's message on. int32."""
    if rows_WC.shape[1] == 1:
        return place_TK
    start_WC = (rows_WC.flatten().cumsum(0) - rows_WC.flatten()).view(rows_WC.shape)  # by member, then by chunk
    shift_WC = rows_WC.cumsum(0) - rows_WC - start_WC
    return torch.where(leaders_TK >= 0, place_TK + shift_WC[leaders_TK.clamp(min=0), chunk_TK], -1).int()


def _as_they_arrive(cell_R: Tensor, source_R: Tensor, cut: Cut) -> Tensor:
    """`row_R` of a way. `cell_R` and `source_R`: of rows in the order in which they are worked on."""
    rows = torch.arange(len(source_R), device=source_R.device)
    if len(cut) == 1:
        return torch.empty_like(source_R).scatter_(0, source_R, rows)
    return (cut.chunk_of(cell_R.long()) * len(source_R) + source_R).argsort()  # chunk by chunk, by sender and order there
