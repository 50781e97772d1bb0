"""A collective that does not end names who did not come, from the stacks that the ranks wrote themselves."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.models import random_batch
from trainer.batch import TrainBatch
from trainer.hangs import JOINED, STANDS_STILL, TIMED_OUT, WENT_ON, StackWatch, Whereabouts, gave_up, report, whereabouts
from trainer.worker import TrainWorker

TIMEOUT_S = 4.0


class OneStaysAway:
    """Stands for the trainer: rank 1 does not come to the sum before rank 0 has given up and both have written their stacks."""

    def __init__(self, worker: TrainWorker, given_up: Path) -> None:
        self.world, self.given_up = worker.world, given_up

    def predict(self, batch: TrainBatch, policy: bool, reference: bool) -> dict[str, torch.Tensor]:
        if self.world.rank == 1:
            time.sleep(TIMEOUT_S)
            while not self.given_up.exists():
                time.sleep(0.05)
        return {"logprobs": self.world.sum(torch.ones(4))}


def rank_main(rank: int, folder: str) -> None:
    worker = TrainWorker(rank, Path(folder) / f"trainer_{rank}.log")
    place = Path(folder) / "place"
    if rank == 0:
        host, port = worker.serve("127.0.0.1", 30)
        place.with_suffix(".new").write_text(f"{host} {port}")
        place.with_suffix(".new").rename(place)
    while not place.exists():
        time.sleep(0.05)
    host, text = place.read_text().split()
    worker.join(host, int(text), 2, TIMEOUT_S)
    worker.trainer = OneStaysAway(worker, Path(folder) / "raised_0")  # type: ignore[assignment]
    try:
        worker.predict(random_batch(0), True, False)
    except RuntimeError as error:
        (Path(folder) / f"raised_{rank}").write_text(str(error))


def test_the_rank_that_did_not_come_and_the_operation_are_named(tmp_path: Path) -> None:
    mp.start_processes(rank_main, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert TIMED_OUT.search((tmp_path / "raised_0").read_text()), "this is how the driver knows"
    logs = {f"trainer/{rank}": tmp_path / f"trainer_{rank}.log" for rank in range(2)}
    told = report(logs)
    assert "a collective did not end in time: trainer/1 hangs (it wrote no stack" not in told
    assert "trainer/1 hangs (" in told and "predict trainer/worker.py:" in told, told
    assert "trainer/0 waits in all_reduce (sum parallel/topology.py:" in told, told
    assert str(tmp_path) in told


NCCL = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLTOALL_BASE, NumelIn=8)"
PEER = "[FATAL] CUDASymmetricMemory::barrier: rank 0 failed to receive signal from rank 1 on channel 0\n"
SHARED = "the memory that ranks share, for rank 1"
STACK = """Timeout (0:00:04)!
Thread 0x00007f (most recent call first):
  File "/usr/lib/python3/threading.py", line 324 in wait
Thread 0x00007e (most recent call first):
  File "/v/torch/distributed/distributed_c10d.py", line 3100 in _work
  File "/v/torch/distributed/distributed_c10d.py", line 3087 in all_to_all_single
  File "/v/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/x/parallel/token_exchange.py", line 99 in dispatch
  File "/x/trainer/step.py", line 12 in learn
  File "/x/trainer/worker.py", line 104 in _learn
  File "/x/ray/_private/worker.py", line 1 in main_loop
"""
EXCHANGE = "dispatch parallel/token_exchange.py:99 < learn trainer/step.py:12 < _learn trainer/worker.py:104"
ENGINE = """Timeout (0:00:04)!
Thread 0x00007e (most recent call first):
  File "/v/torch/cuda/streams.py", line 31 in synchronize
  File "/x/rl/engine/decoder.py", line 99 in tokens
  File "/x/rl/engine/engine.py", line 170 in advance
  File "/x/rl/engine/actor.py", line 51 in advance
  File "/x/trainer/hangs.py", line 53 in call
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", Whereabouts(None, STANDS_STILL)),
        ("update 3 loss 1.0", Whereabouts(None, STANDS_STILL)),
        (ENGINE, Whereabouts(None, "tokens engine/decoder.py:99 < advance engine/engine.py:170 < advance engine/actor.py:51")),
        (STACK, Whereabouts("all_to_all_single", EXCHANGE)),
        (STACK.replace("distributed_c10d", "other"), Whereabouts(None, EXCHANGE)),
        (f"{STACK.replace('distributed_c10d', 'other')}{NCCL}", Whereabouts("alltoall_base", EXCHANGE)),
        (f"{PEER}{STACK.replace('distributed_c10d', 'other')}", Whereabouts(SHARED, EXCHANGE)),
        (STACK + STACK.replace("distributed_c10d", "other"), Whereabouts(None, EXCHANGE)),
        (f"{ENGINE}{WENT_ON}, after 9.1 s\nupdate 3\n", Whereabouts(None, STANDS_STILL)),
        (f"{ENGINE}{WENT_ON}, after 9.1 s\nupdate 3\n{STACK}", Whereabouts("all_to_all_single", EXCHANGE)),
    ],
)
def test_the_last_stacks_of_a_log_are_read(log: str, expected: Whereabouts) -> None:
    assert whereabouts(log) == expected


def test_who_cannot_write_hangs(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(STACK)
    told = report({"trainer/0": tmp_path / "a.log", "trainer/1": tmp_path / "none.log"})
    assert f"trainer/1 hangs ({STANDS_STILL}); trainer/0 waits in all_to_all_single" in told


@pytest.mark.parametrize("words", [NCCL, PEER])
def test_a_process_that_gave_up_is_not_taken_for_the_one_that_follows_it(words: str, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(f"rank 0 of 2 {JOINED} cuda:0\n{words}\n")
    assert gave_up(log)
    log.write_text(f"{log.read_text()}{STACK}rank 0 of 2 {JOINED} cuda:0\nupdate 3\n")
    assert not gave_up(log) and f"trainer/0 hangs ({STANDS_STILL})" in report({"trainer/0": log})


@pytest.mark.parametrize("error", [None, RuntimeError("timed out")])
def test_a_call_that_was_slow_and_has_ended_is_no_place_where_a_process_hangs(error: Exception | None, tmp_path: Path) -> None:
    file = tmp_path / "a.log"
    with open(file, "a", buffering=1) as log:
        with StackWatch(log, 600.0):
            pass
        assert not file.read_text()
        with suppress(RuntimeError), StackWatch(log, 0.1):
            while "Timeout (" not in file.read_text():
                time.sleep(0.05)
            if error is not None:
                raise error
    told = file.read_text()
    assert told.count(WENT_ON) == (error is None) and (told.rindex("Timeout (") < told.rfind(WENT_ON)) == (error is None)
