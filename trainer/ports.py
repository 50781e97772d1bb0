"""Ports and addresses on which the processes of a run listen."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)  # outside what Ray gives its workers and what Linux gives away by itself


def listens(address: str, timeout_s: float = 1.0) -> bool:
    """Whether somebody answers at host:port, or [host]:port, in that time."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def why_taken(host: str, port: int) -> str | None:
    """Why this process cannot listen there; None if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None


def free_port(host: str) -> int:
    """A port of `host`, an address of this machine, where nobody listens now."""
    return next(port for port in random.sample(PORTS, len(PORTS)) if why_taken(host, port) is None)
