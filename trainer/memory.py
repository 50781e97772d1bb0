"""Memory of a run, over all its processes on this machine; and objects that the garbage collector may skip."""

from __future__ import annotations

import gc

import psutil

from trainer import THRESHOLD


def keep_imports() -> None:
    """What has been imported stays: the garbage collector, which the package holds back until here, never looks at it again.

    When all is imported: a full collection otherwise takes 0.3 s, in the middle of a step and at the exit. A second call in a
    process keeps nothing more, since it may have made what is to go.
    """
    if gc.get_freeze_count() == 0:
        gc.freeze()
    gc.set_threshold(*THRESHOLD)


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
