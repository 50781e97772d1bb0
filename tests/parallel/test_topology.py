"""Collectives take the way that leads to rank 0."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from kernels.errors import UserError
from parallel.addresses import reached_from, require_reachable
from parallel.topology import use_interface_to

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.3"])
def test_ranks_of_one_machine_stay_on_loopback(host: str) -> None:
    use_interface_to(host)
    assert {os.environ[name] for name in NAMES} == {"lo"}


def test_an_address_of_this_machine_is_reached_through_its_interface() -> None:
    found = psutil.net_if_addrs().items()
    outside = [(n, a.address) for n, addresses in found for a in addresses if a.family == socket.AF_INET and n != "lo"]
    for name, address in outside:
        for variable in NAMES:
            os.environ.pop(variable, None)
        use_interface_to(address)
        assert os.environ["GLOO_SOCKET_IFNAME"] == name


def test_other_machines_are_not_told_the_address_that_debian_gives_a_machine_in_its_own_eyes() -> None:
    """Its own name is 127.0.1.1 there. Where all of a run is on one machine, that leads to it as well."""
    assert reached_from("127.0.0.2", own="127.0.1.1") == "127.0.1.1"
    assert reached_from("198.51.100.7", own="10.0.0.5") == "10.0.0.5"  # as SLURM has it
    outside = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET]
    for address in outside:
        if not address.startswith("127."):
            assert reached_from(address, own="127.0.1.1") == address


def test_a_node_that_ray_knows_by_an_address_of_each_machine_itself_is_named() -> None:
    require_reachable({"a": "127.0.0.2", "b": "127.0.0.3"})  # one machine
    require_reachable({"a": "10.0.0.1", "b": "10.0.0.2"})
    with pytest.raises(UserError, match=r"Ray knows head at 127\.0\.1\.1, which leads every other .* --node-ip-address="):
        require_reachable({"head": "127.0.1.1", "b": "10.0.0.2"})


def test_what_a_person_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    use_interface_to("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0" and os.environ["NCCL_SOCKET_IFNAME"] == "lo"
