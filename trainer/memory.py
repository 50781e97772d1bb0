"""How much memory a run takes, over all its processes on this machine."""

from __future__ import annotations

import psutil


def resident_gib() -> float:
    """Memory of this process and all its descendants in GiB; pages that processes share are counted once (PSS, Linux)."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue  # it ended between the two calls
    return total / 2**30
