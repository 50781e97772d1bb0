"""What an update says of itself: all waits for what ranks send are timed as communication, and sums are the same on every
rank. And in which order it does what the device need not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from parallel.stopwatch import Stopwatch
from parallel.topology import World
from tests.distributed.ranks import run_ranks
from tests.models import parallel, random_batch, spec, tiny_model
from trainer.batch import TrainBatch, cross_entropy
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


class Waits(TorchFunctionMode):
    """Notes whatever would make a host wait for its device."""

    CALLS = frozenset(
        {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__}
    )

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.CALLS:
            self.events.append("wait")
        return func(*args, **(kwargs or {}))


def order_of_events(worker: TrainWorker, batch: TrainBatch) -> list[str]:
    """What an update does: passes of the policy over layers, backward passes, optimizer steps, waits for the device."""
    events: list[str] = []
    trainer = worker.trainer

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **named: Any) -> Any:
            found = call(*arguments, **named)
            events.append(name)
            return found

        return noted

    settings = trainer.materialisation.settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.materialisation, "settings", replace(settings, policy=noting("plan", settings.policy)))
        for name in ("backward", "step"):
            patch.setattr(trainer.dense, name, noting(name, getattr(trainer.dense, name)))
        with Waits(events):
            worker.learn(batch, cross_entropy, 1e-3)
    return events


def work(world: World, transport: str, schedule: str | int) -> tuple[list[dict[str, Any]], list[tuple[str, int]], list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        untimed = note_untimed(world, patch)
        worker = TrainWorker(world.rank)
        worker.world = world
        worker.build(spec(tiny_model(), micro_rows=2, parallel=parallel(transport=transport, schedule=schedule, zero_stage=2)))
        worker.learn(random_batch(0), cross_entropy, 1e-3)
        untimed.clear()  # building and the first plans are not of an update
        told = [worker.learn(random_batch(seed), cross_entropy, 1e-3) for seed in (1, 2)]
        return told, untimed, order_of_events(worker, random_batch(3))


@pytest.mark.parametrize(("transport", "schedule"), [("messages", "off"), ("messages", 3), ("peer_memory", "off")])
def test_what_ranks_send_is_timed_and_what_the_model_needed_is_counted(transport: str, schedule: str | int) -> None:
    results = run_ranks(work, 2, transport, schedule)
    for told, untimed, events in results:
        behind = events[len(events) - events[::-1].index("backward") :]
        planned = len(behind) - behind[::-1].index("plan")
        assert "plan" not in events[: -len(behind)], "plans are made before all loads are known"
        assert behind[:planned].count("wait") == 0, "plans are made when the device has nothing to do any more"
        assert "plan" not in behind[behind.index("step") :] and "wait" in behind[: behind.index("step")], events
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
    first, second = ([m["time/communication_exposed_s"] for m in told] for told, *_ in results)
    assert first == second
