"""What an update says of itself: all waits for what ranks send are timed as communication, and sums are the same on every
rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.stopwatch import Stopwatch
from parallel.topology import World
from tests.distributed.ranks import run_ranks
from tests.models import parallel, random_batch, spec, tiny_model
from trainer.batch import cross_entropy
from trainer.estimate import training_flops
from trainer.usage import work_of
from trainer.worker import TrainWorker

COLLECTIVES = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce", "broadcast")
SMALL_BYTES = 128  # flags, norms and what is measured of the machine, which are not timed


class Noting(Stopwatch):
    """Knows whether it runs, and that it does not count anything twice."""

    running = 0

    def start(self) -> None:
        assert not self.running
        self.running += 1
        super().start()

    def stop(self) -> None:
        super().stop()
        self.running -= 1

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


class NotingWork:
    """Of a collective that goes on by itself: the wait for it is what has to be timed."""

    def __init__(self, work: dist.Work, note: Callable[[], None]) -> None:
        self._work, self._note = work, note

    def wait(self) -> None:
        self._note()
        self._work.wait()


def note_untimed(world: World, patch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(collective, bytes) of all that run, or are waited for, while `world.exposed` does not, from here on."""
    watch, untimed = Noting(world.device), list[tuple[str, int]]()
    object.__setattr__(world, "exposed", watch)

    def noting(name: str) -> Any:
        original = getattr(dist, name)

        def call(*arguments: Any, **named: Any) -> Any:
            def note() -> None:
                # Slices of dense gradients travel beside the computation; where it waits for them, it waits for their thread.
                if not watch.running and threading.current_thread() is threading.main_thread():
                    tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
                    untimed.append((name, max(tensor.nbytes for tensor in tensors)))

            if named.get("async_op"):
                return NotingWork(original(*arguments, **named), note)
            note()
            return original(*arguments, **named)

        return call

    for name in COLLECTIVES:
        patch.setattr(dist, name, noting(name))
    return untimed


def work(world: World, transport: str, schedule: str | int) -> tuple[list[dict[str, Any]], list[tuple[str, int]]]:
    with pytest.MonkeyPatch.context() as patch:
        untimed = note_untimed(world, patch)
        worker = TrainWorker(world.rank)
        worker.world = world
        worker.build(spec(tiny_model(), micro_rows=2, parallel=parallel(transport=transport, schedule=schedule, zero_stage=2)))
        worker.learn(random_batch(0), cross_entropy, 1e-3)
        untimed.clear()  # building and the first plans are not of an update
        return [worker.learn(random_batch(seed), cross_entropy, 1e-3) for seed in (1, 2)], untimed


@pytest.mark.parametrize(("transport", "schedule"), [("messages", "off"), ("messages", 3), ("peer_memory", "off")])
def test_what_ranks_send_is_timed_and_what_the_model_needed_is_counted(transport: str, schedule: str | int) -> None:
    results = run_ranks(work, 2, transport, schedule)
    for told, untimed in results:
        assert [(name, size) for name, size in untimed if size > SMALL_BYTES] == []
        for seed, metrics in zip((1, 2), told, strict=True):
            tokens, pairs = work_of(random_batch(seed).documents_BS)
            assert metrics["train/model_tflops"] == training_flops(tiny_model(), tokens, pairs) / 1e12
            assert (
                0 < metrics["time/communication_exposed_s"] < metrics["time/train_s"] + results[0][0][seed - 1]["time/train_s"]
            )
            assert metrics["time/copies_exposed_s"] <= metrics["time/communication_exposed_s"]
            assert 0 < metrics["time/plans_exposed_s"] < metrics["time/train_s"] + results[0][0][seed - 1]["time/train_s"]
            assert "perf/mfu" not in metrics and "time/gpu_idle_s" not in metrics
    first, second = ([m["time/communication_exposed_s"] for m in told] for told, _ in results)
    assert first == second
