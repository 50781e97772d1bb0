"""Two hosts on one machine: ranks in networks of their own, that reach each other, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from kernels.errors import UserError
from launch.benchmarks.hosts import hosts
from launch.benchmarks.ranks import on_ranks
from parallel.placement import Topology
from parallel.topology import World
from tests.end_to_end.commands import WAIT_S, start


def able() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    probe = f"tessera_probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return made


def networks(world: World, options: None, cases: None) -> list[str]:
    told: list[str] = [""] * world.size
    dist.all_gather_object(told, str(Path("/proc/thread-self/ns/net").readlink()))
    total = world.sum(torch.full((100_000,), world.rank + 1))
    assert total.unique().tolist() == [10] and world.topology == Topology(4, 2), "ranks see on which host they are"
    return told


needs_hosts = pytest.mark.skipif(not able(), reason="needs root and network namespaces")


@needs_hosts
def test_ranks_have_networks_of_their_own_that_are_gone_afterwards() -> None:
    with hosts(1000, within_mbit=2000) as names:
        assert all(Path(f"/var/run/netns/{name}").exists() for name in names)
        one, near, other, far = on_ranks(networks, 4, None, None, "cpu", names)
        assert one == near and other == far and len({one, other, str(Path("/proc/self/ns/net").readlink())}) == 3
    assert not any(Path(f"/var/run/netns/{name}").exists() for name in names)
    with hosts(None) as names:
        assert names == []


@pytest.mark.parametrize("link", [[], pytest.param(["link_mbit=700"], marks=[needs_hosts])])
def test_a_benchmark_that_is_ended_by_sigterm_leaves_no_rank_and_no_host(link: list[str], tmp_path: Path) -> None:
    """As `timeout` ends it; only the command itself has the signal."""
    command = [*("schedule", "repeats=1000000", "rank_tokens=64", "around=nothing", *link), f"out={tmp_path}/bench.json"]
    benchmark = start("bench", *command)
    deadline, ranks = time.monotonic() + WAIT_S, list[psutil.Process]()
    while len(ranks) < 2:
        assert benchmark.poll() is None and time.monotonic() < deadline, "two ranks do not begin"
        time.sleep(0.05)
        servers = psutil.Process(benchmark.pid).children()
        ranks = [one for one in psutil.Process(benchmark.pid).children(recursive=True) if one not in servers]
    assert len(list(Path("/var/run/netns").glob(f"tessera{benchmark.pid}?"))) == (2 if link else 0)
    benchmark.terminate()
    said, _ = benchmark.communicate(timeout=WAIT_S)
    assert benchmark.returncode == 143 and "stopped by SIGTERM" in said and "Traceback" not in said, said
    assert not psutil.wait_procs(ranks, timeout=5)[1], "ranks go on"
    assert not list(Path("/var/run/netns").glob(f"tessera{benchmark.pid}?"))


def test_who_may_not_make_hosts_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match=r"link_mbit .* needs root"), hosts(100):
        pass
