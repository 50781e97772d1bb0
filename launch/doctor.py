"""Checks this machine before a run: `python -m launch.doctor [name=value ...]`, with the options of launch.pretrain.

Prints a line for each thing that a run needs: what was found, and what to do about it. Collectives, Ray and DeepSpeed are
really started. The exit code is 1 if something is missing that such a run cannot do without.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

from kernels.errors import UserError
from kernels.limits import require_hopper
from launch.benchmarks.ranks import on_ranks
from launch.cli import guarded, load
from parallel.offload import check_offload
from parallel.topology import World
from trainer.cluster import choose_ranks, start_ray
from trainer.config.run import ClusterConfig, LoggerConfig, PretrainConfig
from trainer.run_dir import REPOSITORY, shown
from trainer.state import choose_dtype

State = Literal["ok", "warn", "fail"]
COLOURS: dict[State, str] = {"ok": "green", "warn": "yellow", "fail": "red"}
GIB = 2**30
DISK_GIB = 10  # less is soon full of checkpoints
PROBE_MIB = 64  # written to see how fast the disk is
DISK_MIB_PER_S = 50
SHM_BESIDE_RAY_GIB = 1  # that NCCL and torch take there
MAX_PROBED_GPUS = 8


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    found: str
    fix: str = ""  # what to do; empty when all is well


# ---------------------------------------------------------------- what is installed


def check_python(project: dict[str, Any]) -> Check:
    """`project`: that table of pyproject.toml."""
    found, asked = sys.version.split()[0], SpecifierSet(project["requires-python"])
    if not asked.contains(found, prereleases=True):
        return Check("Python", "fail", found, f"make a virtual environment with Python {asked}")
    return Check("Python", "ok", found)


def check_packages(project: dict[str, Any]) -> Check:
    """What `project` asks for is here, in the versions that it allows."""
    wrong = []
    for asked in map(Requirement, project["dependencies"]):
        try:
            version = importlib.metadata.version(asked.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{asked.name} is missing")
            continue
        if not asked.specifier.contains(version, prereleases=True):
            wrong.append(f"{asked.name} {version}, not {asked.specifier}")
    if wrong:
        return Check("packages", "fail", "; ".join(wrong), "make setup, or pip install --constraint constraints.txt -e .")
    return Check("packages", "ok", f"all {len(project['dependencies'])} that pyproject.toml asks for")


def check_torch(driver_there: bool) -> Check:
    """`driver_there`: the operating system shows an NVIDIA GPU."""
    build = f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'}"
    if driver_there and not torch.cuda.is_available():
        way_out = (
            "install torch with CUDA" if torch.version.cuda is None else "update the driver, or look at CUDA_VISIBLE_DEVICES"
        )
        return Check("torch", "fail", f"{build}; it sees none of the GPUs here", way_out)
    return Check("torch", "ok", build)


def check_triton(on_gpu: bool, dtype: str) -> Check:
    """GPUs run Triton kernels; those of bfloat16 are written for one release."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        if on_gpu:
            return Check("Triton", "fail", "missing", "pip install the Triton that this torch asks for")
        return Check("Triton", "ok", "none; CPUs do not use it")
    if on_gpu and not version.startswith("3.6."):
        state: State = "fail" if dtype == "bfloat16" else "warn"
        return Check(
            "Triton", state, f"{version}; the bfloat16 kernels need 3.6", "torch 2.11 brings it, or train.dtype=float32"
        )
    return Check("Triton", "ok", version if on_gpu else f"{version}; CPUs do not use it")


def check_deepspeed(offload: str, nvme_dir: Path | None) -> Check:
    """Imports it, and compiles what the run would."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # as ranks do
    import deepspeed  # here, because it takes a second

    check_offload(offload, nvme_dir)
    return Check(
        "DeepSpeed", "ok", deepspeed.__version__ + f", with what parallel.offload={offload} needs" * (offload != "none")
    )


def check_operators() -> Check:
    """Whether what parallel.offload=cpu and nvme compile at their first use can be compiled here; nothing is."""
    from deepspeed.ops.op_builder import AsyncIOBuilder  # here, because it takes a second

    compiler = get_cxx_compiler()
    missing = [*([compiler] if shutil.which(compiler) is None else []), *([] if is_ninja_available() else ["ninja"])]
    if missing:
        found = f"{' and '.join(missing)} not on the PATH; parallel.offload=cpu and nvme need it"
        return Check("operators", "warn", found, "apt-get install g++ ninja-build, or do without offload")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        return Check("operators", "warn", "no libaio; parallel.offload=nvme needs it", "apt-get install libaio-dev")
    return Check("operators", "ok", "DeepSpeed's AdamW for CPUs and its asynchronous I/O can be compiled")


# ---------------------------------------------------------------- devices and how they meet


def check_gpus(dtype: str) -> Check:
    count = torch.cuda.device_count()
    if not count:
        return Check("GPUs", "ok", "none; runs take the CPU")
    name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    free, total = torch.cuda.mem_get_info(0)
    found = f"{count} x {name}, capability {capability[0]}.{capability[1]}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
    try:
        require_hopper(torch.device("cuda", 0), "the bfloat16")
    except UserError as error:
        return Check("GPUs", "fail" if dtype == "bfloat16" else "warn", f"{found}; {error}", "train.dtype=float32")
    if free < total / 2:
        return Check("GPUs", "warn", found, "another program uses GPU 0; nvidia-smi names it")
    return Check("GPUs", "ok", found)


def check_links(topology: str) -> Check:
    """How the GPUs of this machine reach each other; `topology` is what `nvidia-smi topo -m` prints."""
    count = torch.cuda.device_count()
    if count < 2:
        return Check("links", "ok", f"{count} GPU{'s' * (count != 1)}, none needed")
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    without = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if without:
        first = f"GPU {without[0][0]} and GPU {without[0][1]}"
        found = f"{len(without) // 2} of {len(pairs) // 2} pairs have no peer access, such as {first}"
        return Check("links", "warn", found, "turn off PCIe access control, or expect slow copies")
    links = nvlinks(topology)
    return Check("links", "ok", f"peer access everywhere, {f'{links} NVLinks a pair' if links else 'over PCIe'}")


def nvlinks(topology: str) -> int:
    """The fewest NVLinks between two GPUs that a table of `nvidia-smi topo -m` shows; 0 if a pair has none."""
    rows = [line.split() for line in topology.splitlines() if re.match(r"GPU\d+\s", line)]
    cells = [cell for row in rows for cell in row[1 : 1 + len(rows)] if cell != "X"]
    return min((int(cell[2:]) if re.fullmatch(r"NV\d+", cell) else 0 for cell in cells), default=0)


def check_collectives(kind: Literal["cuda", "cpu"], ranks: int) -> Check:
    """A round trip between processes that are started for it: sums, and rows from everybody to everybody."""
    backend = "NCCL" if kind == "cuda" else "gloo"
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    started = time.perf_counter()
    seconds = on_ranks(_round_trip, ranks, None, None, kind)
    found = (
        f"{ranks} rank{'s' * (ranks != 1)}, {seconds * 1e3:.1f} ms a round trip, {time.perf_counter() - started:.0f} s to meet"
    )
    return Check(backend, "ok", found)


def _round_trip(world: World, _options: None, _cases: None) -> float:
    """Seconds of an all-reduce and an all-to-all, after checking what they brought."""
    for _ in range(2):  # the first one connects
        started = time.perf_counter()
        total = world.sum(torch.full((1024,), float(world.rank + 1), device=world.device))
        sent = torch.arange(world.size, device=world.device) + 100 * world.rank
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        expected = torch.arange(world.size, device=world.device) * 100 + world.rank
        if float(total[0]) != world.size * (world.size + 1) / 2 or not torch.equal(received, expected):
            raise RuntimeError(f"wrong values arrived on rank {world.rank}: sum {float(total[0])}, rows {received.tolist()}")
    return time.perf_counter() - started


def check_ray(cluster: ClusterConfig, ranks: int) -> Check:
    """Starts or joins Ray as a run would, and calls a process there."""
    started = time.perf_counter()
    start_ray(cluster, ranks, lambda text: None)
    try:
        host = ray.get(ray.remote(_where).options(num_cpus=0.01).remote(), timeout=cluster.start_timeout_s)
        resources, nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    finally:
        ray.shutdown()
    gpus = int(resources.get("GPU", 0))
    found = f"{ray.__version__}, {nodes} node{'s' * (nodes != 1)}, {gpus} GPUs; answered from {host}"
    if cluster.address is not None and 0 < gpus < ranks:
        return Check("Ray", "fail", found, f"cluster.ranks={ranks} needs as many GPUs: add machines or lower it")
    return Check("Ray", "ok", f"{found} in {time.perf_counter() - started:.0f} s")


def _where() -> str:
    return str(ray.util.get_node_ip_address())


# ---------------------------------------------------------------- where a run writes


def check_disk(runs_dir: Path) -> Check:
    """Free space and speed of the disk that runs are written to; the probe is removed again."""
    folder = next(p for p in (runs_dir.absolute(), *runs_dir.absolute().parents) if p.is_dir())
    data = os.urandom(2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as out:
            started = time.perf_counter()
            for _ in range(PROBE_MIB):
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
            speed = PROBE_MIB / (time.perf_counter() - started)
    except OSError as error:
        return Check("disk", "fail", f"{shown(folder)} cannot be written: {error.strerror}", "runs_dir=... on another disk")
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.0f} GiB free for {shown(runs_dir)}, {speed:.0f} MiB/s"
    if free < DISK_GIB:
        return Check("disk", "warn", found, "make room, or runs_dir=... on another disk; checkpoints are large")
    if speed < DISK_MIB_PER_S:
        return Check("disk", "warn", found, "a slow disk: raise train.checkpoint_every, or runs_dir=... on another")
    return Check("disk", "ok", found)


def check_shared_memory(folder: Path, object_store_mib: int) -> Check:
    """Ray's object store lies in /dev/shm, and so do buffers of NCCL and torch."""
    if not folder.is_dir():
        return Check("shared memory", "warn", f"there is no {folder}", "Ray then uses /tmp, which is slower")
    free = shutil.disk_usage(folder).free / GIB
    needed = object_store_mib / 1024 + SHM_BESIDE_RAY_GIB
    found = f"{free:.1f} GiB free in {folder}, {needed:.1f} GiB wanted"
    if free < needed:
        return Check("shared memory", "warn", found, "a container gets more with --shm-size; or lower cluster.object_store_mib")
    return Check("shared memory", "ok", found)


def check_tracking(logger: LoggerConfig, environment: Mapping[str, str]) -> Check:
    """How W&B would be used; the key itself is never shown."""
    there = bool(environment.get("WANDB_API_KEY"))
    key = f"WANDB_API_KEY is {'set' if there else 'not set'}"
    if logger.wandb == "online" and not there:
        return Check(
            "W&B", "warn", f"online, {key}", "set WANDB_API_KEY or log in (`wandb login`), or runs are tracked offline"
        )
    mode = ("online" if there else "offline") if logger.wandb == "auto" else logger.wandb
    return Check("W&B", "ok", f"{mode}; {key}")


# ---------------------------------------------------------------- all of it


def attempted(name: str, fix: str, check: Callable[..., Check], *arguments: Any) -> Check:
    """The check, or what it failed with: whatever a library raises here is the finding."""
    try:
        return check(*arguments)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Check(name, "fail", f"{type(error).__name__}: {lines[-1] if lines else 'no message'}", fix)


def examine(config: PretrainConfig) -> Iterator[Check]:
    """Every check, the quick ones first."""
    on_gpu, count = torch.cuda.is_available(), torch.cuda.device_count()
    dtype, _ = choose_dtype(config.train.dtype)
    ranks = choose_ranks(config.cluster)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield check_python(project)
    yield check_packages(project)
    yield check_torch(driver_there=bool(_nvidia_smi("-L")))
    yield check_gpus(dtype)
    yield check_links(_nvidia_smi("topo", "-m") if count > 1 else "")
    yield check_triton(on_gpu, dtype)
    yield check_disk(config.runs_dir)
    yield check_shared_memory(Path("/dev/shm"), config.cluster.object_store_mib)
    yield check_tracking(config.logger, os.environ)
    offload, nvme_dir = config.parallel.offload, config.parallel.nvme_dir
    yield attempted("DeepSpeed", "reinstall it; parallel.offload also needs g++", check_deepspeed, offload, nvme_dir)
    yield attempted("operators", "reinstall DeepSpeed", check_operators)
    yield attempted(
        "gloo", "let processes of this machine talk over loopback (firewall, container)", check_collectives, "cpu", 2
    )
    if on_gpu:
        fix = "run again with NCCL_DEBUG=INFO; look at the driver, at /dev/shm and at peer access"
        yield attempted("NCCL", fix, check_collectives, "cuda", min(count, MAX_PROBED_GPUS))
    fix = "free memory and /dev/shm; let processes of this machine talk over loopback (firewall, container)"
    yield attempted("Ray", fix, check_ray, config.cluster, ranks)


def _nvidia_smi(*arguments: str) -> str:
    """What it prints; nothing where there is none, or no driver."""
    if shutil.which("nvidia-smi") is None:
        return ""
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False).stdout


def as_table(checks: list[Check]) -> Table:
    table = Table("", "", "found", "what to do")
    for check in checks:
        table.add_row(check.name, f"[{COLOURS[check.state]}]{check.state}[/]", check.found, check.fix)
    return table


def doctor(arguments: list[str]) -> int:
    """Prints the table; returns how many checks failed."""
    checks, console = [], Console()
    with console.status("looking"):
        for check in examine(load(PretrainConfig, "pretrain", arguments)):
            checks.append(check)
    console.print(as_table(checks))
    return sum(check.state == "fail" for check in checks)


def main() -> int:
    failures: list[int] = []
    code = guarded(lambda: failures.append(doctor(sys.argv[1:])))
    return code or int(any(failures))


if __name__ == "__main__":
    sys.exit(main())
