"""Which address of this machine others reach.

Not the one that its own name has here: Debian's /etc/hosts maps that to 127.0.1.1, which on any other machine is that machine.
"""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def address_towards(host: str) -> str:
    """This machine's address on the way to `host`, from which that one is answered. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # any port: only the way is looked up
        return str(probe.getsockname()[0])


def reached_from(host: str, own: str) -> str:
    """`own`, an address of this machine, unless it leads only here and `host` is elsewhere: then the one on the way there."""
    return address_towards(host) if is_loopback(own) and not is_loopback(host) else own
