"""A real Ray cluster on this machine: a `ray start` for each node, as SLURM jobs do it, at loopback addresses of their own.

Or, of the head, as launch/ray/cluster.yaml does it, with a server for jobs.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml

from launch.slurm.node import ENVIRONMENT, ray_command
from trainer.ports import free_port

OBJECT_STORE_MIB = 80
EXAMPLE = Path(__file__).parents[2] / "launch" / "ray" / "cluster.yaml"


class RayCluster:
    """The first node that is started is the head. Drivers that `monkeypatch`'s environment reaches are let in."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.address = f"127.0.0.3:{free_port('127.0.0.3')}"
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.names: dict[str, str] = {}  # address -> name, of all that were started
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **ENVIRONMENT}
        # Jobs are told to join the cluster that was started last in this folder, which has a short name: it holds sockets.
        self.own = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        environment["RAY_TMPDIR"] = self.own
        environment["RAY_health_check_period_ms"] = "1000"  # a third of Ray's own: a dead node is known in five seconds
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)

    def __enter__(self) -> RayCluster:
        self.folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.nodes):
            self.kill_node(name)
        shutil.rmtree(self.own, ignore_errors=True)

    def start_node(self, name: str, cpus: int, gpu_type: str | None, notice_s: int = 0) -> None:
        """One that says it has such GPUs, and that waits so long for those who leave it when it is to go."""
        address = f"127.0.0.{len(self.names) + 3}"
        resources = {} if gpu_type is None else {f"accelerator_type:{gpu_type}": 1}
        command = ray_command(self.address, name, address, OBJECT_STORE_MIB)
        variables = ["env", f"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={notice_s}"]
        self._start(name, address, [*variables, *command, f"--num-cpus={cpus}", f"--resources={json.dumps(resources)}"])

    def start_example_head(self, name: str) -> str:
        """The head of the example, without CPUs for a run; the address where it takes jobs."""
        host, port = self.address.split(":")
        jobs, agent = (
            free_port("127.0.0.1"),
            free_port(host),
        )  # at its usual port an agent of a cluster that was killed may linger
        (line,) = (line for line in yaml.safe_load(EXAMPLE.read_text())["head_start_ray_commands"] if " start " in line)
        (*variables, _), words = (shlex.split(part) for part in line.split(" start "))
        example = [word for word in words if not word.startswith("--autoscaling-config")]
        # Of an option that is given twice Ray takes the second.
        here = [f"--node-ip-address={host}", f"--port={port}", f"--dashboard-port={jobs}", f"--node-name={name}", "--block"]
        here += [f"--dashboard-agent-listen-port={agent}"]
        here += ["--num-cpus=0", f"--object-store-memory={OBJECT_STORE_MIB * 2**20}", "--log-color=false"]
        self._start(name, host, ["env", *variables, sys.executable, "-m", "ray.scripts.scripts", "start", *example, *here])
        return f"http://127.0.0.1:{jobs}"

    def start_autoscaling_head(self, name: str, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """One whose autoscaler starts nodes of one CPU here, up to so many, when places are asked for and not there."""
        # Its nodes take the machine's own address, and listen there, unless Ray believes that clusters are impossible here.
        monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        self.address = f"127.0.0.1:{free_port('127.0.0.1')}"
        provider = {"type": "fake_multinode", "gcs_address": self.address, "use_node_id_as_ip": True}
        provider |= {"disable_node_updaters": True, "disable_launch_config_check": True}
        kinds: dict[str, dict[str, object]] = {"head": {"resources": {"CPU": 0}, "max_workers": 0}}
        kinds["node"] = {"resources": {"CPU": 1, "object_store_memory": OBJECT_STORE_MIB * 2**20}, "max_workers": nodes}
        config = {"cluster_name": "test", "max_workers": nodes, "provider": provider, "auth": {}, "head_node_type": "head"}
        lists = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands", "rsync_exclude")
        lists += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_filter")
        config |= {"file_mounts": {}, "file_mounts_sync_continuously": False, **{key: [] for key in lists}}
        config |= {"upscaling_speed": 1.0, "idle_timeout_minutes": 5}
        config["available_node_types"] = {kind: {**one, "node_config": {}, "min_workers": 0} for kind, one in kinds.items()}
        file = self.folder / "autoscaler.json"
        file.write_text(json.dumps(config))
        variables = ["env", "RAY_FAKE_CLUSTER=1", "AUTOSCALER_UPDATE_INTERVAL_S=1"]
        command = ray_command(self.address, name, "127.0.0.1", OBJECT_STORE_MIB)
        self._start(name, "127.0.0.1", [*variables, *command, "--num-cpus=0", f"--autoscaling-config={file}"])

    def _start(self, name: str, address: str, command: list[str]) -> None:
        """Waits for it: nodes of one machine that start at once take the same socket."""
        log = self.folder / f"{name}.out"
        self.names[address] = name
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with open(log, "wb") as out:
            self.nodes[name] = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < deadline and self.nodes[name].poll() is None, log.read_text()
            time.sleep(0.1)

    def end_node(self, name: str) -> None:
        """As a machine that is taken back is told: it goes once nothing runs there, after `notice_s` at the latest."""
        self.nodes[name].terminate()

    def kill_node(self, name: str) -> None:
        """As if it lost its power: all that it runs, at once."""
        process = self.nodes.pop(name)
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        for child in family:
            child.kill()
        process.wait()
