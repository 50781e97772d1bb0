"""A real SLURM on this machine: munged, slurmctld and a slurmd for each node, started by hand and stopped by their handles."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from trainer.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONF = """\
ClusterName=tessera
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock
CryptoType=crypto/munge
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
MessageTimeout=20
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=200
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=2 RealMemory=2000 State=UNKNOWN"


def require_slurm() -> None:
    """Skips the test where SLURM is not installed, or fails it where TESSERA_NEEDS_SLURM says that it must be."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        reason = f"{', '.join(missing)} not found; apt-get install slurm-wlm munge"
        if "TESSERA_NEEDS_SLURM" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)


class SlurmCluster:
    """Nodes n1, n2, ... at the loopback addresses 127.0.1.2, 127.0.1.3, ..., two CPUs each."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.names = [f"n{index}" for index in range(1, nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        for name in ("munge", "state", *(f"spool.{name}" for name in self.names)):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        nodes = [
            NODE.format(name=name, host=host, address=f"127.0.1.{index + 2}", port=free_port("127.0.0.1"))
            for index, name in enumerate(self.names)
        ]
        fields = {"user": getpass.getuser(), "folder": self.folder, "port": free_port("127.0.0.1"), "nodes": "\n".join(nodes)}
        (self.folder / "slurm.conf").write_text(CONF.format(**fields))
        munge = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._start("munged", "--foreground", "--force", *(f"--{k}={self.folder}/munge/{v}" for k, v in munge.items()))
        self._wait_for(lambda: (self.folder / "munge" / "munge.sock").exists(), "munged")
        self._start("slurmctld", "-D", "-i", "-c")
        for name in self.names:
            self.start_node(name)
        self._wait_for(lambda: self.states() == dict.fromkeys(self.names, "IDLE"), "all nodes idle")
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.started.values()):
            for child in _family(process.pid):
                child.kill()
            process.wait()

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        with open(self.folder / f"{name or program}.out", "ab") as out:
            self.started[name or program] = subprocess.Popen(
                [program, *arguments], env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )

    def start_node(self, name: str) -> None:
        self._start("slurmd", "-D", "-N", name, name=name)

    def kill_node(self, name: str) -> None:
        """As if it lost its power: the daemon and all that it runs, at once."""
        for process in _family(self.started[name].pid) + self.steps_of(name):
            if process.is_running():
                process.kill()
        self.started[name].wait()

    def steps_of(self, name: str) -> list[psutil.Process]:
        """Step daemons of a node leave its slurmd; they and theirs know the node by its name in their environment."""
        return [process for process in psutil.process_iter() if _environment(process).get("SLURMD_NODENAME") == name]

    def states(self) -> dict[str, str]:
        nodes = self.call("scontrol", "show", "node", "--oneliner").splitlines()
        facts = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in nodes]
        return {fact["NodeName"]: fact["State"] for fact in facts}

    def job(self, number: str) -> dict[str, str]:
        text = self.call("scontrol", "show", "job", number, "--oneliner")
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def call(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=30).stdout

    def _wait_for(self, condition, what: str) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not after 30 s; see {self.folder}: {self.states()}"
            time.sleep(0.1)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return {}
