"""What a SLURM job runs on its first node: Ray on all nodes, then the command as a driver that joins them.

    python -m launch.slurm.job --max-requeues=N --object-store-mib=M pretrain|rl name=value ...

The driver's exit code is the job's. If it asks to be started again (trainer/stopping.py), or Ray's head has died, or the time
limit came before it could, the job goes back into the queue; it then continues the same run folder. One that is cancelled does
not. Only processes of this job are stopped, by their own handles.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress

from launch.slurm.node import address_of
from parallel.addresses import reached_from
from trainer.ports import free_port, listens
from trainer.stopping import REQUEUE, SIGNALS

FAILED = 1  # exit code
ENDING = {"CANCELLED", "COMPLETING", "PENDING"}  # as SLURM calls a job whose processes are told to end
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


def standing() -> dict[str, str]:
    """What SLURM says of this job; nothing if it does not answer."""
    command = ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"], "--oneliner"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return dict(part.split("=", 1) for part in shown.split() if "=" in part)


def is_over_its_limit() -> bool:
    return standing().get("Reason") == "TimeLimit"


def watch(driver: subprocess.Popen[bytes], nodes: subprocess.Popen[bytes], head: str, heard: list[int]) -> int:
    """The driver's exit code; REQUEUE if Ray's head was there and has died, or SLURM ends the job at its limit; FAILED if Ray
    has never been there. The driver is sent what signals are `heard`."""
    was_there, sent = False, 0
    while driver.poll() is None:
        was_there = was_there or listens(head)
        for number in heard[sent:]:
            say(f"{signal.Signals(number).name} came; the driver has it, too")
            driver.send_signal(number)
            sent += 1
        has_ended = nodes.poll() is not None
        if (has_ended or signal.SIGTERM in heard) and is_over_its_limit():
            say("the time limit has come before the step ended; a larger cluster.slurm.stop_before_s leaves time for it")
            return REQUEUE
        if has_ended:
            say(f"Ray has ended on all nodes (srun: {nodes.returncode}); stopping the driver")
            driver.terminate()
            try:
                driver.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                driver.kill()
        time.sleep(LOOK_S)
    if nodes.poll() is not None and not was_there:
        say("Ray has not started, for the reasons above")
        return FAILED
    if driver.returncode != 0 and was_there and not listens(head):
        say(f"Ray's head at {head} has died")
        return REQUEUE
    if -driver.returncode in heard:
        say("that was before the run was under way; a larger cluster.slurm.time_limit may leave time for its start")
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
    found = standing()
    state = found.get("JobState", "UNKNOWN")
    if state in ENDING and found.get("Reason") != "TimeLimit":  # SLURM would queue it again, even if somebody is cancelling it
        say(f"SLURM is ending it ({state}) and decides what becomes of it; if that is nothing, submit it again to go on")
        return
    say(f"back into the queue, {done + 1} of at most {max_requeues} times")
    asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if asked.returncode:
        say(f"SLURM does not queue it: {asked.stderr.strip()}; submit it again to go on")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.job")
    parser.add_argument("--max-requeues", type=int, required=True)
    parser.add_argument("--object-store-mib", type=int, required=True)
    parser.add_argument("command", choices=["pretrain", "rl"])
    parser.add_argument("options", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    heard: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: heard.append(number))
    names = node_names()
    host = reached_from(address_of(names[-1]), address_of(names[0]))
    head = f"{host}:{free_port(host)}"
    # Whoever reaches Ray can run programs as this user; from other hosts that takes this token, which no command line shows.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    say(f"starting Ray on {', '.join(names)}")
    nodes = start_nodes(len(names), head, asked.object_store_mib)
    where = [f"cluster.address={head}", f"cluster.nodes=[{','.join(names)}]"]
    driver = subprocess.Popen([sys.executable, "-u", "-m", f"launch.{asked.command}", *asked.options, *where])
    try:
        code = watch(driver, nodes, head, heard)
        if code == REQUEUE:
            if driver.poll() is not None:  # a step that is still there when its job is requeued holds the nodes for KillWait
                end(nodes)
            requeue(asked.max_requeues)  # else first of all: SLURM may be about to kill this process
            with suppress(subprocess.TimeoutExpired):  # until then the driver, which has the signal, has time
                driver.wait(GRACE_S)
    finally:
        driver.kill()  # where it has not ended, its ranks have; another attempt would find its folder in use
        driver.wait()
        end(nodes)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
