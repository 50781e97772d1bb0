"""The script of a SLURM job says what was asked for, and a template that does not fit is refused."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from kernels.errors import UserError
from launch.cli import load
from launch.slurm.node import ray_command
from launch.submit import COMMANDS, TEMPLATES, job_script, render, submit
from trainer.run_dir import RunDir

SLURM = ["cluster=slurm", "cluster.slurm.nodes=4", "cluster.slurm.gpus_per_node=2"]


def script(command: str, options: list[str]) -> str:
    return job_script(command, "night", load(COMMANDS[command], command, options), options)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_script_asks_for_what_was_asked_for(command: str, tmp_path: Path) -> None:
    options = [*SLURM, "seed=7", f"runs_dir={tmp_path}/a b", "cluster.slurm.partition=gpu", "dry_run=true"]
    options += ["cluster.slurm.sbatch=['--qos=high','--mem=0']", "cluster.slurm.shell=['module load x','export A=$HOME']"]
    options += ["checkpoint=runs/base"] if command == "rl" else []
    lines = script(command, options).splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert asked == {
        *('--job-name="night"', "--nodes=4", "--ntasks-per-node=1", "--exclusive", "--time=24:00:00", "--open-mode=append"),
        *("--requeue", "--signal=B:USR1@300", "--gpus-per-node=2", "--partition=gpu", "--qos=high", "--mem=0"),
        f'--output="{tmp_path}/a b/slurm/night.log"',
    }
    assert lines[0] == "#!/bin/bash" and "module load x" in lines and "export A=$HOME" in lines
    words = shlex.split(" ".join(lines[-2:]).replace("\\\n", "").replace("\\", ""))
    assert words[words.index(command) + 1 :][-3:] == [f"runs_dir={tmp_path}/a b", "run_name=night", "resume=auto"]
    assert "seed=7" in words and "dry_run=true" not in words
    load(COMMANDS[command], command, words[words.index(command) + 1 :])  # what the job will read


def test_a_dry_run_shows_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("pretrain", [*SLURM, f"runs_dir={tmp_path}/runs", "dry_run=true"]) is None
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash") and "nothing was submitted" in out
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_submitted_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"launch.submit is for cluster=slurm"):
        submit("pretrain", [])
    with pytest.raises(UserError, match=r"cluster.ranks \(6\) does not divide evenly over 4 nodes"):
        submit("pretrain", [*SLURM, "cluster.ranks=6"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"there is no sbatch on the PATH"):
        submit("pretrain", [*SLURM, f"runs_dir={tmp_path}/runs"])
    assert list(tmp_path.iterdir()) == []


def test_what_the_job_would_end_at_is_a_message_before_it_waits_in_the_queue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [f"runs_dir={tmp_path}/runs", "dry_run=true"]
    with pytest.raises(UserError, match=r"model\.num_experts \(8\) is not divisible by the number of ranks \(12\)"):
        submit("pretrain", [*SLURM, "cluster.slurm.nodes=6", *runs])
    (tmp_path / "empty").mkdir()
    for command in COMMANDS:
        with pytest.raises(UserError, match=r"empty holds no checkpoint"):
            submit(command, [*SLURM, f"checkpoint={tmp_path}/empty", *runs])
        assert submit(command, [*SLURM, f"checkpoint={tmp_path}/later", *runs]) is None, "another job may make it"
        assert "later is not there; the job ends at once unless it is" in capsys.readouterr().out
    RunDir.open(load(COMMANDS["pretrain"], "pretrain", [*runs[:1], "run_name=mine"]), "pretrain").close("stopped")
    with pytest.raises(UserError, match=r"train\.steps: 240 in the run, 99 now"):
        submit("pretrain", [*SLURM, *runs, "run_name=mine", "train.steps=99"])
    assert submit("pretrain", [*SLURM, *runs, "run_name=mine"]) is None


@pytest.mark.parametrize("options", [["runs_dir='a\"b'"], ["runs_dir=a%b"], ["run_name='a\\b'"]])
def test_names_that_slurm_reads_as_something_else_are_refused(options: list[str]) -> None:
    with pytest.raises(UserError, match=r"SLURM takes .* as its own fields; choose another runs_dir or run_name"):
        submit("pretrain", [*SLURM, *options, "dry_run=true"])


def test_an_option_of_sbatch_is_one_line() -> None:
    for name in ("partition", "account"):
        with pytest.raises(UserError, match=rf"cluster\.slurm\.{name} = gpu"):
            submit("pretrain", [*SLURM, f"cluster.slurm.{name}='gpu\nrm x'", "dry_run=true"])


@pytest.mark.parametrize(
    "limit, seconds",
    [("90", 5400), ("10:30", 630), ("1:00:01", 3601), ("2-3", 183_600), ("1-0:30", 88_200), ("1-02:03:04", 93_784), ("0", 0)],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit: str, seconds: int) -> None:
    config = load(COMMANDS["pretrain"], "pretrain", [*SLURM, f"cluster.slurm.time_limit='{limit}'"])
    assert config.cluster.slurm is not None and config.cluster.slurm.limit_s == seconds


def test_a_job_that_would_be_told_to_stop_at_once_is_refused() -> None:
    """It would be queued again and again."""
    with pytest.raises(UserError, match=r"time_limit \(5:00, 300 s\) leaves a run no time: stop_before_s \(300\) before"):
        submit("pretrain", [*SLURM, "cluster.slurm.time_limit='5:00'"])


@pytest.mark.parametrize("text", ["$name $more", "no field", "$name costs 5$"])
def test_a_template_with_other_fields_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "job.sbatch"
    file.write_text(text)
    with pytest.raises(UserError, match=r"job\.sbatch (should have the fields name; unknown|has a \$ that begins no field)"):
        render(file, {"name": "night"})
    file.write_text("$name of $$HOME")
    assert render(file, {"name": "night"}) == "night of $HOME"


def test_the_templates_stay_small() -> None:
    assert all((TEMPLATES / f"{command}.sbatch").stat().st_size < 1500 for command in COMMANDS)


def test_the_first_node_starts_the_cluster_and_the_others_join_it() -> None:
    first = ray_command("10.0.0.1:20001", "n1", "10.0.0.1", 80)
    other = ray_command("10.0.0.1:20001", "n2", "10.0.0.2", 80)
    assert "--head" in first and "--port=20001" in first and "--node-ip-address=10.0.0.1" in first
    assert "--address=10.0.0.1:20001" in other and "--head" not in other and "--node-name=n2" in other
