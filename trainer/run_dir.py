"""A run is one folder: its configuration, what happened, and the results.

    runs/pretrain-20260801-143012/
        config.yaml             the resolved configuration
        status.json             kind, state, attempt, when, which revision
        metrics.jsonl           one record a step
        logs/attempt_N/*.log    one file per process
        checkpoints/            see trainer/checkpoint.py
        reference/              in RL with a KL penalty, the weights of the reference policy
        server_weights/         the newest weights, for a completion server to load
        refused/                batches of updates that the guard refused
        traces/                 steps recorded by the profiler, see trainer/tracing.py
        wandb/                  W&B's own files
        schedule.json           measurements of MoE layers in chunks, and their plan (parallel/scheduling.py)
        report.html             made at the end, with schedule.svg
        wandb_report.json       the report at W&B about it, if there is one

`latest-pretrain` and `latest-rl` beside it point to the newest run of their kind.

A folder has a W&B run of its own: a copy gets another when it goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from kernels.errors import UserError
from trainer.config.run import RunConfig
from trainer.json_text import first_problem, parsed_yaml
from trainer.locks import locked
from trainer.metrics import Stage
from trainer.records import parsed_record

REPOSITORY = Path(__file__).resolve().parents[1]
TRACES = "traces"
State = Literal["running", "finished", "stopped", "failed"]
# Options that may change when a run is resumed: they leave its numbers alone, up to rounding.
HARMLESS_GROUPS = ("logger.", "cluster.", "parallel.", "trace.", "sync.")
HARMLESS = {"dry_run", "resume", "runs_dir", "run_name", "data.cache_dir"}
# Engines, how many and where: a sample's tokens are the same from any; without over-provision so is all else.
HARMLESS |= {f"rollout.{name}" for name in ("engines", "min_engines", "placement", "engine_slots")}
HARMLESS |= {"rollout.cache_tokens", "rollout.metrics_port"}
HARMLESS_ENDINGS = ("checkpoint_every", ".keep_checkpoints", ".eval_every", ".micro_rows", ".recompute")


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("it should have a time zone")
    return text


@dataclass(frozen=True)
class Status:
    """What status.json holds."""

    kind: Stage
    state: State
    attempt: Annotated[int, Field(ge=1)]
    created: Annotated[str, AfterValidator(_moment)]
    id: str  # of the W&B run
    folder: str  # that the id belongs to; without links
    inode: int  # of that folder, which it keeps when it is moved, or seen from another machine
    git: str


STATUS = TypeAdapter(Status)


@dataclass(frozen=True)
class RunDir:
    path: Path  # absolute, because other processes write there too
    kind: str
    attempt: int  # how often a command has opened this folder
    id: str  # of the W&B run
    git: str  # revision, with "-dirty" when files differ from it; or "unknown"
    config_text: str  # config.yaml
    note: str  # how it came about, for the console
    lock: IO[str]  # held while the run is open, so that two commands never write one folder

    @classmethod
    def open(cls, config: RunConfig, kind: str) -> RunDir:
        """A new run, or with resume=auto the one to continue.

        Raises:
            UserError: the folder cannot be written, is in use, or belongs to a run with another configuration.
        """
        path = continued(config, kind)
        return cls._create(config, kind) if path is None else cls._reopen(path, config, kind)

    @classmethod
    def _create(cls, config: RunConfig, kind: str) -> RunDir:
        with _writable(config.runs_dir):
            config.runs_dir.mkdir(parents=True, exist_ok=True)
            path = _new_folder(config, kind)
            (path / "checkpoints").mkdir()
        note = f"new run {shown(path)}"
        if config.resume == "auto":
            wanted = f"no run {config.run_name}" if config.run_name else f"no unfinished {kind} run"
            note = f"resume=auto found {wanted} in {shown(config.runs_dir)}: {note}"
        created = datetime.now().astimezone().isoformat("T", "milliseconds")
        status = {"kind": kind, "state": "running", "attempt": 1, "created": created, "id": secrets.token_hex(4)} | _place(path)
        return cls._start(path, config, status, note)

    @classmethod
    def _reopen(cls, path: Path, config: RunConfig, kind: str) -> RunDir:
        status = read_status(path)
        status |= {"state": "running", "attempt": status["attempt"] + 1}
        note = f"continuing {shown(path)}, attempt {status['attempt']}"
        here = _place(path)
        if not any(status[key] == value for key, value in here.items()):
            note += f"; it was copied from {status['folder']}, and is another run to W&B from now on"
            status["id"] = secrets.token_hex(4)
        status |= here
        return cls._start(path, config, status, note)

    @classmethod
    def _start(cls, path: Path, config: RunConfig, status: dict[str, Any], note: str) -> RunDir:
        with _writable(path):
            if (lock := locked(path / ".lock")) is None:
                way_out = "wait for it to end, or start a new run with resume=never"
                raise UserError(f"{shown(path)} is in use by another command; {way_out}")
            text = as_yaml(config)
            write_atomically(path / "config.yaml", text)
            status["git"] = git_revision()
            write_atomically(path / "status.json", json.dumps(status, indent=1))
            _point_to(path, path.parent / f"latest-{status['kind']}")
        return cls(path, status["kind"], status["attempt"], status["id"], status["git"], text, note, lock)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def reference(self) -> Path:
        """The weights at the start of RL, a checkpoint without an optimizer, where a reference policy is kept."""
        return self.path / "reference"

    @property
    def traces(self) -> Path:
        return self.path / TRACES

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def log_file(self, role: str) -> Path:
        """Where the process `role`, such as trainer/0, logs. Attempts never share a folder."""
        return self.path / "logs" / f"attempt_{self.attempt}" / f"{role.replace('/', '_')}.log"

    def rewind(self, step: int) -> None:
        """Drops the records after `step`, because the run continues from there; -1 drops all."""
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and parsed_record(line, self.metrics_file)["step"] <= step]
        with _writable(self.path):
            write_atomically(self.metrics_file, b"".join(kept).decode())

    def close(self, state: State) -> None:
        """Writes how the run ended and lets go of the folder."""
        with _writable(self.path):
            write_atomically(self.path / "status.json", json.dumps(read_status(self.path) | {"state": state}, indent=1))
        self.lock.close()


def as_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_status(path: Path) -> dict[str, Any]:
    """status.json of a run folder. UserError if there is none, or it says something else."""
    file = path / "status.json"
    try:
        return asdict(STATUS.validate_json(file.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{shown(path)} is not a run folder: it has no status.json") from None
    except OSError as error:
        raise UserError(f"{shown(file)} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise UserError(f"{shown(file)} is damaged: {first_problem(error)}") from None


def read_config(path: Path) -> dict[str, Any]:
    """config.yaml of a run folder, of whatever version. UserError if there is none, or it is no mapping."""
    file, way_out = path / "config.yaml", "its checkpoints have copies of it, checkpoints/*/config.yaml"
    try:
        config = parsed_yaml(file.read_bytes())
    except OSError as error:
        raise UserError(f"{shown(file)} cannot be read: {error.strerror}; {way_out}") from None
    except ValueError as error:
        raise UserError(f"{shown(file)} is damaged: {error}; {way_out}") from None
    if not isinstance(config, dict):
        raise UserError(f"{shown(file)} is damaged: it holds no options; {way_out}")
    return config


def option(config: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """The value of `name`, such as train.steps, in a `read_config`. UserError if there is none of these types."""
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"config.yaml of the run has {name}={value!r}, which should be {wanted}")
    return value


def traces_of(path: Path) -> list[Path]:
    """The complete traces of a run."""
    return [folder for folder in (path / TRACES).glob("*") if not folder.name.startswith(".")]


def shown(path: Path) -> str:
    """The path as a person would write it from here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def git_revision() -> str:
    """The revision of the code, with "-dirty" when tracked files differ from it; "unknown" without git."""
    if not (REPOSITORY / ".git").exists():
        return "unknown"
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        return revision + "-dirty" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


# ---------------------------------------------------------------- finding and making folders


def continued(config: RunConfig, kind: str) -> Path | None:
    """The run that this command goes on with; None where it begins one.

    Raises:
        UserError: it is of another kind, has other options, or cannot be read.
    """
    path = resumable(config, kind)
    if path is not None:
        _require_same(path, config)
    return path


def resumable(config: RunConfig, kind: str) -> Path | None:
    """The run that resume=auto means: `run_name`, or the newest unfinished one of this kind. None without it.

    Raises:
        UserError: it is of another kind, or cannot be read.
    """
    if config.resume != "auto":
        return None
    runs = config.runs_dir.absolute()
    if config.run_name is not None:
        path = runs / config.run_name
        with _writable(path):
            there, begun = path.exists(), (path / "status.json").exists()
        if there and not begun:
            raise UserError(f"no run has begun in {shown(path)}: it has no status.json. Remove it, or choose another run_name")
        if there and (found := read_status(path)["kind"]) != kind:
            raise UserError(f"{shown(path)} is of launch.{found}; choose another run_name for this run of launch.{kind}")
        return path if there else None
    folders = [file.parent for file in runs.glob("*/status.json") if not file.parent.is_symlink()]
    try:
        found = [(read_status(folder), folder) for folder in folders]
    except UserError as error:
        raise UserError(f"{error}. Which run should continue? Name it with run_name=..., or move that folder away") from None
    unfinished = [(s["created"], folder) for s, folder in found if s["kind"] == kind and s["state"] != "finished"]
    return max(unfinished, key=lambda one: (datetime.fromisoformat(one[0]), one[1]))[1] if unfinished else None


def _new_folder(config: RunConfig, kind: str) -> Path:
    runs = config.runs_dir.absolute()
    if config.run_name is not None:
        path = runs / config.run_name
        try:
            path.mkdir()
        except FileExistsError:  # also where another command is faster
            raise UserError(f"{shown(path)} exists; continue it with resume=auto, or choose another run_name") from None
        return path
    name = f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = [runs / name, *(runs / f"{name}-{number}" for number in range(2, 100))]
    for path in candidates:
        try:
            path.mkdir()
        except FileExistsError:  # another run started in this very second
            continue
        return path
    raise UserError(f"{shown(candidates[0])} and 98 more of that name exist; give the run a run_name")


def _place(path: Path) -> dict[str, str | int]:
    """Of a folder, as status.json has it."""
    return {"folder": str(path.resolve()), "inode": path.stat().st_ino}


def _point_to(path: Path, link: Path) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    temporary.replace(link)


def is_open(path: Path) -> bool:
    """Whether a command has this run open now; one that was killed leaves a status.json that says running."""
    if not (path / ".lock").exists():
        return False
    with open(path / ".lock", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def write_atomically(file: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{shown(path)} cannot be written: {error.strerror or error}. Make room or change the permissions, "
            "or put runs elsewhere with runs_dir=..."
        ) from error


# ---------------------------------------------------------------- the same configuration?


def _require_same(path: Path, config: RunConfig) -> None:
    """UserError unless the run's configuration and this one give the same numbers."""
    old = leaves(read_config(path))
    new = leaves(config.model_dump(mode="json"))
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name) and not _is_harmless(name)]
    if changed:
        lines = [f"  {name}: {json.dumps(old.get(name))} in the run, {json.dumps(new.get(name))} now" for name in changed]
        raise UserError(
            "\n".join([f"{shown(path)} cannot be continued with other options:", *lines])
            + "\nGive the run's own values, or start a new run with resume=never"
        )


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names after `prefix`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _is_harmless(name: str) -> bool:
    return name in HARMLESS or name.startswith(HARMLESS_GROUPS) or name.endswith(HARMLESS_ENDINGS)
