"""Stops a run from outside without loss: on SIGTERM, SIGUSR1, Ctrl-C, or when its terminal is closed (SIGHUP), it finishes the
step and writes a checkpoint.

A second Ctrl-C ends it at once. An attempt also stops in this way when its ranks should move, because the cluster changes
(places.py); then the run goes on at once, unless it is bound to its nodes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

REQUEUE = 75  # exit code: the same command with resume=auto goes on; EX_TEMPFAIL of sysexits.h
STDERR = 2  # file descriptor
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of those who run jobs


class Stopped(RuntimeError):
    """The run has stopped for a reason outside it and should be started again, with resume=auto."""


class Interrupted(Stopped):
    """Ctrl-C has stopped it: a person, who starts it again when that is wanted."""


@dataclass(frozen=True)
class Move:
    """Why the ranks should end with a checkpoint, and others begin: because nodes are to go, or for places that are held."""

    why: str
    going: frozenset[str]  # nodes that will be lost, with what is in their memory; none: for more places
    elsewhere: bool = True  # the run goes on at once; otherwise it stops, because cluster.nodes names those that go


class Moved(RuntimeError):
    """The ranks have ended so that the run goes on in other places at once; its last step is in a checkpoint."""

    def __init__(self, move: Move, where: str) -> None:
        super().__init__(f"{move.why}: the ranks start again {where}")
        self.move = move


class StopRequest:
    """Listens for SIGNALS, SIGHUP and Ctrl-C in a `with` block. In `deferred` one is kept for later; elsewhere it ends the run
    at once.

    Each is said at once. Further ones leave alone what ends already, but a second Ctrl-C raises KeyboardInterrupt anywhere.
    """

    def __init__(self) -> None:
        self.signal: str | None = None  # the name of the one that came
        self.move: Move | None = None
        self._interrupted = False  # by Ctrl-C
        self._raised: BaseException | None = None  # by the handler, in whatever the run was doing
        self._waits_for: str | None = None  # in `deferred`
        self._look: Callable[[], Move | None] = _nothing

    def __enter__(self) -> Self:
        # A shell has what it starts in the background ignore Ctrl-C, which is meant for others then, and nohup has it ignore
        # the end of the terminal.
        heeded = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.getsignal(number) for number in (*SIGNALS, *heeded)}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Installs the handlers; again after ray.init, which installs its own for SIGTERM."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> Any:
        by_hand = number == signal.SIGINT
        if by_hand and self._interrupted:
            self._raised = KeyboardInterrupt()
            raise self._raised
        self._interrupted |= by_hand
        first = self.signal is None
        self.signal = "Ctrl-C" if by_hand else signal.Signals(number).name
        if first or by_hand:
            again = "; Ctrl-C again ends at once" if by_hand else ""
            _say_at_once(f"{self.signal}: waiting for {self._waits_for or 'what has been started to end'}{again}")
        if self._waits_for is None and first:
            self._raised = self._kind()(f"stopped by {self.signal} before a step was made; resume=auto goes on")
            raise self._raised

    def _kind(self) -> type[Stopped]:
        return Interrupted if self._interrupted else Stopped

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """For calls of Ray, out of which what the handler raises comes as another exception: here it is as it was raised."""
        try:
            yield
        except (KeyboardInterrupt, SystemError) as error:
            if self._raised is None or error is self._raised:
                raise
            raise self._raised from error

    @contextmanager
    def deferred(self, waits_for: str, look: Callable[[], Move | None] | None = None) -> Iterator[None]:
        """The loop, which asks whether to end once a step is done. `look` says why it should go on elsewhere, if so.

        `waits_for`: what somebody who asks it to stop has to wait for, "the end of this step".
        """
        self._waits_for, self._look = waits_for, look or _nothing
        try:
            yield
        finally:
            self._waits_for, self._look, self.move = None, _nothing, None

    def asked(self) -> bool:
        """Whether the loop should write a checkpoint and `obey`; `move` is set where no signal asks for it."""
        self.move = self._look() if self.signal is None else None
        return self.signal is not None or self.move is not None

    @property
    def leaving(self) -> frozenset[str] | None:
        """The nodes that will be lost while the run goes on elsewhere; None where it ends, with all that it has in memory."""
        if self.move is None or not self.move.elsewhere or self.signal is not None:
            return None
        return self.move.going

    def obey(self, where: str) -> None:
        """Raises Stopped if a signal has come, Moved for a move. `where` it stops: "after step 12"."""
        if self.signal is not None:
            raise self._kind()(f"stopped by {self.signal} {where}; resume=auto goes on")
        if self.move is not None and not self.move.elsewhere:
            raise Stopped(f"{self.move.why}, and cluster.nodes has all of them take part: stopped {where}; resume=auto goes on")
        if self.move is not None:
            raise Moved(self.move, where)


@contextmanager
def finished_first(what: str) -> Iterator[None]:
    """For what takes seconds and should not be left half done: a signal that comes meanwhile acts after it, as without us."""
    with StopRequest() as stop, stop.deferred(f"{what} to be written"):
        yield
    if stop.signal is not None:
        signal.raise_signal(signal.SIGINT if stop.signal == "Ctrl-C" else signal.Signals[stop.signal])


def _nothing() -> None:
    return None


def _say_at_once(text: str) -> None:
    """On the console, from a signal handler: in the middle of a `print`, which another one would break."""
    with suppress(OSError):  # whoever looked at it may be gone, and the run is to stop all the same
        os.write(STDERR, f"\n{text}\n".encode())
