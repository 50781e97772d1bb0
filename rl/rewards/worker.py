"""A reward worker: a process of its own that makes the task and scores what it is sent. `rl/rewards/workers.py` starts it.

A hung scorer may hold the interpreter's lock, as a regular expression does, so a worker does not depend on being killed: a
thread ends it with the driver, and a timer in C ends it when a score takes longer than the driver would ever wait.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import threading
from typing import Any, BinaryIO

from rl.rewards.task import Conversation, Prompt, Task
from rl.rewards.tasks import make_task
from trainer.config.rl import TaskConfig

GRACE_S = 2.0  # the driver kills at its timeout; without a driver the worker ends so much later
GIB = 1 << 30
TEXT_LIMIT = 2000  # characters of an error


def serve(connection: socket.socket, requests: BinaryIO) -> None:
    """Answers one JSON line with another until the driver closes its end. The first line is the task and the limits."""
    start = json.loads(requests.readline())
    memory = int(start["memory_gib"] * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    task = make_task(TaskConfig(**start["task"]), start["seed"])
    send(connection, {"ready": True})
    for line in requests:
        faulthandler.dump_traceback_later(start["timeout_s"] + GRACE_S, exit=True)
        send(connection, answered(task, json.loads(line)))
        faulthandler.cancel_dump_traceback_later()


def answered(task: Task, request: dict[str, Any]) -> dict[str, Any]:
    """`{"found": what the task's method returned}`, or `{"error": text}` where it raised or returned something else."""
    prompt, turns = Prompt(request["text"], request["answer"]), request["turns"]
    try:
        if request["method"] == "score":
            return {"found": judged(task.score(prompt, turns[-1], request["ended"]))}
        assert isinstance(task, Conversation), task
        reply = task.reply(prompt, turns)
        if not (reply is None or isinstance(reply, str)):
            raise TypeError(f"reply returned {reply!r}; it is text or None")
        (reply or "").encode()  # half of a surrogate pair is no text
        return {"found": reply}
    except Exception as error:  # whatever a person's task raises is counted and told by the driver
        return {"error": f"{type(error).__name__}: {error}"[:TEXT_LIMIT].encode(errors="replace").decode()}


def judged(reward: float | None) -> float | None:
    if reward is None:
        return None
    number = float(reward)
    if not math.isfinite(number):
        raise ValueError(f"score returned {number}; a reward is a finite number or None")
    return number


def send(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


def end_with_the_driver(connection: socket.socket) -> None:
    """Kills this process and what it started as soon as the other end is closed."""
    poll = select.poll()
    poll.register(connection, 0)  # only what cannot be left out: the end
    poll.poll()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=end_with_the_driver, args=(connection,), daemon=True).start()
    serve(connection, connection.makefile("rb"))


if __name__ == "__main__":
    main()
