"""The training world: which ranks there are, and how they find each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.addresses import address_towards, is_loopback
from parallel.placement import Topology
from parallel.stopwatch import Stopwatch


@dataclass(frozen=True)
class World:
    """One rank's view of the training world. Collectives run over its default group, except for slices of dense gradients and
    for tokens over two levels."""

    rank: int
    size: int
    device: torch.device
    ranks_per_node: int  # consecutive ranks share a node
    timeout_s: float = 1800.0  # of a collective
    exposed: Stopwatch = field(init=False, repr=False, compare=False)  # of communication that computation waits for

    def __post_init__(self) -> None:
        object.__setattr__(self, "exposed", Stopwatch(self.device))

    @property
    def topology(self) -> Topology:
        return Topology(self.size, self.ranks_per_node)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place; the same bits on every rank."""
        if self.size > 1:
            with self.exposed:
                dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def across_and_inside(topology: Topology) -> tuple[list[range], list[range]]:
    """(the ranks at each place of a node, one of every node; the ranks of each node)."""
    size = topology.devices_per_node
    across = [range(place, topology.devices, size) for place in range(size)]
    return across, [range(node * size, (node + 1) * size) for node in range(topology.nodes)]


def own_group(world: World, groups: Sequence[range]) -> dist.ProcessGroup:
    """This rank's among groups of ranks that are all new. Collective: all ranks make all of them, in the same order.

    What two groups carry may be under way on a GPU at the same time. That is safe as long as all ranks start it in one order,
    which is that of the program: whatever waits for its peers is found on every rank before what was started after it, and
    kernels that compute come to an end, so no two ranks wait for each other in different groups.
    """
    timeout = timedelta(seconds=world.timeout_s)
    made = [dist.new_group(list(ranks), timeout=timeout) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if world.rank in ranks)


def serve_store(host: str, timeout_s: float) -> dist.TCPStore:
    """The store where ranks meet, served by rank 0 on a free port of `host` and on no other interface."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen()
    port = listener.getsockname()[1]
    # The store owns the descriptor from here on; handing over a bound socket also leaves no moment in which another
    # process could take the port.
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def use_interface_to(host: str) -> None:
    """Collectives of this process take the network interface that leads to `host`, unless the environment names another."""
    address = address_towards(host)
    loopback = is_loopback(address)  # lo answers to many addresses and lists one
    name = next(
        name
        for name, found in psutil.net_if_addrs().items()
        for one in found
        if one.family == socket.AF_INET and (one.address == address or (loopback and one.address.startswith("127.")))
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def join(store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> World:
    """Forms the default process group: NCCL for GPUs, gloo for CPUs. Blocks until all `size` ranks have joined."""
    # DeepSpeed reads its place in the world from the environment, whatever group exists.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(device.index or 0))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if on_gpu else None,
    )
    return World(rank, size, device, _ranks_per_node(size), timeout_s)


def _ranks_per_node(size: int) -> int:
    """How many consecutive ranks share each host; 1 where hosts have unequally many or their ranks are not consecutive."""
    hosts: list[str] = [""] * size
    dist.all_gather_object(hosts, socket.gethostname())
    first = hosts.count(hosts[0])
    regular = size % first == 0 and all(len({*hosts[i : i + first]}) == 1 for i in range(0, size, first))
    return first if regular and len({*hosts}) == size // first else 1


def leave(world: World) -> None:
    """Dissolves the group; all ranks call it together."""
    world.barrier()
    dist.destroy_process_group()
