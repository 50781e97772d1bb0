"""Tokens to the ranks that hold their experts, and the experts' results back, as messages and in chunks.

A token goes to a rank once, whatever its K: with the choices that the rank will serve, and with their combine weights, so that
its results are summed there and return as one row (the deduplication of DeepSeek-V3, arXiv 2412.19437, section 3.2.2, here by
rank). A way of degree r takes the rows in r messages to each rank, each of an r-th of every rank's tokens, so that some travel
while others are computed (FSMoE, arXiv 2501.10714, section 4). All ranks call everything here together, in the same order.

Rows that arrive are worked on in an order that no degree changes: by how far their token stands among those of its rank, then
by rank. The rows of a chunk are adjacent in it at any degree, and sums over rows run in it.

Letters: T tokens of this rank, K top-k, S rows sent, R rows received, C chunks, P rows of one, D model, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.expert_order import ExpertOrder, expert_order, parts_of
from kernels.rows import combine_rows, spread_rows
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
class Splits:
    """Rows from this rank to each, and from each to this one."""

    send_W: list[int]
    receive_W: list[int]


class InFlight:
    """Rows under way to this rank."""

    def __init__(self, world: World, sent: Tensor, splits: Splits, *, back: bool = False) -> None:
        self._world = world
        send_W, receive_W = (splits.receive_W, splits.send_W) if back else (splits.send_W, splits.receive_W)
        self._sent = sent.contiguous()  # alive until it is through
        self._received = sent.new_empty(sum(receive_W), *sent.shape[1:])
        self._work = dist.all_to_all_single(self._received, self._sent, receive_W, send_W, async_op=True)

    def wait(self) -> Tensor:
        """The rows. On a GPU the host does not wait, only what it starts from here on; this wait alone counts as exposed."""
        with self._world.exposed:
            self._work.wait()
        return self._received


@dataclass(frozen=True)
class Way:
    """Rows to their ranks and results back, in chunks."""

    world: World
    tokens: list[int]  # C + 1; chunk i has the tokens from the i-th number to before the next
    place_TK: Tensor  # int32: the row, in its chunk's message, of a choice that is its token's first for that rank; else -1
    splits: list[Splits]  # of each chunk
    source_R: Tensor  # int64: rows as they arrive, chunk by chunk; where each stands if all are sorted by rank and token
    row_R: Tensor  # int64: and in the order in which they are worked on

    def __len__(self) -> int:
        return len(self.splits)

    def arrived(self, chunk: int) -> slice:
        """The rows of a chunk among those that arrive."""
        before = sum(sum(splits.receive_W) for splits in self.splits[:chunk])
        return slice(before, before + sum(self.splits[chunk].receive_W))

    def pack(self, x_TD: Tensor, chunk: int) -> Tensor:
        """The rows of a chunk, in the order of its message."""
        place_N, top_k = self._places(chunk)
        rows_SD = x_TD.new_empty(sum(self.splits[chunk].send_W), x_TD.shape[1])
        spread_rows(x_TD[self.tokens[chunk] : self.tokens[chunk + 1]], place_N, top_k, rows_SD)
        return rows_SD

    def send(self, rows_SD: Tensor, chunk: int) -> InFlight:
        return InFlight(self.world, rows_SD, self.splits[chunk])

    def give_back(self, y_PD: Tensor, chunk: int) -> InFlight:
        """Results of the rows of a chunk, in the order in which they arrived."""
        return InFlight(self.world, y_PD, self.splits[chunk], back=True)

    def collect(self, rows_SD: Tensor, chunk: int) -> Tensor:
        """Results of a chunk's tokens; those of several ranks are added in float32."""
        return combine_rows(rows_SD, *self._places(chunk))

    def _places(self, chunk: int) -> tuple[Tensor, int]:
        return self.place_TK[self.tokens[chunk] : self.tokens[chunk + 1]].flatten(), self.place_TK.shape[1]


@dataclass(frozen=True)
class Exchange:
    """Which row goes where, and what of it is served here."""

    world: World
    forward: Way
    backward: Way
    order: ExpertOrder  # of the choices served here, by their place among this rank's experts
    forward_parts: list[ExpertOrder]  # of each chunk
    backward_parts: list[ExpertOrder]
    weights_RK: Tensor  # float32; combine weights of the choices served here, elsewhere anything
    splits: Splits  # of all chunks together
    row_TK: Tensor  # int64: the sent row that carries a choice; -1 of one that is absent
    here_SK: Tensor  # bool: which choices of its token the rank of a sent row serves

    def places(self, way: Way) -> Tensor:
        """(R, K) int32: of choices among the entries in `order`, row by row as they arrive."""
        return self.order.place_N.view(-1, self.weights_RK.shape[1])[way.row_R]

    def return_weights(self, d_weights_RK: Tensor) -> InFlight:
        """Gradients of combine weights, row by row as they arrive in the backward pass."""
        sorted_RK = torch.empty_like(d_weights_RK)
        sorted_RK[self.backward.source_R] = d_weights_RK
        return InFlight(self.world, sorted_RK, self.splits, back=True)

    def collect_weights(self, back: InFlight) -> Tensor:
        """(T, K)."""
        d_weights_SK = back.wait() * self.here_SK
        d_weights_SK = torch.cat([d_weights_SK, d_weights_SK.new_zeros(1, d_weights_SK.shape[1])])  # what a row of -1 finds
        columns_TK = torch.arange(self.row_TK.shape[1], device=d_weights_SK.device).expand_as(self.row_TK)
        return d_weights_SK[self.row_TK, columns_TK]


def exchange(
    world: World, weights_TK: Tensor, experts_TK: Tensor, rank_TK: Tensor, index_E: Tensor, num_here: int, degrees: Degrees
) -> Exchange:
    """Tells every rank which choices it will serve: in a message of a few numbers to each, in which lies a layer's one wait for
    the device, and in one of the choices.

    Args:
        weights_TK: float32.
        rank_TK: int32; who serves each choice (kernels/destinations.py), -1 of one that is absent.
        index_E: int32; which of the `num_here` experts on this rank an expert is.
    """
    (tokens, top_k), rank_TK = rank_TK.shape, rank_TK.long()
    same_TKK = rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)
    first_TK = same_TKK.int().argmax(dim=2)  # the first choice with the same rank
    leaders_TK = torch.where(first_TK == torch.arange(top_k, device=rank_TK.device), rank_TK, -1)  # absent ones stay -1
    cell_T = torch.arange(tokens, device=rank_TK.device) * FINEST // max(tokens, 1)
    rows_WC, splits, entries = _tell_counts(world, leaders_TK, rank_TK, cell_T, (degrees.forward, degrees.backward))
    whole = Splits(
        [sum(rows) for rows in zip(*(one.send_W for one in splits[0]), strict=True)],
        [sum(rows) for rows in zip(*(one.receive_W for one in splits[0]), strict=True)],
    )
    sent = expert_order(leaders_TK, world.size, num_entries=sum(whole.send_W))  # rows by rank, then by token
    token_S = sent.entry_N.long() // max(top_k, 1)
    here_SK = rank_TK[token_S] == rank_TK.flatten()[sent.entry_N.long()].unsqueeze(1)
    experts_SK = torch.where(here_SK, experts_TK[token_S].int(), -1)
    told_S = torch.cat([experts_SK, weights_TK[token_S].view(torch.int32), cell_T[token_S, None].int()], dim=1)
    experts_RK, bits_RK, cell_R1 = InFlight(world, told_S, whole).wait().split([top_k, top_k, 1], dim=1)

    cell_R, source_R = cell_R1.squeeze(1).sort(stable=True)  # the order in which rows are worked on
    slots_RK = torch.where(experts_RK >= 0, index_E[experts_RK.long()], -1)[source_R]
    order = expert_order(slots_RK, num_here, num_entries=entries)

    def way(degree: int, rows_WC: Tensor, split: list[Splits]) -> Way:
        tokens_C = [-(-chunk * tokens // degree) for chunk in range(degree + 1)]
        place_TK = _places_in_chunks(leaders_TK, sent.place_N.view(tokens, top_k), cell_T, rows_WC)
        return Way(world, tokens_C, place_TK, split, *_arrivals(cell_R, source_R, degree))

    return Exchange(
        world=world,
        forward=way(degrees.forward, rows_WC[0], splits[0]),
        backward=way(degrees.backward, rows_WC[1], splits[1]),
        order=order,
        forward_parts=parts_of(order, slots_RK, cell_R // (FINEST // degrees.forward), degrees.forward),
        backward_parts=parts_of(order, slots_RK, cell_R // (FINEST // degrees.backward), degrees.backward),
        weights_RK=bits_RK.contiguous().view(torch.float32)[source_R],
        splits=whole,
        row_TK=sent.place_N.view(tokens, top_k).long().gather(1, first_TK),
        here_SK=here_SK,
    )


def _tell_counts(
    world: World, leaders_TK: Tensor, rank_TK: Tensor, cell_T: Tensor, degrees: Sequence[int]
) -> tuple[list[Tensor], list[list[Splits]], int]:
    """(rows from here to each rank in each chunk, (W, C), and what is sent and received of each chunk: each for these degrees;
    choices that are served here)."""
    ranks = world.size
    rows_WC = []
    for degree in degrees:
        chunk_TK = (cell_T // (FINEST // degree)).unsqueeze(1).expand_as(leaders_TK)
        box_N = torch.where(leaders_TK >= 0, leaders_TK * degree + chunk_TK, ranks * degree).flatten()
        rows_WC.append(_count(box_N, ranks * degree).view(ranks, degree))
    served_W = _count(torch.where(rank_TK >= 0, rank_TK, ranks).flatten(), ranks)
    told = torch.cat([*rows_WC, served_W.unsqueeze(1)], dim=1)
    heard = torch.empty_like(told)
    with world.exposed:
        dist.all_to_all_single(heard, told)
    sent, received = torch.stack([told.t(), heard.t()]).tolist()
    every = [Splits(*pair) for pair in zip(sent, received, strict=True)]
    return rows_WC, [every[: degrees[0]], every[degrees[0] : -1]], sum(received[-1])


def _count(box_N: Tensor, boxes: int) -> Tensor:
    """How many there are in each box; int64. Those in the box behind the last count nowhere."""
    counts = torch.zeros(boxes + 1, dtype=torch.int64, device=box_N.device)
    return counts.scatter_add_(0, box_N, torch.ones_like(box_N))[:-1]


def _places_in_chunks(leaders_TK: Tensor, place_TK: Tensor, cell_T: Tensor, rows_WC: Tensor) -> Tensor:
    """`place_TK`, which counts rows by rank and token, from the start of each chunk's message on. int32."""
    degree = rows_WC.shape[1]
    start_WC = (rows_WC.flatten().cumsum(0) - rows_WC.flatten()).view(rows_WC.shape)  # by rank, then by chunk
    shift_WC = rows_WC.cumsum(0) - rows_WC - start_WC
    chunk_T1 = (cell_T // (FINEST // degree)).unsqueeze(1)
    return torch.where(leaders_TK >= 0, place_TK + shift_WC[leaders_TK.clamp(min=0), chunk_T1], -1).int()


def _arrivals(cell_R: Tensor, source_R: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """`source_R` and `row_R` of a way. `cell_R` and `source_R`: of rows in the order in which they are worked on."""
    chunk_R = cell_R // (FINEST // degree)
    _, row_R = (chunk_R * len(chunk_R) + source_R).sort()  # chunk by chunk, by rank and token
    return source_R[row_R], row_R
