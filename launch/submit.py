"""Submits a run to SLURM: `python -m launch.submit pretrain|rl cluster=slurm [name=value ...]`; dry_run=true shows the script.

Options are those of launch.pretrain and launch.rl; cluster.slurm says what to ask SLURM for. The script is made from
launch/slurm/<command>.sbatch and kept, with the log of the job, in the folder `slurm` beside the runs.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from string import Template

from kernels.errors import UserError
from launch import pretrain, rl
from launch.cli import guarded, load, usage
from trainer.cluster import choose_ranks
from trainer.config.rl import RLConfig
from trainer.config.run import PretrainConfig, RunConfig
from trainer.run_dir import continued, shown, write_atomically
from trainer.starting_point import own_checkpoint

TEMPLATES = Path(__file__).parent / "slurm"
COMMANDS: dict[str, type[RunConfig]] = {"pretrain": PretrainConfig, "rl": RLConfig}


def submit(command: str, options: Sequence[str]) -> str | None:
    """Renders and submits the script; returns SLURM's number of the job, or None after a dry run."""
    config = load(COMMANDS[command], command, options)
    # Fixed here, so that every attempt of the job finds the same folder.
    name = config.run_name or f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
    script = job_script(command, name, config, options)
    check_run(config.model_copy(update={"run_name": name, "resume": "auto"}))
    if config.dry_run:
        print(script)
        print("dry run: nothing was submitted")
        return None
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on the PATH; run this where SLURM is, or look at the script with dry_run=true")
    folder = config.runs_dir.absolute() / "slurm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.sbatch", script)
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be written: {error.strerror}; put runs elsewhere with runs_dir=...") from None
    sent = subprocess.run(["sbatch", "--parsable", folder / f"{name}.sbatch"], capture_output=True, text=True, check=False)
    if sent.returncode:
        raise UserError(f"SLURM refuses the job: {sent.stderr.strip()}. The script is {shown(folder / f'{name}.sbatch')}")
    job = sent.stdout.strip().partition(";")[0]
    print(f"job {job} is in the queue; its log will be {shown(folder / f'{name}.log')}, its run {shown(folder.parent / name)}")
    return job


def check_run(config: RunConfig) -> None:
    """Raises UserError for what the job would end at as soon as it begins, after its time in the queue.

    A checkpoint that is not there yet may be what another job makes: that is said, and nothing that depends on it is checked.
    """
    assert isinstance(config, PretrainConfig | RLConfig)
    kind = "pretrain" if isinstance(config, PretrainConfig) else "rl"
    if config.checkpoint is not None and not config.checkpoint.exists() and own_checkpoint(config, kind) is None:
        print(f"checkpoint={config.checkpoint} is not there; the job ends at once unless it is when the job begins")
    elif isinstance(config, PretrainConfig):
        continued(pretrain.settle(config)[0], "pretrain")
    else:
        continued(rl.settle(config)[0], "rl")


def job_script(command: str, name: str, config: RunConfig, options: Sequence[str]) -> str:
    """The script of the job.

    Raises:
        UserError: another cluster, ranks that do not divide evenly over the nodes, or more of them than GPUs.
    """
    slurm = config.cluster.slurm
    if slurm is None:
        raise UserError("launch.submit is for cluster=slurm; other clusters need no job, start launch.pretrain or launch.rl")
    choose_ranks(config.cluster, config.rollout.engines_apart if isinstance(config, RLConfig) else 0)
    runs = config.runs_dir.absolute()
    log = str(runs / "slurm" / f"{name}.log")
    if strange := sorted({sign for sign in log if sign in '"\\%' or not sign.isprintable()}):
        raise UserError(
            f"SLURM takes {' and '.join(map(repr, strange))} in {log!r} as its own fields; choose another runs_dir or run_name"
        )
    asked = {"--gpus-per-node": slurm.gpus_per_node, "--partition": slurm.partition, "--account": slurm.account}
    lines = [f"{option}={value}" for option, value in asked.items() if value] + list(slurm.sbatch)
    own = [option for option in options if not option.startswith("dry_run=")]
    fields = {
        "name": name,
        "nodes": slurm.nodes,
        "time_limit": slurm.time_limit,
        "log": log,
        "stop_before_s": slurm.stop_before_s,
        "sbatch": "\n".join(f"#SBATCH {line}" for line in lines),
        "folder": shlex.quote(str(Path.cwd())),
        "shell": "\n".join(slurm.shell),
        "python": shlex.quote(sys.executable),
        "max_requeues": slurm.max_requeues,
        "object_store_mib": config.cluster.object_store_mib,
        "arguments": shlex.join([*own, f"runs_dir={runs}", f"run_name={name}", "resume=auto"]),
    }
    return render(TEMPLATES / f"{command}.sbatch", fields)


def render(file: Path, fields: Mapping[str, object]) -> str:
    """The template with its fields filled in; UserError if it has others than these, or lacks one."""
    template = Template(file.read_text(encoding="utf-8"))
    if not template.is_valid():
        raise UserError(f"{shown(file)} has a $ that begins no field; write $$ for the shell's own")
    names = set(template.get_identifiers())
    if names != fields.keys():
        unknown, unused = sorted(names - fields.keys()), sorted(fields.keys() - names)
        raise UserError(f"{shown(file)} should have the fields {', '.join(fields)}; unknown: {unknown}, not in it: {unused}")
    return template.substitute(fields)


def main() -> int:
    command, options = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command not in COMMANDS:
        print(f"usage: python -m launch.submit {'|'.join(COMMANDS)} cluster=slurm [name=value ...]", file=sys.stderr)
        return 0 if command in ("-h", "--help") else 2
    if "-h" in options or "--help" in options:
        print(usage(COMMANDS[command], command).replace(f"launch.{command}", f"launch.submit {command}", 1))
        return 0
    return guarded(lambda: submit(command, options))


if __name__ == "__main__":
    sys.exit(main())
