"""A run folder is made once, continued only with the same numbers, and never written by two commands."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kernels.errors import UserError
from launch.cli import load
from trainer import run_dir
from trainer.config.rl import RLConfig
from trainer.config.run import PretrainConfig
from trainer.run_dir import RunDir, continued, git_revision, read_status, resumable, write_atomically


def config(runs: Path, *arguments: str) -> PretrainConfig:
    return load(PretrainConfig, "pretrain", [f"runs_dir={runs}", "data.cache_dir=/cache", *arguments])


def finished(runs: Path, *arguments: str, state: Any = "failed") -> RunDir:
    run = RunDir.open(config(runs, *arguments), "pretrain")
    run.close(state)
    return run


def test_a_new_run_has_its_configuration_status_and_link(tmp_path: Path) -> None:
    wanted = config(tmp_path / "deep" / "runs", "seed=3")
    run = RunDir.open(wanted, "pretrain")
    assert run.path.is_absolute() and run.path.parent == tmp_path / "deep" / "runs"
    assert run.path.name.startswith("pretrain-2") and run.checkpoints.is_dir()
    assert (run.path.parent / "latest-pretrain").resolve() == run.path
    assert PretrainConfig.model_validate(yaml.safe_load((run.path / "config.yaml").read_text())) == wanted
    status = read_status(run.path)
    assert (status["kind"], status["state"], status["attempt"]) == ("pretrain", "running", 1)
    assert status["git"] == git_revision() and status["created"] and status["id"] == run.id
    assert "new run" in run.note
    run.close("finished")
    assert read_status(run.path)["state"] == "finished"


def test_runs_of_the_same_second_get_their_own_folders(tmp_path: Path) -> None:
    runs = [RunDir.open(config(tmp_path), "pretrain") for _ in range(4)]
    assert len({run.path for run in runs}) == 4 == len({run.id for run in runs})


def test_a_named_run_is_not_overwritten(tmp_path: Path) -> None:
    assert finished(tmp_path, "run_name=mine").path == tmp_path / "mine"
    with pytest.raises(UserError, match="mine exists; continue it with resume=auto, or choose another run_name"):
        RunDir.open(config(tmp_path, "run_name=mine"), "pretrain")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "latest-rl", "", ".", "/", "a/"])
def test_a_name_that_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="should be a plain folder name"):
        RunDir.open(config(tmp_path, f"run_name={name}"), "pretrain")


def test_a_name_may_be_of_any_language_and_not_too_long(tmp_path: Path) -> None:
    assert finished(tmp_path, 'run_name="опыт-1"').path == tmp_path / "опыт-1"
    for name in ("ж" * 101, "a" * 201):
        with pytest.raises(UserError, match=r"20[12] bytes, and 200 are the most"):
            config(tmp_path, f'run_name="{name}"', "resume=auto")


def test_a_file_and_a_status_that_is_none_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "strange" / "status.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"file is not a run folder: it has no status\.json"):
        read_status(tmp_path / "file")
    with pytest.raises(UserError, match=r"status\.json cannot be read: Is a directory"):
        read_status(tmp_path / "strange")


def test_resume_continues_the_newest_unfinished_run_of_its_kind(tmp_path: Path) -> None:
    first = finished(tmp_path)
    second = finished(tmp_path)
    finished(tmp_path, state="finished")
    other = RunDir.open(load(RLConfig, "rl", [f"runs_dir={tmp_path}", "checkpoint=a"]), "rl")
    other.close("failed")
    assert first.path != second.path
    run = RunDir.open(config(tmp_path, "resume=auto"), "pretrain")
    assert (run.path, run.attempt, run.id) == (second.path, 2, second.id)
    assert run.note.endswith("attempt 2") and read_status(run.path)["state"] == "running"
    assert run.log_file("trainer/0") == second.path / "logs" / "attempt_2" / "trainer_0.log"
    assert second.log_file("trainer/0") != run.log_file("trainer/0")


def test_the_newest_run_is_the_last_one_also_where_a_clock_was_set_back_an_hour(tmp_path: Path) -> None:
    for name, created in [("summer", "2026-10-25T02:50:00.000+02:00"), ("winter", "2026-10-25T02:10:00.000+01:00")]:
        file = finished(tmp_path, f"run_name={name}").path / "status.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"created": created}))
    assert continued(config(tmp_path, "resume=auto"), "pretrain") == tmp_path / "winter"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"created": "2026-10-25T02:10:00"}))
    with pytest.raises(UserError, match=r"winter/status\.json is damaged: created: .*time zone"):
        read_status(tmp_path / "winter")


def test_resume_finds_a_run_by_its_name_and_a_run_that_was_killed(tmp_path: Path) -> None:
    killed = RunDir.open(config(tmp_path, "run_name=mine"), "pretrain")
    killed.lock.close()  # as the system does for a process that is gone
    assert read_status(killed.path)["state"] == "running"
    finished(tmp_path)
    assert RunDir.open(config(tmp_path, "resume=auto", "run_name=mine"), "pretrain").path == killed.path


def test_resume_without_such_a_run_says_so_and_starts_one(tmp_path: Path) -> None:
    run = finished(tmp_path, "resume=auto", state="finished")
    assert "resume=auto found no unfinished pretrain run" in run.note and "new run" in run.note
    assert RunDir.open(config(tmp_path, "resume=auto"), "pretrain").path != run.path
    named = RunDir.open(config(tmp_path, "resume=auto", "run_name=mine"), "pretrain")
    assert "resume=auto found no run mine" in named.note and named.attempt == 1


def test_resume_refuses_options_that_change_the_numbers_and_lists_them_all(tmp_path: Path) -> None:
    finished(tmp_path, "run_name=mine", "train.steps=160", "optimizer.lr=0.25")
    changed = config(
        tmp_path, "run_name=mine", "resume=auto", "train.steps=99", "optimizer.lr=0.5", "data=text", "data.paths=[a]"
    )
    with pytest.raises(UserError) as caught:
        RunDir.open(changed, "pretrain")
    text = str(caught.value)
    assert "optimizer.lr: 0.25 in the run, 0.5 now" in text and "train.steps: 160 in the run, 99 now" in text
    assert 'data.kind: "stdlib" in the run, "text" now' in text and 'data.paths: null in the run, ["a"] now' in text
    assert "resume=never" in text and "resume:" not in text
    assert read_status(tmp_path / "mine")["attempt"] == 1


def test_rl_goes_on_with_other_engines_elsewhere(tmp_path: Path) -> None:
    common = [f"runs_dir={tmp_path}", "checkpoint=a", "run_name=mine"]
    RunDir.open(load(RLConfig, "rl", common), "rl").close("stopped")
    other = ["rollout.engines=3", "rollout.placement=separate", "rollout.engine_slots=7", "sync=delta", "sync.check=true"]
    other += ["rollout.min_engines=1"]
    assert RunDir.open(load(RLConfig, "rl", [*common, "resume=auto", *other]), "rl").attempt == 2
    with pytest.raises(UserError, match=r"rollout.max_staleness: 3 in the run, 4 now"):
        RunDir.open(load(RLConfig, "rl", [*common, "resume=auto", *other, "rollout.max_staleness=4"]), "rl")


def test_resume_allows_what_leaves_the_numbers_alone(tmp_path: Path) -> None:
    finished(tmp_path, "run_name=mine")
    arguments = [
        "logger=jsonl",
        "cluster.ranks=1",
        "train.checkpoint_every=3",
        "train.keep_checkpoints=9",
        "train.eval_every=7",
    ]
    arguments += [
        "train.micro_rows=1",
        "train.recompute=true",
        "parallel=ep",
        "data.cache_dir=/other",
        "cluster.dashboard=true",
    ]
    run = RunDir.open(config(tmp_path, "run_name=mine", "resume=auto", *arguments), "pretrain")
    assert "checkpoint_every: 3" in run.config_text == (run.path / "config.yaml").read_text()


def test_a_run_of_another_kind_is_not_continued(tmp_path: Path) -> None:
    finished(tmp_path, "run_name=mine")
    rl = load(RLConfig, "rl", [f"runs_dir={tmp_path}", "checkpoint=a", "run_name=mine", "resume=auto"])
    with pytest.raises(UserError, match=r"mine is of launch\.pretrain; choose another run_name for this run of launch\.rl"):
        RunDir.open(rl, "rl")


def test_two_commands_never_write_one_run(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path, "run_name=mine"), "pretrain")
    with pytest.raises(UserError, match="mine is in use by another command"):
        RunDir.open(config(tmp_path, "run_name=mine", "resume=auto"), "pretrain")
    assert read_status(run.path)["attempt"] == 1
    run.close("failed")
    RunDir.open(config(tmp_path, "run_name=mine", "resume=auto"), "pretrain").close("failed")


def test_two_commands_that_begin_one_run_at_the_same_time_do_not_share_it(tmp_path: Path) -> None:
    RunDir.open(config(tmp_path, "run_name=mine"), "pretrain").close("failed")
    with pytest.raises(UserError, match=r"mine exists; continue it with resume=auto, or choose another run_name"):
        RunDir.open(config(tmp_path, "run_name=mine"), "pretrain")


@pytest.mark.parametrize("text", [None, "train: [1,2", "", b"\x81"])
def test_a_configuration_that_cannot_be_read_is_a_message_that_says_where_a_copy_is(
    tmp_path: Path, text: str | bytes | None
) -> None:
    file = finished(tmp_path, "run_name=mine").path / "config.yaml"
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        UserError, match=r"mine/config\.yaml (is damaged|cannot be read): .*; its checkpoints have copies of it"
    ):
        RunDir.open(config(tmp_path, "run_name=mine", "resume=auto"), "pretrain")
    assert read_status(tmp_path / "mine")["attempt"] == 1


def test_of_runs_with_a_damaged_one_among_them_the_one_to_go_on_is_asked_for(tmp_path: Path) -> None:
    run = finished(tmp_path, "run_name=mine")
    finished(tmp_path, "run_name=torn").path.joinpath("status.json").write_text("")
    with pytest.raises(
        UserError, match=r"torn/status\.json is damaged: .* Which run should continue\? Name it with run_name=\.\.\."
    ):
        RunDir.open(config(tmp_path, "resume=auto"), "pretrain")
    assert RunDir.open(config(tmp_path, "resume=auto", "run_name=mine"), "pretrain").path == run.path


def test_rewind_drops_what_the_run_will_do_again(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path), "pretrain")
    run.rewind(5)  # nothing there yet
    lines = [json.dumps({"stage": "pretrain", "step": step}) + "\n" for step in range(8)]
    run.metrics_file.write_text("".join(lines) + '{"stage": "pret')
    run.rewind(5)
    assert run.metrics_file.read_text() == "".join(lines[:6])
    run.rewind(-1)
    assert run.metrics_file.read_text() == ""


def test_a_place_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.* cannot be written: .*runs_dir="):
        RunDir.open(config(tmp_path / "file" / "runs"), "pretrain")


def test_a_place_that_cannot_be_looked_into_is_a_message_when_a_run_is_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written: File name too long.* runs_dir="):
        continued(config(tmp_path / ("a" * 300), "resume=auto", "run_name=mine"), "pretrain")


def test_a_full_disk_is_a_message_and_leaves_the_old_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.open(config(tmp_path), "pretrain")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        run.close("finished")
    assert read_status(run.path)["state"] == "running"
    assert not list(run.path.glob(".status*")), "half a file is left"


def test_a_run_whose_disk_was_full_when_it_began_says_how_to_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(run_dir, "write_atomically", full)
        RunDir.open(config(tmp_path, "run_name=mine"), "pretrain")
    again = config(tmp_path, "run_name=mine", "resume=auto")
    for begin in (RunDir.open, resumable):
        with pytest.raises(UserError, match=r"no run has begun in .*mine: it has no status\.json\. Remove it, or"):
            begin(again, "pretrain")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, "old")
    write_atomically(file, "new")
    assert file.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder: it has no status"):
        read_status(tmp_path)


def test_the_revision_says_dirty_and_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "REPOSITORY", tmp_path)
    assert git_revision() == "unknown"
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("1")
    for command in (["init", "-q"], ["add", "code.py"], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
    clean = git_revision()
    assert len(clean) == 12
    (tmp_path / "code.py").write_text("2")
    assert git_revision() == f"{clean}-dirty"
