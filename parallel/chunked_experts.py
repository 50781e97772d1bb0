"""One MoE layer of a rank whose tokens travel as messages: dispatch, experts and combine of each chunk while others travel.

Source: FSMoE, arXiv 2501.10714, section 4: all dispatches go first, back to back; each chunk is computed when it is there, and
its results are sent at once. Rows that stay at their rank are computed while others are waited for (cuts.py). Over two levels
a chunk is passed on inside its node while the next crosses between nodes and the one before is computed, and its results are
summed and cross back after the experts of the next. Backward has chunks of its own number, and leaves the gradients of the
weights to the end, where the last chunks are on their way back. Messages have streams of their own on a GPU (NCCL's) and
threads on a CPU (gloo's), one for each level; in which order a level has them is the same on all ranks, because it is that of
the program.

A layer has two stages, between which its caller computes what else there is, its shared experts: results set out, and results
are collected. Backward likewise gradients of results set out first. Where a layer is computed again for its backward pass,
tokens travel and nothing returns: what comes of it is known.

Letters: T tokens of this rank, K top-k, R rows received, P of a chunk, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.expert_mlp import WeightGradients
from kernels.expert_passes import ArenaExperts, BackwardPass, ForwardPass
from parallel.schedule.pipeline import BESIDE, EXPERTS, EXPERTS_HERE
from parallel.token_exchange import Exchange
from parallel.ways import InFlight, Way

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Chunked:
    """What a pass needs beside tokens and weights."""

    exchange: Exchange
    experts: ArenaExperts
    ready: Callable[[Direction], None]  # tokens have been sent; once it returns the experts are there for this pass
    gradients: WeightGradients  # takes them, once in a backward pass
    first_rows: Callable[[], None]  # the first rows of a backward pass are there: what else travels now delays them no more
    mark: Callable[[str], None]  # is told the name of each part when the device is done with it, or with waiting for it
    in_sequence: bool = False  # every message is waited for where it is sent
    again: bool = False  # for a backward pass: results are known, and not given back


def unmarked(name: str) -> None:
    """Nobody measures."""


def begins(direction: Direction) -> str:
    """The first mark of a pass."""
    return f"{direction} begins"


Collect = Callable[[], Tensor]  # waits for results and gives y_TD


def chunked_experts(x_TD: Tensor, weights_TK: Tensor, run: Chunked) -> Collect:
    """What collects y_TD, as kernels/expert_mlp.py has it, or zeros if computed `again`. Collective; so is the backward pass,
    which comes whatever needs a gradient."""
    call = _Call(run)
    started = _Start.apply(x_TD, weights_TK, x_TD.new_empty(0).requires_grad_(), call)
    return lambda: cast(Tensor, _Collect.apply(started, call))


@dataclass
class _Call:
    """Of a layer: what is on its way between its stages."""

    run: Chunked
    passing: _Passing | None = None

    def under_way(self) -> _Passing:
        passing, self.passing = self.passing, None
        assert passing is not None, "the stages of a layer follow each other, and its backward pass comes once"
        return passing


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, anchor: Tensor, call: _Call) -> Tensor:
        """An empty tensor of as many rows, by which autograd goes from here to the results."""
        run = call.run
        exchange, way = run.exchange, run.exchange.forward
        place_RK, weights_RK = exchange.places(way), exchange.weights_RK[way.row_R]
        run.mark(begins("forward"))
        passing = _Passing(way, run, x_TD)
        run.ready("forward")
        computing = ForwardPass(exchange.order.entry_N.shape[0], run.experts, x_TD)
        rows: dict[int, Tensor] = {}
        for chunk in way.cut.turns:
            here, part = way.arrived(chunk), exchange.forward_parts[chunk]
            rows[chunk] = passing.arrived(chunk)
            if run.again:
                computing.hidden_of_rows(rows[chunk], place_RK[here], part)
                continue
            y_PD = computing.rows(rows[chunk], place_RK[here], weights_RK[here], part)
            passing.give_back(y_PD, chunk)
        ctx.call = call
        arrived_RD = torch.cat([rows[chunk] for chunk in range(len(way))]) if len(way) > 1 else rows[0]
        ctx.save_for_backward(arrived_RD, computing.h, place_RK)
        if not run.again:
            passing.give_back_last()
            call.passing = passing
        return x_TD.new_empty(x_TD.shape[0], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        run, passing = call.run, call.under_way()
        run.mark(BESIDE)
        exchange, way = run.exchange, run.exchange.backward
        arrived_RD, h, arrived_RK = ctx.saved_tensors
        run.ready("backward")
        place_RK = exchange.places(way)
        computing = BackwardPass(exchange.order, h, exchange.weights_RK, run.experts)
        d_weights: list[Tensor] = []
        for chunk, part in enumerate(exchange.backward_parts):
            d_y_PD = passing.arrived(chunk)
            if chunk == way.cut.staying:
                run.first_rows()
            d_x_PD, d_weights_PK = computing.rows(d_y_PD, place_RK[way.arrived(chunk)], part)
            passing.give_back(d_x_PD, chunk)
            d_weights.append(d_weights_PK)
        returning_weights = passing.set_out(exchange.return_weights(torch.cat(d_weights)), "combine")
        passing.give_back_last()
        returning_weights = passing.set_out(exchange.pass_weights_on(returning_weights), "combine")
        gradients = computing.weights(arrived_RD, arrived_RK)
        run.mark("weights")
        run.gradients(*gradients)
        run.mark("gradients")
        return passing.collect(), exchange.collect_weights(returning_weights), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, started_T0: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(started_T0)  # who computes a layer again comes as far as this, and leaves no results on their way
        if call.run.again:
            return started_T0.new_zeros(started_T0.shape[0], call.run.experts.gate_up_SCD.shape[2])
        call.run.mark(BESIDE)
        return call.under_way().collect()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        call.run.mark(begins("backward"))
        call.passing = _Passing(call.run.exchange.backward, call.run, d_y_TD)
        return d_y_TD.new_empty(d_y_TD.shape[0], 0), None


class _Passing:
    """The chunks of one pass on their ways.

    Over two levels, in this order: chunk i + 1 is passed on inside its node, chunk i computed, chunk i - 1 summed and given
    back between nodes. So the last leg has messages there and back in turns, the first all there and then all back.
    """

    def __init__(self, way: Way, run: Chunked, x_TD: Tensor) -> None:
        """All chunks are sent: first those that travel."""
        self._way, self._run = way, run
        first, x_TD, staying = way.legs[0], x_TD.contiguous(), way.cut.staying
        # Of each leg, there and back, by chunk; gone when they are there.
        self._crossing: dict[int, InFlight] = {}
        for chunk in (*range(staying, len(way)), *range(staying)):
            self._crossing[chunk] = first.send(first.pack(x_TD[first.of_chunk(chunk)], chunk), chunk)
        run.mark("pack")
        for chunk in range(staying, len(way)):
            self.set_out(self._crossing[chunk], "dispatch")
        self._inside: dict[int, InFlight] = {}
        self._back_inside: dict[int, InFlight] = {}
        self._back: dict[int, InFlight] = {}
        if len(way.legs) > 1:
            self._pass_on(0)

    def set_out(self, message: InFlight, name: str) -> InFlight:
        """It has been sent; in sequence it is waited for here."""
        if self._run.in_sequence:
            message.wait()
            self._run.mark(name)
        return message

    def _mark(self, name: str, chunk: int) -> None:
        """Chunks that travel have numbers of their own, and what stays nothing to wait for."""
        if chunk >= self._way.cut.staying:
            self._run.mark(f"{name} {chunk - self._way.cut.staying + 1}")
        elif name == EXPERTS:
            self._run.mark(f"{EXPERTS_HERE} {chunk + 1}")

    def arrived(self, chunk: int) -> Tensor:
        """The rows of a chunk, to be computed."""
        if len(self._way.legs) == 1:
            rows_PD = self._crossing.pop(chunk).wait()
            self._mark("dispatch", chunk)
            return rows_PD
        if chunk + 1 < len(self._way):
            self._pass_on(chunk + 1)
        rows_PD = self._inside.pop(chunk).wait()
        self._mark("gather", chunk)
        return rows_PD

    def _pass_on(self, chunk: int) -> None:
        rows_PD = self._crossing.pop(chunk).wait()
        self._mark("dispatch", chunk)
        last = self._way.legs[-1]
        self._inside[chunk] = last.send(last.pack(rows_PD, chunk), chunk)
        self._mark("relay", chunk)
        self.set_out(self._inside[chunk], "gather")

    def give_back(self, y_PD: Tensor, chunk: int) -> None:
        """The results of a chunk, which is computed."""
        message = self._way.legs[-1].give_back(y_PD, chunk)
        self._mark(EXPERTS, chunk)
        if len(self._way.legs) == 1:
            self._back[chunk] = self.set_out(message, "combine")
            return
        self._back_inside[chunk] = self.set_out(message, "scatter")
        if chunk > 0:
            self._sum(chunk - 1)

    def give_back_last(self) -> None:
        """What is left to be given back between nodes."""
        if len(self._way.legs) > 1:
            self._sum(len(self._way) - 1)

    def _sum(self, chunk: int) -> None:
        first, last = self._way.legs
        rows_SD = self._back_inside.pop(chunk).wait()
        self._mark("scatter", chunk)
        self._back[chunk] = first.give_back(last.collect(rows_SD, chunk), chunk)
        self._mark("sum", chunk)
        self.set_out(self._back[chunk], "combine")

    def collect(self) -> Tensor:
        """(T, D): what has come back."""
        first, rows, found = self._way.legs[0], list[Tensor](), list[Tensor]()
        for chunk in range(len(self._way)):
            rows.append(self._back.pop(chunk).wait())
            self._mark("combine", chunk)
            if first.apart is None:
                found.append(first.collect(rows.pop(), chunk))
                self._mark("collect", chunk)
        if first.apart is None:
            return torch.cat(found) if len(found) > 1 else found[0]
        y_TD = first.collect_all(rows)
        self._run.mark("collect")
        return y_TD
