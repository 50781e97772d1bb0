"""Events that a stopwatch records again, even while the GPU is on its way to them, tell of their newest recording."""

from __future__ import annotations

import pytest
import torch

from parallel.stopwatch import Stopwatch
from tests.gpu.needs import gpus

pytestmark = [pytest.mark.gpu, gpus(1)]
SHORT, LONG = 10**7, 10**9  # cycles of the GPU itself: about 5 ms and half a second


def test_events_are_used_again_and_tell_of_their_newest_recording() -> None:
    watch = Stopwatch(torch.device("cuda", 0))

    def seconds(cycles: int) -> float:
        with watch:
            torch.cuda._sleep(cycles)
        return watch.take()

    torch.cuda._sleep(1)  # loads it
    with watch:
        torch.cuda._sleep(LONG)
    events = {id(event) for event in watch._events}
    watch.forget()  # the GPU is still at it
    short = seconds(SHORT)
    assert {id(event) for event in watch._spare} == events, "the same two events"
    assert 0 < short < seconds(LONG)
