"""Programs that a model wrote, hostile ones among them: what they can reach, and what is left of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from kernels.errors import UserError
from rl.rewards import sandbox
from rl.rewards.sandbox import Isolation, Limits, Outcome, check_isolation, run_program

ISOLATIONS: list[Isolation] = ["namespaces", "none"]
LIMITS = Limits(timeout_s=10.0, memory_mib=512, disk_mib=8, processes=24, output_kib=64)


def possible(isolation: Isolation) -> bool:
    try:
        check_isolation(isolation)
    except UserError:
        return False
    return True


@pytest.fixture(params=ISOLATIONS)
def isolation(request: pytest.FixtureRequest) -> Isolation:
    if not possible(request.param):
        pytest.skip("this machine has no user namespaces for us")
    return request.param  # type: ignore[no-any-return]


def run(source: str, isolation: Isolation = "namespaces", stdin: str = "", timeout_s: float = LIMITS.timeout_s) -> Outcome:
    if not possible(isolation):
        pytest.skip("this machine has no user namespaces for us")
    return run_program(source, stdin, Limits(**{**vars(LIMITS), "timeout_s": timeout_s}), isolation)


# A program that starts with it bears the mark of this test session, and so do all that it forks.
MARK = f"tested-by-{os.getpid()}"
MARKED = f"import os, sys\nif len(sys.argv) == 1: os.execv(sys.executable, [sys.executable, __file__, {MARK!r}])\n"


def swept(within_s: float = 5.0) -> bool:
    """Whether no marked program is left, at most so much later."""
    deadline = time.monotonic() + within_s
    while any(MARK in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_program_reads_its_input_prints_and_ends(isolation: Isolation) -> None:
    program = "import numpy, sys\nprint(sum(map(int, input().split())), numpy.arange(3).sum())\nsys.exit(5)"
    assert run(program, isolation, stdin="1 2 39\n") == Outcome("42 3\n", exit_code=5)


def test_hashes_are_the_same_every_time(isolation: Isolation) -> None:
    assert run("print(hash('order'))", isolation) == run("print(hash('order'))", isolation)


def test_a_program_that_does_not_parse_or_is_no_text_fails_by_itself(isolation: Isolation) -> None:
    assert run("def (", isolation).exit_code == 1
    assert run("x = '\ud800'", isolation).exit_code == 1


def test_an_endless_loop_is_stopped_and_gone(isolation: Isolation) -> None:
    for timeout_s in (0.7, 5.0, 30.0):  # on a busy machine it may not have begun
        outcome = run("print('on', flush=True)\nwhile True: pass", isolation, timeout_s=timeout_s)
        assert outcome.stopped == "timeout"
        if outcome.output:
            break
    assert outcome == Outcome("on\n", exit_code=None, stopped="timeout")


def test_a_program_that_closes_its_output_and_waits_is_stopped(isolation: Isolation) -> None:
    assert run("import os, time\nos.close(1)\ntime.sleep(60)", isolation, timeout_s=0.7).stopped == "timeout"


def test_a_flood_of_output_is_cut(isolation: Isolation) -> None:
    outcome = run("while True: print('x' * 9999)", isolation)
    assert outcome.stopped == "output" and len(outcome.output) == LIMITS.output_kib * 1024


def test_memory_and_files_have_an_end(isolation: Isolation) -> None:
    assert "MemoryError" in run("try: bytearray(1 << 30)\nexcept MemoryError as e: print(repr(e))", isolation).output
    fill = "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    fill += "f = open('big', 'wb')\ntry:\n    while f.write(b'x' * 1000000) and f.tell() < 1 << 25: f.flush()\n"
    fill += "except OSError as e: print(e.strerror)"
    assert run(fill, isolation).output in ("No space left on device\n", "File too large\n")


def test_processes_that_keep_below_the_limit_alone_are_stopped_for_what_they_take_together(isolation: Isolation) -> None:
    program = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        kept = b"x" * (100 << 20)
        time.sleep(1000)
print("started", flush=True)
time.sleep(1000)
"""
    assert run(program, isolation, timeout_s=30.0) == Outcome("started\n", None, "memory")
    assert swept()
    alone = "import time\nkept = b'x' * (300 << 20)\ntime.sleep(0.3)\nprint('ended')"
    assert run(alone, isolation) == Outcome("ended\n", 0), "below the limit"


def test_a_program_sees_only_what_it_needs(tmp_path: Path) -> None:
    folder = str(tmp_path)
    repository = Path(__file__).parents[2]
    program = f"""
import os
for path in ({folder!r}, {str(repository / "rl")!r}, "/proc/self", "/etc/passwd", "/sys", "/home"):
    print(os.path.exists(path))
for path in ("/new", "/usr/new", "/etc/new", {sys.base_prefix + "/new"!r}, "own"):
    try:
        open(path, "w").close()
        print("wrote", path)
    except OSError as error:
        print(error.strerror)
"""
    outcome = run(program)
    assert outcome.output.split() == ["False"] * 6 + ["Read-only", "file", "system"] * 4 + ["wrote", "own"]


def test_there_is_no_network() -> None:
    program = """
import socket
for address in (("127.0.0.1", 9), ("192.0.2.1", 80)):
    try:
        socket.create_connection(address, timeout=2)
    except OSError as error:
        print(error.strerror)
"""
    assert run(program).output == "Network is unreachable\n" * 2


def test_privileges_cannot_be_won_back() -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None)
print(os.getuid(), libc.mount(b"none", b"/usr", b"none", 0x1020, None), libc.umount2(b"/usr", 2))
inside = libc.unshare(0x10020000)  # own namespaces may be made, the walls stay where they are
print(libc.mount(b"none", b"/usr", b"none", 0x1020, None), libc.umount2(b"/usr", 2))
try:
    os.setuid(0)
except OSError as error:
    print(error.strerror)
"""
    assert run(program).output.splitlines()[:2] == ["1000 -1 -1", "-1 -1"]


def test_a_fork_bomb_is_bounded_and_swept_away() -> None:
    program = """
import time
started = 0
try:
    while True:
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
        started += 1
except BlockingIOError:
    print(started)
"""
    assert int(run(MARKED + program).output) < LIMITS.processes
    bomb = "while True:\n    try: os.fork()\n    except OSError: pass"
    assert run(MARKED + bomb, timeout_s=1.0).stopped == "timeout"
    assert swept()


def test_what_detaches_ends_with_the_program() -> None:
    program = MARKED + "import time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n"
    outcome = run(program + "    os._exit(0)\nelse:\n    os.wait()\n    print('done')")
    assert outcome == Outcome("done\n", 0)
    assert swept()


def test_a_program_cannot_end_those_who_watch_it() -> None:
    program = """
import os, signal
for target in (1, os.getppid(), -1, 0):
    for kind in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        if target or kind == signal.SIGTERM:
            if target == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try: os.kill(target, kind)
            except OSError: pass
print("still here")
"""
    assert run(program) == Outcome("still here\n", 0)


def test_a_program_ends_with_who_started_it(isolation: Isolation) -> None:
    code = f"""
from rl.rewards.sandbox import Limits, run_program
run_program("import time; time.sleep(1000)", "", Limits(timeout_s=100), {isolation!r})
"""
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 20
    while not any("main.py" in " ".join(c.cmdline()) for c in psutil.Process(starter.pid).children(recursive=True)):
        assert starter.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    tree = psutil.Process(starter.pid).children(recursive=True)
    starter.kill()
    starter.wait()
    assert not psutil.wait_procs(tree, timeout=5)[1]


def test_no_descriptor_of_ours_reaches_the_program(isolation: Isolation) -> None:
    program = """
import os
found = []
for number in range(100):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
print(found)
"""
    assert run(program, isolation).output == "[0, 1, 2]\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes nobody, to see what those without privileges get")
def test_isolation_needs_no_root() -> None:
    if not possible("namespaces") or not Path("/usr/bin/python3").exists():
        pytest.skip("no user namespaces, or no interpreter that everybody may read")
    job = {
        "source": "import os\nos.kill(os.getppid(), 9)\nprint(os.getuid(), os.listdir('/tmp'))",
        "isolated": True,
        "folder": "",
    }
    job |= {**vars(LIMITS), "python": "/usr/bin/python3", "interpreter": ["/usr"]}
    with tempfile.TemporaryFile() as about, tempfile.TemporaryFile() as report:
        about.write(json.dumps(job).encode())
        about.seek(0)
        command = ["/usr/bin/python3", "-I", "-S", "-c", sandbox.SANDBOX.read_text(), str(about.fileno()), str(report.fileno())]
        found = subprocess.run(
            command, user=65534, group=65534, extra_groups=[], pass_fds=command_fds(command), capture_output=True
        )
        report.seek(0)
        assert (found.stdout, report.read()) == (b"1000 ['main.py']\n", b"")


def command_fds(command: list[str]) -> list[int]:
    return [int(word) for word in command[-2:]]


def test_a_machine_that_allows_no_isolation_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "process.py"
    broken.write_text(sandbox.SANDBOX.read_text().replace('call("unshare", NEW_USER', 'call("unshare", 1 | NEW_USER'))
    monkeypatch.setattr(sandbox, "SANDBOX", broken)
    with pytest.raises(UserError, match=r"cannot be isolated on this machine \(.*unshare: .*\).*task.options.isolation=none"):
        check_isolation("namespaces")
    with pytest.raises(UserError, match="isolation is 'jail'; it is one of: namespaces, none"):
        check_isolation("jail")  # type: ignore[arg-type]
