"""The address under which others reach this machine.

That is not the address of its own name: Debian's /etc/hosts maps that to 127.0.1.1, which on any other machine means itself.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

from kernels.errors import UserError


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


def require_reachable(addresses: Mapping[str, str]) -> None:
    """Raises UserError unless nodes, by name, reach each other at these addresses, which Ray has of them.

    One that leads only here does so on every machine; where all are of that kind they are one machine.
    """
    alone = sorted(name for name, address in addresses.items() if is_loopback(address))
    if 0 < len(alone) < len(addresses):
        told = ", ".join(f"{name} at {addresses[name]}" for name in alone)
        raise UserError(
            f"Ray knows {told}, which leads every other machine to itself; the names in /etc/hosts may say so. Start Ray there "
            "again with --node-ip-address=ADDRESS, its address in the network of the nodes"
        )
