"""Tokens to the ranks that hold their experts, and the experts' results back, as messages: in chunks, over one level or two.

A token goes to a rank once, whatever its K: with the choices that the rank will serve, and with their combine weights, so that
its results are summed there and return as one row (the deduplication of DeepSeek-V3, arXiv 2412.19437, section 3.2.2, here by
rank). A way of degree r takes the rows in r messages to each rank, each of an r-th of every rank's tokens, so that some travel
while others are computed (FSMoE, arXiv 2501.10714, section 4). All ranks call everything here together, in the same order.

Over two levels (two_level_exchange.py) a way has a leg between nodes and one inside them: who takes a row on the first passes
it on to the ranks that serve its choices, and sums their results before one row goes back.

Rows that arrive are worked on in an order that no degree changes: by how far their token stands among those of its rank, then
by the member of the level that sent them, then by the order in which that one had them. The rows of a chunk are adjacent in it
at any degree, and sums over rows run in it.

Letters: T tokens of this rank, or rows that it passes on, K top-k, S rows sent, R rows received, C chunks, P rows of one,
D model, E experts, W members of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.expert_order import ExpertOrder, expert_order, parts_of
from kernels.rows import combine_rows, spread_rows
from parallel.all_to_all import AllToAll
from parallel.hooks import Change, Hooks, unchanged
from parallel.placement import Floats
from parallel.schedule.pipeline import Degrees
from parallel.topology import World

FINEST = 720_720  # parts that a rank's tokens are thought to be cut into: every degree up to 16 divides it


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
class Level:
    """Ranks among which rows travel in one leg. Each member stands for `each` consecutive ranks, for which it takes rows."""

    world: World
    group: dist.ProcessGroup | None  # None: all ranks
    size: int
    each: int
    hooks: Hooks  # what rows travel as

    def member_of(self, rank_TK: Tensor) -> Tensor:
        """Which member takes a choice that a rank serves; int64, -1 stays."""
        if self.group is None:
            return rank_TK.long()
        if self.each > 1:
            return rank_TK.long() // self.each
        return torch.where(rank_TK >= 0, rank_TK.long() % self.size, -1)


Levels = tuple[Level, ...]  # in the order in which a row passes them


def one_level(world: World, hooks: Hooks) -> Levels:
    """Straight to the ranks."""
    return (Level(world, None, world.size, 1, hooks),)


@dataclass(frozen=True)
class Splits:
    """Rows from this rank to each member, and from each to this one."""

    send_W: list[int]
    receive_W: list[int]


class InFlight:
    """Rows under way to this rank; `arrived` gives what they are when they are there."""

    def __init__(self, level: Level, sent: Tensor, splits: Splits, *, back: bool = False, arrived: Change = unchanged) -> None:
        self._world, self._arrived = level.world, arrived
        self._rows: Tensor | None = None
        send_W, receive_W = (splits.receive_W, splits.send_W) if back else (splits.send_W, splits.receive_W)
        self._sent = sent.contiguous()  # alive until it is through
        self._received = sent.new_empty(sum(receive_W), *sent.shape[1:])
        self._under_way = AllToAll(self._received, self._sent, receive_W, send_W, level.group)

    def wait(self) -> Tensor:
        """The rows. On a GPU the host does not wait, only what it starts from here on; this wait alone counts as exposed."""
        with self._world.exposed:
            self._under_way.wait()
        if self._rows is None:
            self._rows = self._arrived(self._received)
        return self._rows


@dataclass(frozen=True)
class Leg:
    """Rows over one level and results back, in chunks."""

    level: Level
    rows: list[int]  # C + 1; chunk i has the rows that are sent from the i-th number to before the next
    place_TK: Tensor  # int32: the row, in its chunk's message, of a choice that is its row's first for that member; else -1
    splits: list[Splits]  # of each chunk

    def of_chunk(self, chunk: int) -> slice:
        """Among the rows that are sent."""
        return slice(self.rows[chunk], self.rows[chunk + 1])

    def pack(self, x_PD: Tensor, chunk: int) -> Tensor:
        """The message of a chunk's rows, in its order."""
        place_N, top_k = self._places(chunk)
        rows_SD = x_PD.new_empty(sum(self.splits[chunk].send_W), x_PD.shape[1])
        spread_rows(x_PD, place_N, top_k, rows_SD)
        return rows_SD

    def send(self, rows_SD: Tensor, chunk: int) -> InFlight:
        hooks = self.level.hooks
        return InFlight(self.level, hooks.before_dispatch(rows_SD), self.splits[chunk], arrived=hooks.after_dispatch)

    def give_back(self, y_PD: Tensor, chunk: int) -> InFlight:
        """Results of the rows of a chunk, in the order in which they arrived."""
        hooks = self.level.hooks
        return InFlight(self.level, hooks.before_combine(y_PD), self.splits[chunk], back=True, arrived=hooks.after_combine)

    def collect(self, rows_SD: Tensor, chunk: int) -> Tensor:
        """Results of the rows that are sent; those of several members are added in float32."""
        return combine_rows(rows_SD, *self._places(chunk))

    def _places(self, chunk: int) -> tuple[Tensor, int]:
        return self.place_TK[self.of_chunk(chunk)].flatten(), self.place_TK.shape[1]


@dataclass(frozen=True)
class Way:
    """Rows to their ranks and results back, leg by leg."""

    legs: tuple[Leg, ...]
    row_R: Tensor  # int64: rows as they arrive, chunk by chunk; where each stands in the order in which they are worked on

    def __len__(self) -> int:
        return len(self.legs[0].splits)

    def arrived(self, chunk: int) -> slice:
        """The rows of a chunk among those that arrive."""
        received = [sum(splits.receive_W) for splits in self.legs[-1].splits]
        before = sum(received[:chunk])
        return slice(before, before + received[chunk])

    def there(self, x_TD: Tensor) -> Tensor:
        """All rows of a way in one chunk, one leg after the other: (T, D) -> (R, D)."""
        for leg in self.legs:
            x_TD = leg.send(leg.pack(x_TD, 0), 0).wait()
        return x_TD

    def back(self, y_RD: Tensor) -> Tensor:
        """And their results: (R, D) -> (T, D)."""
        for leg in reversed(self.legs):
            y_RD = leg.collect(leg.give_back(y_RD, 0).wait(), 0)
        return y_RD


@dataclass(frozen=True)
class Hop:
    """What does not depend on the chunks of a leg: numbers of all rows at once go back by it."""

    level: Level
    splits: Splits
    row_TK: Tensor  # int64: the sent row that carries a choice; the number of rows sent, of one that is absent
    source_R: Tensor  # int64: rows in the order in which they are worked on; where each stands by sender and order there

    def give_back(self, numbers_RK: Tensor) -> InFlight:
        """A number of each choice, in the order in which rows are worked on."""
        sorted_RK = torch.empty_like(numbers_RK)
        sorted_RK[self.source_R] = numbers_RK
        return InFlight(self.level, sorted_RK, self.splits, back=True)

    def collect(self, back: InFlight) -> Tensor:
        """(T, K); 0 of absent choices."""
        numbers_SK = back.wait()
        numbers_SK = torch.cat([numbers_SK, numbers_SK.new_zeros(1, numbers_SK.shape[1])])  # what an absent choice finds
        return numbers_SK.gather(0, self.row_TK)


@dataclass(frozen=True)
class Exchange:
    """Which row goes where, and what of it is served here."""

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
    cell_T: Tensor  # ascending: in which of the finest parts of its rank's tokens a row's token lies


def exchange(
    levels: Levels,
    weights_TK: Tensor,
    experts_TK: Tensor,
    rank_TK: Tensor,
    index_E: Tensor,
    num_here: int,
    degrees: Degrees,
) -> Exchange:
    """Tells every rank which choices it will serve: on each level in a message of a few numbers to each member, in which lies
    a wait for the device, and in one of the choices.

    Args:
        weights_TK: float32.
        rank_TK: int32; who serves each choice (kernels/destinations.py), -1 of one that is absent.
        index_E: int32; which of the `num_here` experts on this rank an expert is.
    """
    tokens, chunks = rank_TK.shape[0], tuple(dict.fromkeys((degrees.forward, degrees.backward)))
    cell_T = torch.arange(tokens, device=rank_TK.device) * FINEST // max(tokens, 1)
    rows, entries = _Rows(experts_TK, rank_TK, weights_TK, cell_T), 0
    hops: list[Hop] = []
    legs: dict[int, list[Leg]] = {degree: [] for degree in chunks}
    arrivals: dict[int, _Arrivals] = {}
    for level in levels:
        rows, hop, cuts, entries = _hop(level, rows, chunks)
        hops.append(hop)
        for degree, cut in zip(chunks, cuts, strict=True):
            legs[degree].append(_leg(level, cut, arrivals.get(degree), tokens))
            arrivals[degree] = _Arrivals(_as_they_arrive(rows.cell_T, hop.source_R, degree), cut.splits)
    slots_RK = torch.where(rows.experts_TK >= 0, index_E[rows.experts_TK.long()], -1)
    order = expert_order(slots_RK, num_here, num_entries=entries)
    ways = {degree: Way(tuple(legs[degree]), arrivals[degree].row_R) for degree in chunks}
    parts = {degree: parts_of(order, slots_RK, rows.cell_T // (FINEST // degree), degree) for degree in chunks}
    return Exchange(
        forward=ways[degrees.forward],
        backward=ways[degrees.backward],
        hops=tuple(hops),
        order=order,
        forward_parts=parts[degrees.forward],
        backward_parts=parts[degrees.backward],
        weights_RK=rows.weights_TK,
    )


@dataclass(frozen=True)
class _Cut:
    """The rows of a hop in chunks."""

    place_TK: Tensor  # as of a Leg, for rows in the order in which they are worked on
    splits: list[Splits]


@dataclass(frozen=True)
class _Arrivals:
    """What came over a leg."""

    row_R: Tensor  # as of a Way
    splits: list[Splits]


def _leg(level: Level, cut: _Cut, came: _Arrivals | None, tokens: int) -> Leg:
    """Rows are sent as they came over the leg before; from the first one this rank's tokens do."""
    if came is None:
        degree = len(cut.splits)
        return Leg(level, [-(-chunk * tokens // degree) for chunk in range(degree + 1)], cut.place_TK, cut.splits)
    received = (sum(splits.receive_W) for splits in came.splits)
    return Leg(level, [0, *accumulate(received)], cut.place_TK[came.row_R], cut.splits)


def _hop(level: Level, rows: _Rows, degrees: Sequence[int]) -> tuple[_Rows, Hop, list[_Cut], int]:
    """(the rows after it, what of it no degree changes, and what each does; choices that come with the rows)."""
    target_TK, top_k = level.member_of(rows.rank_TK), rows.rank_TK.shape[1]
    same_TKK = target_TK.unsqueeze(2) == target_TK.unsqueeze(1)
    first_TK = same_TKK.int().argmax(dim=2)  # the first choice with the same target
    leaders_TK = torch.where(first_TK == torch.arange(top_k, device=target_TK.device), target_TK, -1)  # absent ones stay -1
    rows_WC, splits, entries = _tell_counts(level, leaders_TK, target_TK, rows.cell_T, degrees)
    whole = Splits(
        [sum(counts) for counts in zip(*(one.send_W for one in splits[0]), strict=True)],
        [sum(counts) for counts in zip(*(one.receive_W for one in splits[0]), strict=True)],
    )
    sent = expert_order(leaders_TK, level.size, num_entries=sum(whole.send_W))  # by member, then in the order of the rows
    place_TK, entry_S = sent.place_N.view(target_TK.shape), sent.entry_N.long()
    behind, source_R = _tell(level, rows, target_TK, entry_S, whole)
    row_TK = place_TK.long().gather(1, first_TK)
    hop = Hop(level, whole, torch.where(row_TK >= 0, row_TK, len(entry_S)), source_R)
    cuts = [
        _Cut(_places_in_chunks(leaders_TK, place_TK, rows.cell_T, counts_WC), split)
        for counts_WC, split in zip(rows_WC, splits, strict=True)
    ]
    return behind, hop, cuts, entries


def _tell(level: Level, rows: _Rows, target_TK: Tensor, entry_S: Tensor, splits: Splits) -> tuple[_Rows, Tensor]:
    """(rows after a hop, where each of them stands by sender and order there). `entry_S`: for which choice a row is sent."""
    top_k = target_TK.shape[1]
    row_S = entry_S // max(top_k, 1)
    here_SK = target_TK[row_S] == target_TK.flatten()[entry_S].unsqueeze(1)
    # A member that stands for itself alone need not be told for whom a choice is.
    chosen = (rows.experts_TK, rows.rank_TK) if level.each > 1 else (rows.experts_TK,)
    chosen_S = [torch.where(here_SK, part[row_S].int(), -1) for part in chosen]
    told_S = torch.cat([*chosen_S, rows.weights_TK[row_S].view(torch.int32), rows.cell_T[row_S, None].int()], dim=1)
    heard_R = InFlight(level, told_S, splits).wait()
    cell_R, source_R = heard_R[:, -1].sort(stable=True)  # the order in which rows are worked on
    experts_RK, *rank_RK, bits_RK = heard_R[source_R, :-1].split(top_k, dim=1)
    here_RK = rank_RK[0] if rank_RK else torch.where(experts_RK >= 0, level.world.rank, -1)
    return _Rows(experts_RK, here_RK, bits_RK.contiguous().view(torch.float32), cell_R), source_R


def _tell_counts(
    level: Level, leaders_TK: Tensor, target_TK: Tensor, cell_T: Tensor, degrees: Sequence[int]
) -> tuple[list[Tensor], list[list[Splits]], int]:
    """(rows from here to each member in each chunk, (W, C), and what is sent and received of each chunk: each for these
    degrees; choices that come here)."""
    members = level.size
    rows_WC = []
    for degree in degrees:
        chunk_TK = (cell_T // (FINEST // degree)).unsqueeze(1).expand_as(leaders_TK)
        box_N = torch.where(leaders_TK >= 0, leaders_TK * degree + chunk_TK, members * degree).flatten()
        rows_WC.append(_count(box_N, members * degree).view(members, degree))
    served_W = _count(torch.where(target_TK >= 0, target_TK, members).flatten(), members)
    told = torch.cat([*rows_WC, served_W.unsqueeze(1)], dim=1)
    heard = torch.empty_like(told)
    with level.world.exposed:
        AllToAll(heard, told, [1] * members, [1] * members, level.group).wait()
    sent, received = torch.stack([told.t(), heard.t()]).tolist()
    every = [Splits(*pair) for pair in zip(sent, received, strict=True)]
    ends = [0, *accumulate(degrees)]
    return rows_WC, [every[start:end] for start, end in pairwise(ends)], sum(received[-1])


def _count(box_N: Tensor, boxes: int) -> Tensor:
    """How many there are in each box; int64. Those in the box after the last count nowhere."""
    counts = torch.zeros(boxes + 1, dtype=torch.int64, device=box_N.device)
    return counts.scatter_add_(0, box_N, torch.ones_like(box_N))[:-1]


def _places_in_chunks(leaders_TK: Tensor, place_TK: Tensor, cell_T: Tensor, rows_WC: Tensor) -> Tensor:
    """`place_TK`, which counts rows by member and order, from the start of each chunk's message on. int32."""
    degree = rows_WC.shape[1]
    if degree == 1:
        return place_TK
    start_WC = (rows_WC.flatten().cumsum(0) - rows_WC.flatten()).view(rows_WC.shape)  # by member, then by chunk
    shift_WC = rows_WC.cumsum(0) - rows_WC - start_WC
    chunk_T1 = (cell_T // (FINEST // degree)).unsqueeze(1)
    return torch.where(leaders_TK >= 0, place_TK + shift_WC[leaders_TK.clamp(min=0), chunk_T1], -1).int()


def _as_they_arrive(cell_R: Tensor, source_R: Tensor, degree: int) -> Tensor:
    """`row_R` of a way. `cell_R` and `source_R`: of rows in the order in which they are worked on."""
    rows = torch.arange(len(source_R), device=source_R.device)
    if degree == 1:
        return torch.empty_like(source_R).scatter_(0, source_R, rows)
    chunk_R = cell_R // (FINEST // degree)
    return (chunk_R * len(chunk_R) + source_R).argsort()  # chunk by chunk, by sender and order there
