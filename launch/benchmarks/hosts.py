"""Two hosts on one machine, joined by a link of any rate: network namespaces with a veth pair, for benchmarks on a CPU.

Messages over such a link take time and no computing, as between machines; those within a host may be as slow as is asked for.
The hosts have names of their own, so ranks see on which node they are. Needs root, and Linux with iproute2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernels.errors import UserError

HOSTS = 2
NETWORK, NAMES = 0x40000000, 0x04000000  # CLONE_NEWNET and CLONE_NEWUTS, of Linux


@contextmanager
def hosts(mbit: int | None, within_mbit: int | None = None) -> Iterator[list[str]]:
    """Names of two hosts whose link carries so many Mbit/s in each direction; they are gone afterwards. None are none.

    `within_mbit`: what all ranks of a host send each other.
    """
    if mbit is None:
        yield []
        return
    if shutil.which("ip") is None or shutil.which("tc") is None or os.geteuid() != 0:
        raise UserError("link_mbit joins two hosts by network namespaces, which needs root and the commands ip and tc")
    names = [f"tessera{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        # names of interfaces have at most 15 characters
        ends = [f"tv{os.getpid()}{side}" for side in "ab"]
        _run("ip", "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", end)
            for device in ("lo", end):
                _run("ip", "-n", name, "link", "set", device, "up")
            _shape(name, end, mbit)
            if within_mbit is not None:
                _shape(name, "lo", within_mbit)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _shape(host: str, device: str, mbit: int) -> None:
    shaped = ("tbf", "rate", f"{mbit}mbit", "burst", "128kb", "latency", "50ms")  # a packet of loopback has 64 KiB and a header
    _run("ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", device, "root", *shaped)


def move_to(host: str) -> None:
    """This process, which has opened no connection yet, is on `host` from here on and sends over its links."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NAMES) != 0:
        raise OSError(ctypes.get_errno(), f"the name of {host} cannot be taken")
    socket.sethostname(host)
    with Path(f"/var/run/netns/{host}").open() as file:
        if libc.setns(file.fileno(), NETWORK) != 0:
            raise OSError(ctypes.get_errno(), f"the network of {host} cannot be entered")
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("tv"))


def _run(*command: str) -> None:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise UserError(f"{' '.join(command)} failed: {found.stderr.strip()}")
