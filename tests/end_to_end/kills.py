"""Killing processes of a run at random moments. A few in CI; for more of them, and for other moments:

TESSERA_KILLS=20 TESSERA_KILLS_SEED=1 python -m pytest tests/end_to_end/test_kills.py tests/end_to_end/test_faults.py -k killed
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import psutil

from tests.end_to_end.commands import finish, start, wait_for_step
from tests.processes import process_of

KILLS = int(os.environ.get("TESSERA_KILLS", "0"))
SEED = int(os.environ.get("TESSERA_KILLS_SEED", str(os.getpid())))
APART = 4  # rounds or steps between two kills


def shuffled(roles: list[str]) -> list[str]:
    """Each of the roles, or KILLS of them in turns, at random places."""
    generator, chosen = random.Random(SEED), list[str]()
    while len(chosen) < (KILLS or len(roles)):
        chosen += generator.sample(roles, len(roles))
    return chosen[: KILLS or len(roles)]


def kill_at_random(command: list[str], run_dir: Path, roles: list[str], again: list[str] | None = None) -> str:
    """Runs a command and kills the process of each of the roles, some steps after the last one; what all its drivers said.

    The command has resume=auto, and so has `again`, which takes its place once a driver was killed. Step
    (len(roles) + 1) * APART is after all of them.
    """
    moments = random.Random(SEED)
    log = run_dir.with_suffix(".log")
    log.parent.mkdir(exist_ok=True)
    with open(log, "w") as out:
        process = start(*command, stdout=out)
        for number, role in enumerate(roles):
            wait_for_step(run_dir, number * APART + moments.randrange(1, APART), process)
            time.sleep(moments.uniform(0, 0.5))
            if role == "driver":
                # Ray's two small agents look for their parent only every few minutes; all that holds memory ends with it.
                ours = [c for c in psutil.Process(process.pid).children(recursive=True) if "Agent" not in c.name()]
                process.kill()
                process.wait()
                _, left = psutil.wait_procs(ours, timeout=60)
                assert len(ours) >= 4 and not left, f"processes of the killed driver are still there: {left}"
                process = start(*(again or command), stdout=out)
            else:
                wait_for_process(role, process.pid).kill()
        finish(process)
    return log.read_text()


def wait_for_process(role: str, driver: int) -> psutil.Process:
    deadline = time.monotonic() + 60
    while (found := process_of(role, driver)) is None:
        assert time.monotonic() < deadline, f"no {role} in 60 s"
        time.sleep(0.05)
    return found
