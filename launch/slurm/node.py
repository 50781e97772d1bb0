"""Ray on one node of a SLURM job, until the job ends it: `srun ... python -m launch.slurm.node HEAD:PORT OBJECT_STORE_MIB`."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # this and the next as in trainer/cluster.py
    "RAY_prestart_worker_first_driver": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # what stops a run has let it write its checkpoint already
}


def address_of(name: str) -> str:
    """The IP address at which SLURM itself reaches the node `name`."""
    shown = subprocess.run(["scontrol", "show", "node", name, "--oneliner"], capture_output=True, text=True, check=True)
    found = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
    assert found is not None, f"scontrol shows no NodeAddr of {name}: {shown.stdout}"
    return socket.gethostbyname(found[1])


def ray_command(head: str, name: str, address: str, object_store_mib: int) -> list[str]:
    """`ray start` for this node; the one with the head's address starts the cluster, the others join it."""
    host, _, port = head.rpartition(":")
    place = ["--head", f"--port={port}", "--include-dashboard=false"] if address == host else [f"--address={head}"]
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--log-color=false", *place),
        *(f"--node-name={name}", f"--node-ip-address={address}"),
        *(f"--object-store-memory={object_store_mib * 2**20}", "--disable-usage-stats"),
    ]


def main() -> None:
    head, object_store_mib = sys.argv[1], int(sys.argv[2])
    name = os.environ["SLURMD_NODENAME"]
    command = ray_command(head, name, address_of(name), object_store_mib)
    os.execve(command[0], command, {**os.environ, **ENVIRONMENT})


if __name__ == "__main__":
    main()
