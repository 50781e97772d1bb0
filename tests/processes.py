"""The processes of a run: which is which, by the file that each logs to, and where they listen."""

from __future__ import annotations

from pathlib import Path

import psutil

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def process_of(role: str, ancestor: int | None = None, folder: Path | None = None) -> psutil.Process | None:
    """The process of `role`, such as engine/0, below process `ancestor`, or below this one; None if there is none.

    `folder`: where it logs to, for who may still find processes of the same role that somebody else had.
    """
    name = f"{role.replace('/', '_')}.log"
    for process in psutil.Process(ancestor).children(recursive=True):
        try:
            logs = [path for file in process.open_files() if (path := Path(file.path)).name == name]
            if any(folder is None or path.parent == folder for path in logs):
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):  # it has just ended
            continue
    return None


def listening(pid: int) -> dict[str, set[str]]:
    """Address -> the programs that listen there, of process `pid` and all below it."""
    found: dict[str, set[str]] = {}
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN:
                    found.setdefault(one.laddr.ip, set()).add(f"{process.name()}:{one.laddr.port}")
        except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it has just ended
            continue
    return found


def beyond_loopback(pid: int) -> dict[str, set[str]]:
    """The same of the addresses that other machines may reach; there has to be somebody who listens at all."""
    found = listening(pid)
    assert found, "nobody listens"
    return {address: programs for address, programs in found.items() if address not in LOOPBACK}
