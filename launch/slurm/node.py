"""Ray on one node of a SLURM job, until the job ends it: `srun ... python -m launch.slurm.node HEAD:PORT OBJECT_STORE_MIB`.

SLURM announces the end of a job by a SIGTERM: of one that is preempted, and has a GraceTime, to all processes of its steps but
not to the batch script. It would end Ray while the driver, which lives in the script, still wants a checkpoint of the ranks.
So nothing here listens to it, and the script gets a signal that it knows. The job ends this step by SIGKILL.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

from parallel.addresses import reached_from

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # this and the next as in trainer/cluster.py
    "RAY_prestart_worker_first_driver": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # what stops a run has let it write its checkpoint already
}

LOOK_S = 1.0  # between two looks at Ray


def address_of(name: str) -> str:
    """The IP address at which SLURM itself reaches the node `name`, as this machine finds it: its own may lead only here."""
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


def tell_job() -> None:
    """The batch script, launch/slurm/job.py, as SLURM itself does before the time limit (--signal of the script)."""
    job = os.environ["SLURM_JOB_ID"]
    print(f"job {job}: SIGTERM came to its nodes; Ray goes on until the run has stopped", flush=True)
    told = subprocess.run(["scancel", "--batch", "--signal=USR1", job], capture_output=True, text=True, check=False)
    if told.returncode:  # as for one that is cancelled, whose script has had a SIGTERM itself
        print(f"job {job}: {told.stderr.strip()}", flush=True)


def main() -> int:
    head, object_store_mib = sys.argv[1], int(sys.argv[2])
    address = reached_from(head.rpartition(":")[0], address_of(os.environ["SLURMD_NODENAME"]))
    command = ray_command(head, os.environ["SLURMD_NODENAME"], address, object_store_mib)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # here and, inherited, in all of Ray
    ray = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT})
    tells = address == head.rpartition(":")[0]  # one of the nodes is enough
    while ray.poll() is None:
        if signal.sigtimedwait({signal.SIGTERM}, LOOK_S) is not None and tells:
            tell_job()
            tells = False
    return ray.returncode if ray.returncode >= 0 else 128 - ray.returncode


if __name__ == "__main__":
    sys.exit(main())
