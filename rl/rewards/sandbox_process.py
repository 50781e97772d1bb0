"""Isolates a program of the model from the machine; `rl/rewards/sandbox.py` runs this file as a command.

It uses the standard library only. With isolation the tree of processes is

    this command > init, process 1 of a PID namespace > the program

in new user, mount, PID, network and IPC namespaces (namespaces(7), user_namespaces(7)). The program sees an empty network, no
other process, the interpreter and the system's libraries read-only, and one writable folder of limited size in memory. It has
no privilege over these namespaces. Whatever it forks, and however it detaches, ends with init; init ends with this command, and
this command with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

NEW_USER, NEW_MOUNT, NEW_PID, NEW_NETWORK, NEW_IPC = 0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000
NO_SUID, NO_DEVICES, BIND, RECURSIVE, PRIVATE, DETACH = 0x2, 0x4, 0x1000, 0x4000, 0x40000, 0x2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_READ_ONLY = 442, -100, 0x8000, 0x1  # the number is the same on all architectures
PARENT_DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38
PROGRAM_ID = 1000  # user and group of the program, inside
NOBODY = 65534  # who that is outside, when root runs us
GRACE_S = 5.0  # init ends so long after the timeout that its parent has not kept
WORK = "/tmp"
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    if getattr(libc, name)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


def make_read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(ATTR_READ_ONLY, 0, 0, 0)
    call("syscall", ctypes.c_long(MOUNT_SETATTR), AT_FDCWD, path.encode(), flags, attributes, ctypes.c_size_t(32))


def die_with_parent() -> None:
    call("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


# ---------------------------------------------------------------- namespaces


def enter_namespaces() -> None:
    """Moves this process into new namespaces, where it is root if it is root outside, else the program's user."""
    me, as_root = os.getpid(), os.geteuid() == 0
    entered, entering = os.pipe()
    mapped, mapping = os.pipe()
    if os.fork() == 0:  # who we are inside is written from outside
        os.close(entering)
        os.read(entered, 1)
        try:
            write_maps(me, as_root)
        except OSError as error:
            os.write(mapping, f"{error.filename}: {error.strerror}".encode())
        os._exit(0)
    os.close(mapping)
    call("unshare", NEW_USER | NEW_MOUNT | NEW_PID | NEW_NETWORK | NEW_IPC)
    os.close(entering)
    if problem := os.read(mapped, 1000):
        raise OSError(problem.decode())
    os.wait()


def write_maps(process: int, as_root: bool) -> None:
    """Root is itself inside, to find the interpreter in its own folders, and the program is nobody."""
    folder = Path(f"/proc/{process}")
    if not as_root:
        (folder / "setgroups").write_text("deny")
    for kind, outside in (("uid", os.geteuid()), ("gid", os.getegid())):
        lines = f"0 0 1\n{PROGRAM_ID} {NOBODY} 1\n" if as_root else f"{PROGRAM_ID} {outside} 1\n"
        (folder / f"{kind}_map").write_text(lines)


def change_root(shown: list[str], disk_mib: int) -> None:
    """Leaves of the file system what is `shown`, read-only, and an empty folder WORK of `disk_mib`."""
    mount("none", "/", "none", RECURSIVE | PRIVATE)
    # The new root is mounted on a folder that may hold some of what is shown: those are held open by number.
    opened = {path: os.open(path, os.O_PATH) for path in shown if not Path(path).is_symlink()}
    mount("tmpfs", "/tmp", "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    for path in shown:
        place = Path("/tmp" + path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path not in opened:
            place.symlink_to(Path(path).readlink())
            continue
        source = f"/proc/self/fd/{opened[path]}"
        if os.path.isdir(source):  # noqa: PTH112  the number leads there, its name does not
            place.mkdir()
        else:
            place.touch()
        mount(source, str(place), "none", BIND | RECURSIVE)
        make_read_only(str(place), AT_RECURSIVE)
        os.close(opened[path])
    Path("/tmp" + WORK).mkdir(exist_ok=True)
    os.chdir("/tmp")
    call("pivot_root", b".", b".")
    call("umount2", b".", DETACH)
    os.chdir("/")
    mount("tmpfs", WORK, "tmpfs", NO_SUID | NO_DEVICES, f"size={disk_mib}m,mode=1777,nr_inodes=4096")
    make_read_only("/", 0)


def shown_paths(interpreter: list[str]) -> list[str]:
    """What a program needs to run, outer folders before inner ones and without those that an outer one brings along."""
    kept: list[str] = []
    for path in sorted({*SYSTEM, *interpreter}, key=lambda path: path.count("/")):
        inside = any(Path(path).is_relative_to(outer) and not Path(outer).is_symlink() for outer in kept)
        if not inside and (Path(path).exists() or Path(path).is_symlink()):
            kept.append(path)
    return kept


# ---------------------------------------------------------------- the program


def limit(job: dict[str, Any]) -> None:
    mib = 1 << 20
    limits = {
        resource.RLIMIT_CPU: int(job["timeout_s"]) + 1,
        resource.RLIMIT_AS: job["memory_mib"] * mib,
        resource.RLIMIT_FSIZE: job["disk_mib"] * mib,
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def execute(job: dict[str, Any], folder: str) -> None:
    """Becomes the program, which is `folder`/main.py; what is not handed over explicitly is closed."""
    os.chdir(folder)
    limit(job)
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    python = [job["python"], "-B", "-s", "-P", f"{folder}/main.py"]
    os.execve(python[0], python, {**ENVIRONMENT, "HOME": folder, "TMPDIR": folder})


def run_isolated(job: dict[str, Any]) -> int:
    """Runs the program in namespaces and returns its exit code, or 128 + the signal that ended it."""
    enter_namespaces()
    init = os.fork()
    if init:
        return exit_code(os.waitpid(init, 0)[1])
    die_with_parent()
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + signal.SIGALRM))
    signal.setitimer(signal.ITIMER_REAL, job["timeout_s"] + GRACE_S)
    change_root(shown_paths(job["interpreter"]), job["disk_mib"])
    Path(WORK, "main.py").write_text(job["source"], encoding="utf-8", errors="surrogatepass")
    program = os.fork()
    if program == 0:
        os.setsid()
        if os.geteuid() != PROGRAM_ID:
            os.setgroups([])
            os.setresgid(PROGRAM_ID, PROGRAM_ID, PROGRAM_ID)
            os.setresuid(PROGRAM_ID, PROGRAM_ID, PROGRAM_ID)
        execute(job, WORK)  # whose user is not root: no privilege outlives this
    while True:  # as process 1 it also reaps what the program left behind
        process, status = os.wait()
        if process == program:
            os._exit(exit_code(status))


def exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main() -> None:
    with open(int(sys.argv[1]), encoding="utf-8") as file:
        job = json.load(file)
    report = int(sys.argv[2])
    os.set_inheritable(report, False)
    try:
        die_with_parent()
        if not job["isolated"]:
            execute(job, job["folder"])
        sys.exit(run_isolated(job))
    except Exception as error:  # of this process or of one that it forked: what went wrong before the program ran
        os.write(report, f"{type(error).__name__}: {error}".encode())
        os._exit(1)


if __name__ == "__main__":
    main()
