"""What all tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from trainer.memory import keep_imports

# Before torch is imported anywhere: on two cores, several ranks with two threads each would fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

settings.register_profile("tessera", deadline=None)  # a machine may be busy; timings decide no test
settings.load_profile("tessera")

# DeepSpeed compiles its operators when they are first asked for; by the mark of the tests that use one, what asks for it.
OPERATORS = {"cpu_adam": "cpu", "aio": "nvme"}
ASK = "import sys, pathlib, tempfile, parallel.offload as o; o.check_offload(sys.argv[1], pathlib.Path(tempfile.gettempdir()))"
COMPILING_S = 1200  # beside the tests of two workers; two minutes alone
LONG = ("test_moe_layer.py", "test_router.py", "test_trainer.py")  # a minute or more
BEGUN = time.monotonic()
MINUTES = float(os.environ.get("TESSERA_TEST_MINUTES", "inf"))  # after which no test begins, where a run of all would be ended
COMPILED = pytest.StashKey[dict[str, Future[subprocess.CompletedProcess[str]]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m gpu` all runs on the CPU, also where there are GPUs: what the tests expect is exact there, and in float32.

    Ctrl-C acts also behind a shell that has it ignored, as in `make test &`: some tests send it, to themselves and to others.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the server of ranks, and begins to compile DeepSpeed's operators, one after the other, beside the tests that do
    without them and behind them."""
    keep_imports()
    if session.config.option.collectonly:
        return
    ranks = sys.modules.get("tests.distributed.ranks")
    if ranks is not None:  # tests that were collected use it
        ranks.start_server()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    compiling = partial(subprocess.run, env=environment, capture_output=True, text=True, timeout=COMPILING_S)
    turns = ThreadPoolExecutor(1)
    session.stash[COMPILED] = {
        mark: turns.submit(compiling, ["nice", sys.executable, "-c", ASK, offload])
        for mark, offload in OPERATORS.items()
        if any(item.get_closest_marker(mark) for item in session.items)
    }


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test waits for the operators that it uses, outside of its own time limit. When time is over it says so and skips."""
    if time.monotonic() - BEGUN > 60 * MINUTES:
        item.add_marker(pytest.mark.skip(reason=f"TESSERA_TEST_MINUTES={MINUTES:g} are over"))
        return (yield)
    skips = any(mark.args[0] for mark in item.iter_markers("skipif"))
    for mark, compiled in item.session.stash[COMPILED].items():
        if skips or not item.get_closest_marker(mark):
            continue
        if isinstance(compiled.exception(), subprocess.TimeoutExpired):
            continue  # the test asks again, within its own time
        done = compiled.result()
        # Without libaio they skip, unless they must not; all else fails and says why.
        if mark == "aio" and done.returncode != 0 and os.environ.get("TESSERA_REQUIRE_ALL") != "1":
            item.add_marker(pytest.mark.skip(reason=done.stderr.strip().rpartition("\n")[2]))
    return (yield)


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """What a file's tests leave in it, as a Ray of this process does, reaches no program that the next file starts."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def room(path: str) -> str:
    """The folder below tests/ that a file or a test is in; of the files beside this one their names."""
    return path.partition("tests/")[2].partition("/")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is quick first, then what waits for a compiler, then several ranks, then whole commands; of each LONG first."""
    turns = {"distributed": 2, "end_to_end": 3}

    def turn(item: pytest.Item) -> tuple[int, bool]:
        waits = item.get_closest_marker("cpu_adam") is not None
        return turns.get(room(item.nodeid), int(waits)), item.path.name not in LONG

    items.sort(key=turn)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --numprocesses, a worker gets a file at a time, or the files that start clusters of Ray, or all of tests/gpu.

    The first start them at the same addresses, where SLURM has others, and the main job starts Ray on this machine alone; the
    second take the same GPUs: never two at once.
    """
    from xdist.scheduler import LoadScopeScheduling  # is there if this hook is called

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            together = room(file) == "gpu" or Path(file).name in ("test_faults.py", "test_kills.py")
            return room(file) if together else file

    config.option.loadscopereorder = False  # the order from above
    return ByFile(config, log)
