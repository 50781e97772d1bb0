"""Stopping a run from outside so that it loses nothing: on SIGTERM or SIGUSR1 the step ends, then comes a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

REQUEUE = 75  # exit code: the same command with resume=auto goes on; EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
Self = TypeVar("Self", bound="StopRequest")


class Stopped(RuntimeError):
    """The run has stopped for a reason outside it and should be started again, with resume=auto."""


class StopRequest:
    """Listens for SIGNALS in a `with` block. In `deferred` a signal is kept for later, elsewhere it stops the run at once."""

    def __init__(self) -> None:
        self.signal: str | None = None  # the name of the one that came
        self._deferred = False

    def __enter__(self: Self) -> Self:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Installs the handlers; again after ray.init, which installs its own for SIGTERM."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> Any:
        self.signal = signal.Signals(number).name
        if not self._deferred:
            self.obey("before a step was made")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The loop, which asks for `signal` itself once a step is done."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def obey(self, where: str) -> None:
        """Raises Stopped if a signal has come. `where` it stops: "after step 12"."""
        if self.signal is not None:
            raise Stopped(f"stopped by {self.signal} {where}; resume=auto goes on")
