"""Where the processes of a run listen."""

from __future__ import annotations

import psutil

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


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
