"""Averages dense gradients over the ranks in slices, while the backward pass goes on (FSMoE, arXiv 2501.10714, section 5).

A slice sets out at a place of the backward pass, which is a place of the program, if all it consists of is complete there; else
at the next one. Slices have one order and process groups of their own, so ranks agree on the order of collectives, whatever
order autograd takes. On a GPU a stream of its own carries them, on a CPU a thread.

No bit depends on the slices (ordered_mean.py), so none depends on what was measured or planned.

Letters: P places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.ordered_mean import Means, MessageMeans, PeerMeans, levels
from parallel.placement import TransportKind
from parallel.profiling import REPEATS, timed
from parallel.schedule.cost import Fit, Line, fit
from parallel.schedule.layers import DenseGradients
from parallel.schedule.slices import messages, pieces
from parallel.stopwatch import Marks
from parallel.topology import World

MOST_BYTES = 2**27  # of a message; while it is reduced it lies on the device three times
LEAST_BYTES = 2**25  # of a slice that nobody planned, on a GPU, whose host spends a millisecond on each
PROBE = 2**18  # numbers of the first message that is timed
BUDGET_S = 2.0  # for all that are
SETS_OUT, ARRIVES = "a slice sets out from", "a slice is there from"  # marks; they end in where it begins

Span = tuple[int, int]  # running sums


class GradientSlices:
    """The gradients of `parameters`, all of one dtype. All ranks make the same calls in the same order."""

    def __init__(self, parameters: Sequence[Tensor], world: World, places: int, kind: TransportKind) -> None:
        """`places`: of the backward pass where slices may set out. `kind`: how gradients travel; in two levels, if at all, they
        do where nodes have several ranks. Collective."""
        self.world, self.places = world, places
        self._parameters = list(reversed(parameters))
        (self.dtype,) = {parameter.dtype for parameter in parameters}
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self.total = sum(self._sizes)
        self._levels = levels(world)
        self._means = self._made(kind)
        self._here = [False] * len(self._sizes)  # which gradients are complete
        self._prefix, self._complete = 0, 0  # parameters, and numbers, that are complete with all before them
        # Numbers that are complete at each place on every rank, once it is known; and that have set out behind each: where
        # nobody says how many, all that are complete, once they are worth a slice.
        self.complete_P: tuple[int, ...] | None = None
        self.sums_P: tuple[int, ...] | None = None
        self._least = LEAST_BYTES // self.itemsize if world.device.type == "cuda" else 0
        self._seen = [0] * places
        self._active = False
        self._due: list[Span] = []
        self._started = 0
        self.marks: Marks | None = None
        on_gpu = world.device.type == "cuda"
        self._stream = torch.cuda.Stream(world.device) if on_gpu else None
        self._thread = None if on_gpu else ThreadPoolExecutor(max_workers=1, thread_name_prefix="gradients")
        self._under_way: list[Future[None]] = []
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._noting(index))

    def _noting(self, index: int) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            self._here[index] = True

        return note

    def _made(self, kind: TransportKind) -> Means:
        if kind != "peer_memory":
            return MessageMeans(self._levels, self.dtype, self.world.device)
        most = min(self.total, MOST_BYTES // self.itemsize)
        return PeerMeans(self.world, most, self.dtype, self._levels[0].group)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def gradients(self, reduce: Line) -> DenseGradients:
        """As plans take them, once a backward pass has averaged any; `reduce`: what a slice takes by its bytes."""
        assert self.complete_P is not None, "nothing is known of the backward pass"
        return DenseGradients(tuple(self.itemsize * numbers for numbers in self.complete_P), self.itemsize * self.total, reduce)

    def take(self, bytes_P: Sequence[int]) -> None:
        """From here on each place takes so many bytes. Raises ValueError if they are not complete there."""
        assert self.complete_P is not None, "nothing is known of the backward pass"
        sums_P = [sent // self.itemsize for sent in accumulate(bytes_P)]
        if len(sums_P) != self.places:
            raise ValueError(f"bytes for {len(sums_P)} places of {self.places}")
        for place, (sent, complete) in enumerate(zip(sums_P, self.complete_P, strict=True)):
            if bytes_P[place] < 0 or sent > complete:
                told = f"place {place} of the backward pass takes {bytes_P[place]} bytes of dense gradients"
                raise ValueError(f"{told}, with which {sent} numbers have set out; {complete} are complete there")
        self.sums_P = tuple(sums_P)

    # ------------------------------------------------------------ a backward pass

    def begin(self, reduces: bool) -> None:
        """Before a backward pass; with `reduces` what it leaves is averaged."""
        self._here = [False] * len(self._sizes)
        self._prefix = self._complete = self._started = 0
        self._active, self._due = reduces, []

    def set_out(self, place: int) -> None:
        """The backward pass has come to a place."""
        if not self._active:
            return
        self._advance()
        self._seen[place] = self._complete
        if self.sums_P is not None:
            self._want(self.sums_P[place])
        elif self.complete_P is not None and self.complete_P[place] - self._started >= self._least:
            self._want(self.complete_P[place])
        self._start_complete()

    def finish(self) -> None:
        """Behind the backward pass: all that is left sets out, and from here on every gradient is the mean over the ranks.

        A parameter without a gradient counts as one whose gradient is zero.
        """
        if not self._active:
            return
        self._active = False
        self._want(self.total)
        for span in self._due:
            self._start(span)
        self._due = []
        with self.world.exposed:
            if self._stream is not None:
                torch.cuda.current_stream(self.world.device).wait_stream(self._stream)
            for one in self._under_way:
                one.result()
        self._under_way = []
        if self.complete_P is None:
            self._agree()

    def _agree(self) -> None:
        """What is complete at each place, on all ranks: that of the first pass which reduces."""
        least_P = torch.tensor(self._seen, dtype=torch.int64, device=self.world.device)
        with self.world.exposed:
            for level in self._levels:
                dist.all_reduce(least_P, dist.ReduceOp.MIN, group=level.group)
        self.complete_P = tuple(least_P.tolist())

    def _advance(self) -> None:
        while self._prefix < len(self._sizes) and self._here[self._prefix]:
            self._complete += self._sizes[self._prefix]
            self._prefix += 1

    def _want(self, stop: int) -> None:
        if stop > self._started:
            most = MOST_BYTES // self.itemsize
            self._due += messages(self._started, stop, most)
            self._started = stop

    def _start_complete(self) -> None:
        while self._due and self._due[0][1] <= self._complete:
            self._start(self._due.pop(0))

    def _start(self, span: Span) -> None:
        if self._thread is not None:
            self._under_way.append(self._thread.submit(self._average, span, nullcontext()))
            return
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.world.device))
        self._average(span, torch.cuda.stream(self._stream))

    # ------------------------------------------------------------ a message

    def measure(self) -> Fit:
        """What a message takes by its bytes, on the slowest rank, while nothing else travels. Collective; takes about 2 s."""
        most = min(self.total, MOST_BYTES // self.itemsize)
        probe = min(most, PROBE)
        self._seconds(probe)  # makes connections
        affordable = int(probe * BUDGET_S / (4 * REPEATS * max(self._seconds(probe), 1e-6)))
        most = max(min(most, affordable), probe)
        sizes = sorted({-(-most // part) for part in (8, 4, 2, 1)})
        sizes = sizes if len(sizes) > 1 else [most, 2 * most]
        typical = [median(self._seconds(size) for _ in range(REPEATS)) for size in sizes]
        return fit([size * self.itemsize for size in sizes], typical)

    def _seconds(self, size: int) -> float:
        """Of a message of so many numbers, on the slowest rank."""
        message = self._room(size).zero_()
        seconds = torch.tensor(timed(partial(self._means.mean, message), self.world), device=self.world.device)
        for level in self._levels:
            dist.all_reduce(seconds, dist.ReduceOp.MAX, group=level.group)
        return seconds.item()

    @torch.no_grad()
    def _average(self, span: Span, where: AbstractContextManager[object]) -> None:
        start, stop = span
        with where:
            self._mark(f"{SETS_OUT} {start}")
            numbers = [self._gradient(one.parameter)[one.start : one.stop] for one in pieces(self._sizes, start, stop)]
            size, message = stop - start, self._room(stop - start)
            torch.cat(numbers, out=message[:size])
            message[size:].zero_()
            means = self._means.mean(message)[:size]
            torch._foreach_copy_(numbers, list(means.split([one.numel() for one in numbers])))
            self._mark(f"{ARRIVES} {start}")

    def _room(self, size: int) -> Tensor:
        """For so many numbers, and for as many more as make it a multiple of the ranks."""
        return self._means.room(-(-size // self.world.size) * self.world.size)

    def _gradient(self, index: int) -> Tensor:
        """Of a parameter, to read and to write."""
        parameter = self._parameters[index]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad.view(-1)

    def _mark(self, name: str) -> None:
        if self.marks is not None:
            self.marks(name)
