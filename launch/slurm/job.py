"""What a SLURM job runs on its first node: Ray on all nodes, then the command as a driver that joins them.

    python -m launch.slurm.job --max-requeues=N --object-store-mib=M pretrain|rl name=value ...

The driver's exit code is the job's. If it asks to be started again (trainer/stopping.py), or Ray's head has died, the job goes
back into the queue; it then continues the same run folder. Only processes of this job are stopped, by their own handles.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time

from launch.slurm.node import address_of
from trainer.ports import free_port, listens
from trainer.stopping import REQUEUE, SIGNALS

LOOK_S = 1.0  # between two looks at the processes
GRACE_S = 60.0  # that a driver without Ray has for its last words
END_S = 20.0  # that Ray has to end


def say(text: str) -> None:
    print(f"job {os.environ['SLURM_JOB_ID']}: {text}", flush=True)


def node_names() -> list[str]:
    """The nodes of this job; the first one is this machine."""
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def start_nodes(count: int, head: str, object_store_mib: int) -> subprocess.Popen[bytes]:
    """Ray on every node, as one job step. A node that is lost does not take the others along: the driver decides."""
    step = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--cpu-bind=none"]
    step += ["--kill-on-bad-exit=0", "--wait=0", "--export=ALL"]
    return subprocess.Popen([*step, sys.executable, "-m", "launch.slurm.node", head, str(object_store_mib)])


def watch(driver: subprocess.Popen[bytes], nodes: subprocess.Popen[bytes], head: str) -> int:
    """The driver's exit code, or REQUEUE if Ray's head was there and has died."""
    was_there = False
    while driver.poll() is None:
        was_there = was_there or listens(head)
        if nodes.poll() is not None:
            say(f"Ray has ended on all nodes (srun: {nodes.returncode}); stopping the driver")
            driver.terminate()
            try:
                driver.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                driver.kill()
        time.sleep(LOOK_S)
    if driver.returncode != 0 and was_there and not listens(head):
        say(f"Ray's head at {head} has died")
        return REQUEUE
    return driver.returncode


def end(nodes: subprocess.Popen[bytes]) -> None:
    """Ends the job step; SLURM ends what is left of it with the job."""
    nodes.terminate()
    try:
        nodes.wait(END_S)
    except subprocess.TimeoutExpired:
        nodes.kill()


def requeue(max_requeues: int) -> None:
    job, done = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if done >= max_requeues:
        say(f"cluster.slurm.max_requeues={max_requeues} is used up; submit it again to go on")
        return
    say(f"back into the queue, {done + 1} of at most {max_requeues} times")
    subprocess.run(["scontrol", "requeue", job], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.job")
    parser.add_argument("--max-requeues", type=int, required=True)
    parser.add_argument("--object-store-mib", type=int, required=True)
    parser.add_argument("command", choices=["pretrain", "rl"])
    parser.add_argument("options", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    names = node_names()
    host = address_of(names[0])
    head = f"{host}:{free_port(host)}"
    # Whoever reaches Ray can run programs as this user; from other hosts that takes this token, which no command line shows.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    say(f"starting Ray on {', '.join(names)}")
    nodes = start_nodes(len(names), head, asked.object_store_mib)
    where = [f"cluster.address={head}", f"cluster.nodes=[{','.join(names)}]"]
    driver = subprocess.Popen([sys.executable, "-u", "-m", f"launch.{asked.command}", *asked.options, *where])
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: driver.send_signal(number))
    try:
        code = watch(driver, nodes, head)
    finally:
        end(nodes)
    if code == REQUEUE:
        requeue(asked.max_requeues)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
