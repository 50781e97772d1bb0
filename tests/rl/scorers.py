"""Tasks whose scorers misbehave on demand: the completion says how."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rl.rewards.task import Prompt


def as_long(completion: str, answer: str, credit: float = 0.0) -> float | None:
    """A verifier: whether the completion is as long as the answer. Nobody can judge none."""
    return None if not completion else max(credit, float(len(completion) == len(answer)))


class Scripted:
    """Scores `reward X` by X, and does what other completions say."""

    def __init__(self, seed: int, pids: str = "", slow_start: float = 0.0) -> None:
        time.sleep(slow_start)
        self.pids = pids

    def prompt(self, index: int) -> Prompt:
        return Prompt(f"{index}", "")

    held_out = prompt

    def demonstration(self, index: int) -> tuple[Prompt, str]:
        return self.prompt(index), "reward 1"

    def score(self, prompt: Prompt, completion: str, ended: bool) -> float | None:
        word, _, rest = completion.partition(" ")
        if self.pids:
            Path(self.pids, str(os.getpid())).touch()
        match word:
            case "reward":
                print("what a scorer prints disturbs nobody")
                return float(rest)
            case "late":
                time.sleep(float(rest))
                return 1.0
            case "none":
                return None
            case "raise":
                raise ValueError(f"no reward for {rest}")
            case "text":
                return "much"  # type: ignore[return-value]
            case "write":  # into the worker's own connection
                os.write(int(sys.argv[1]), rest.encode() + b"\n")
                time.sleep(60)
            case "flood":
                while True:
                    os.write(int(sys.argv[1]), b"x" * (1 << 16))
            case "exit":
                sys.exit(int(rest))
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                ctypes.string_at(0)
            case "memory":
                return float(len(bytearray(int(rest))))
            case "hang":
                while True:
                    pass
            case "regex":  # holds the interpreter's lock
                Path(self.pids, "regex").touch()
                re.fullmatch(r"(a+)+", "a" * 60 + "b")
            case "child":
                child = subprocess.Popen(["sleep", "1000"])
                Path(self.pids, str(child.pid)).touch()
                time.sleep(1000)
        raise AssertionError(completion)


class Talking(Scripted):
    """Answers a turn by what it says: `say X` by X, and misbehaves like the scorer."""

    def reply(self, prompt: Prompt, turns: Sequence[str]) -> str | None:
        if turns[-1].startswith("say "):
            return f"{len(turns)}:{turns[-1].removeprefix('say ')}"
        if turns[-1].startswith("number"):
            return 7  # type: ignore[return-value]
        return None if turns[-1] == "over" else str(self.score(prompt, turns[-1], True))


class Unmakeable:
    """A task that only the driver could make."""

    def __init__(self, seed: int) -> None:
        raise RuntimeError("no licence in this process")

    def prompt(self, index: int) -> Prompt:
        return Prompt("", "")

    held_out = prompt

    def demonstration(self, index: int) -> tuple[Prompt, str]:
        return self.prompt(index), ""

    def score(self, prompt: Prompt, completion: str, ended: bool) -> float | None:
        return None


class Letters:
    """Rewards letters, which a model that knows nothing writes more or less of; a score takes a moment, and longer while there
    is a file `slow`."""

    def __init__(self, seed: int, slow: str = "") -> None:
        self.seed, self.slow = seed, slow

    def prompt(self, index: int) -> Prompt:
        return Prompt(f"text {self.seed + index}:", "")

    def held_out(self, index: int) -> Prompt:
        return Prompt(f"other {index}:", "")

    def demonstration(self, index: int) -> tuple[Prompt, str]:
        return self.prompt(index), "letters"

    def score(self, prompt: Prompt, completion: str, ended: bool) -> float:
        time.sleep(0.5 if self.slow and Path(self.slow).exists() else 0.01)
        return sum(letter.isalpha() for letter in completion) / max(1, len(completion))
