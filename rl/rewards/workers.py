"""Reward workers: scores are computed in child processes, because a scorer may hang, die or use up the memory.

A sample whose scorer hangs, dies or raises gets None, never a silent 0, and is counted. A worker that hangs or dies is killed
with everything it started and replaced. Scores come back in the order of the samples, whichever worker computed them.

Workers are started as commands with a socket, not forked: the driver has threads of torch and Ray. Each makes the task again
from its name and options, so a task need not be picklable; what a scorer prints goes to the worker's log.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from kernels.errors import UserError
from rl.rewards.task import Prompt
from trainer.config.rl import RewardConfig, TaskConfig

START_TIMEOUT_S = 120.0  # importing and making the task
STARTS = 3  # of a worker, where something from outside ends it each time
PATIENCE_S = 2.0  # for a process that ends by itself
SHOWN = 80  # characters of a completion in a message
Method = Literal["score", "reply"]
ANSWER_BYTES = 1 << 26  # of a reply; more is none


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class _Ready(_Answer):
    ready: Literal[True]


class _Failed(_Answer):
    error: str


class _Score(_Answer):
    found: FiniteFloat | None


class _Reply(_Answer):
    found: str | None


# A task's code runs in the worker's process and may write anything, so nothing else is an answer.
ANSWERS: dict[str, TypeAdapter[Any]] = {
    "ready": TypeAdapter(_Ready),
    "score": TypeAdapter(_Score | _Failed),
    "reply": TypeAdapter(_Reply | _Failed),
}


def understood(kind: str, line: bytes) -> dict[str, Any] | str:
    """An answer of this kind, or what the line is instead."""
    try:
        return dict(ANSWERS[kind].validate_json(line))
    except ValidationError as error:
        return f"{line[:SHOWN]!r}, which is no answer: {error.errors(include_url=False)[0]['msg']}"


@dataclass(frozen=True)
class Response:
    """What a task scores or replies to: the turns of the model and of its environment, one where there is no conversation."""

    prompt: Prompt
    turns: tuple[str, ...]
    ended: bool


@dataclass(frozen=True)
class Reply:
    """What the environment said; None ends the conversation. `failed`: its code raised, hung or died."""

    text: str | None
    failed: bool = False


@dataclass
class _Batch:
    """What is asked at once: places of `responses` that wait, and those whose worker has died once."""

    responses: Sequence[Response] = ()
    found: list[dict[str, Any] | None] = field(default_factory=list)
    waiting: deque[int] = field(default_factory=deque)
    died: set[int] = field(default_factory=set)


class RewardWorkers:
    """`config.workers` processes that score; `with RewardWorkers(...) as rewards` ends them.

    A worker that dies may have been killed by something that has nothing to do with its sample, as by the kernel for want of
    memory, so another one is asked about it, once.

    `log_file(name)` is where the process `name`, such as reward/0, writes; `say` gets the text of the first error.
    """

    def __init__(
        self, task: TaskConfig, seed: int, config: RewardConfig, log_file: Callable[[str], Path], say: Callable[[str], None]
    ) -> None:
        self._task, self._seed, self._config, self._log_file, self._say = task, seed, config, log_file, say
        self._workers: list[_Worker] = []
        self._counts = {"reward/timeouts": 0, "reward/errors": 0, "reward/deaths": 0}
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        """Starts the workers and waits until they are ready, so that a task they cannot make stops the run before it begins."""
        self._workers = [self._start(number) for number in range(self._config.workers)]
        try:
            while not all(worker.ready for worker in self._workers):
                self._wait_and_look(_Batch())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def score(self, responses: Sequence[Response]) -> list[float | None]:
        """The reward of each response, in order; None where the task said so, or where its scorer raised, hung or died.

        Raises UserError when a worker cannot be started or cannot make the task.
        """
        return [None if answer is None else answer["found"] for answer in self._ask("score", responses)]

    def reply(self, responses: Sequence[Response]) -> list[Reply]:
        """What the environment replies to each, in order; for a task that is a `Conversation`. Raises as `score` does."""
        answers = self._ask("reply", responses)
        return [Reply(None, failed=True) if answer is None else Reply(answer["found"]) for answer in answers]

    def counts(self) -> dict[str, float]:
        """Metrics since they were last asked for."""
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        return {key: float(count) for key, count in counts.items()}

    def _ask(self, method: Method, responses: Sequence[Response]) -> list[dict[str, Any] | None]:
        """What workers found for each response; None where `method` raised, hung or died."""
        batch = _Batch(responses, [None] * len(responses), deque(range(len(responses))))
        while batch.waiting or any(worker.place is not None for worker in self._workers):
            for worker in self._workers:
                if batch.waiting and worker.ready and worker.place is None:
                    place = batch.waiting.popleft()
                    worker.ask(method, place, responses[place], self._config.timeout_s)
            self._wait_and_look(batch)
        return batch.found

    def _end(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _wait_and_look(self, batch: _Batch) -> None:
        """Waits until a worker that starts or scores says something, ends, or is late."""
        busy = [worker for worker in self._workers if worker.place is not None or not worker.ready]
        wait([worker.socket for worker in busy], timeout=max(0.0, min(w.deadline for w in busy) - time.monotonic()))
        for worker in busy:
            self._look_at(worker, batch)

    def _look_at(self, worker: _Worker, batch: _Batch) -> None:
        """Takes a worker's answer, if there is one; replaces the worker if it is dead or too late."""
        answer = worker.answer()
        if answer is None and not (worker.ended or worker.strange) and time.monotonic() < worker.deadline:
            return
        if not worker.ready:
            if answer is None:
                self._start_again(worker)
            worker.ready = answer is not None
            return
        place, worker.place = worker.place, None
        assert place is not None
        if answer is None:
            self._replace(worker, place, batch)
        elif "error" in answer:
            self._count("reward/errors", f"{worker.method} raised {answer['error']}")
        else:
            batch.found[place] = answer

    def _replace(self, worker: _Worker, place: int, batch: _Batch) -> None:
        worker.kill()
        asked = f"on the completion {batch.responses[place].turns[-1][:SHOWN]!r}"
        if worker.strange:
            self._count("reward/errors", f"the process of {worker.method} wrote {worker.strange}, {asked}")
        elif not worker.ended:
            limit = f"reward.timeout_s = {self._config.timeout_s:g} s"
            self._count("reward/timeouts", f"{worker.method} took longer than {limit} {asked}")
        elif place in batch.died:
            self._count("reward/deaths", f"the process of {worker.method} {worker.end} {asked}; its log is {worker.log}")
        else:
            batch.died.add(place)
            batch.waiting.append(place)
        self._workers[self._workers.index(worker)] = self._start(worker.number)

    def _start_again(self, worker: _Worker) -> None:
        """Raises UserError where it is the task, and not something outside, that keeps a worker from starting."""
        worker.kill()
        killed = worker.ended and worker.process.wait() < 0
        if not killed or worker.starts == STARTS:
            raise UserError(self._cannot_start(worker))
        self._workers[self._workers.index(worker)] = self._start(worker.number, worker.starts + 1)

    def _count(self, key: str, text: str) -> None:
        """The first of a kind is told, all are counted."""
        self._counts[key] += 1
        if key not in self._told:
            self._told.add(key)
            self._say(f"task {self._task.name}: {text}; the sample has no reward, and more like it are only counted in {key}")

    def _start(self, number: int, starts: int = 1) -> _Worker:
        first = {
            "task": self._task.model_dump(mode="json"),
            "seed": self._seed,
            "timeout_s": self._config.timeout_s,
            "memory_gib": self._config.memory_gib,
        }
        return _Worker(number, self._log_file(f"reward/{number}"), first, starts)

    def _cannot_start(self, worker: _Worker) -> str:
        last = worker.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        wrote = f"wrote {worker.strange}" if worker.strange else f"was not ready after {START_TIMEOUT_S:g} s"
        reason = worker.end if worker.ended else wrote
        return (
            f"a reward worker could not make task {self._task.name}: its process {reason} ({' '.join(last) or 'no message'}); "
            f"its log is {worker.log}"
        )


@dataclass
class _Worker:
    """A process, the sample it is at, and until when it may take."""

    number: int
    log: Path
    first: dict[str, Any]  # what the process is told before anything else
    starts: int  # this one included, without one that was ready
    ready: bool = False
    ended: bool = False  # the process closed its end
    strange: str = ""  # what it wrote that is no answer; nothing it says is trusted any more
    place: int | None = None
    method: Method = "score"  # that it is asked for
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.received = bytearray()  # grows in place: a flood of 64 MiB in small pieces would be copied a thousand times
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # What the driver can import, a worker can.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        with theirs, open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rl.rewards.worker", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._send(self.first, START_TIMEOUT_S)

    def ask(self, method: Method, place: int, response: Response, timeout_s: float) -> None:
        self.method, self.place = method, place
        prompt = response.prompt
        request = {"text": prompt.text, "answer": prompt.answer, "turns": response.turns, "ended": response.ended}
        self._send({"method": method, **request}, timeout_s)

    def _send(self, message: dict[str, Any], timeout_s: float) -> None:
        """Sends within the timeout, or leaves it to the deadline to find out that nothing comes back."""
        self.deadline = time.monotonic() + timeout_s
        self.socket.settimeout(timeout_s)
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError:
            self.deadline = 0.0
        except OSError:  # the process is gone, as `answer` will see
            self.ended = True
        self.socket.setblocking(False)

    def answer(self) -> dict[str, Any] | None:
        """The answer if it is complete; None so far. Sees whether the process is gone."""
        try:
            while more := self.socket.recv(1 << 16):
                self.received += more
                if len(self.received) > ANSWER_BYTES:
                    self.strange = f"more than {ANSWER_BYTES >> 20} MiB"
                    return None
            self.ended = True
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        if not self.received.endswith(b"\n"):
            return None
        line, self.received = bytes(self.received), bytearray()
        found = understood(self.method if self.ready else "ready", line)
        if isinstance(found, str):
            self.strange = found
            return None
        return found

    def kill(self) -> None:
        """Ends the process and everything in its group; one that is ending by itself may finish, to tell why."""
        self.socket.close()
        if self.process.returncode is not None:
            return
        patience = time.monotonic() + (PATIENCE_S if self.ended else 0.0)
        # WNOWAIT leaves a dead process in the table, so its number still means this group and no other.
        while os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= patience:
                break
            time.sleep(0.01)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def end(self) -> str:
        """How the process ended, once it is killed."""
        code = self.process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
