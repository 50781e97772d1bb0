"""One call reaches the console, metrics.jsonl and W&B, and says nothing that it should not."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from wandb.errors import UsageError

from kernels.errors import UserError
from launch.cli import load
from tests.listening import beyond_loopback
from tests.wandb_server import ENTITY, SECRET, WandbServer, at
from trainer import tracking
from trainer.config.run import LoggerConfig, PretrainConfig
from trainer.console import write_any_text
from trainer.metrics import UNKNOWN, USE
from trainer.records import Change, read_records
from trainer.run_dir import RunDir, read_status
from trainer.stopping import Interrupted
from trainer.tracking import Tracker, summary_table

OFF = LoggerConfig(wandb="off", project="tessera", entity=None)


def logger(mode: str) -> LoggerConfig:
    return LoggerConfig.model_validate({"wandb": mode, "project": "tessera", "entity": None})


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    run = RunDir.open(load(PretrainConfig, "pretrain", [f"runs_dir={tmp_path}"]), "pretrain")
    yield run
    run.lock.close()


def test_a_step_is_a_record_and_a_line(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(run, "pretrain", OFF, total_steps=2, devices=2) as tracker:
        tracker.log(0, {"eval/loss": 4.0})
        tracker.log(1, {"train/loss": 3.0, "train/tokens": 100, "time/train_s": 0.5, "moe/load": [[0.5, 0.5]]})
        tracker.log(2, {"train/loss": 2.0})
    first, second, third = read_records(run.metrics_file)
    assert (first["stage"], first["step"], first["eval/loss"]) == ("pretrain", 0, 4.0)
    assert second["perf/tokens_per_s"] == 200 and second["moe/load"] == [[0.5, 0.5]]
    assert "time/step_s" not in first and isinstance(third["time/step_s"], float)
    assert isinstance(third["mem/peak_gib"], float) and third["mem/peak_gib"] > 0
    out = capsys.readouterr().out
    assert "step 1/2  loss 3.0000" in out and "ETA" in out
    assert all(line.isprintable() and len(line) <= 150 for line in out.splitlines())
    assert out.splitlines()[0].endswith(run.note)
    assert re.search(r"^ +loss +nats +3\.0000 +2\.0000", out, re.MULTILINE), "the closing table"
    assert read_status(run.path)["state"] == "finished"
    log = run.log_file("driver").read_text()
    assert "step 2/2" in log and run.note in log


def test_a_step_tells_its_price_and_how_long_gpus_had_nothing_to_do(run: RunDir) -> None:
    update = {"train/tokens": 100, "time/train_s": 0.5, "time/gpu_idle_s": 0.0}
    with Tracker(run, "pretrain", OFF, total_steps=3, devices=4, dollars_per_hour=9.0) as tracker:
        for step in (1, 2):
            tracker.log(step, update)
        tracker.log(3, {**update, "time/gpu_idle_s": 1e9})
    first, second, third = read_records(run.metrics_file)
    assert first["perf/tokens_per_s_per_device"] == 50
    assert not {"perf/dollars_per_million_tokens", "perf/gpu_idle_share"} & first.keys()
    assert isinstance(second["time/step_s"], float)
    assert second["perf/dollars_per_million_tokens"] == pytest.approx(4 * 9 * second["time/step_s"] / 3600 * 10**4)
    assert (second["perf/gpu_idle_share"], third["perf/gpu_idle_share"]) == (0.0, 1.0)


def test_the_share_of_checkpoints_is_that_of_all_steps_so_far(run: RunDir) -> None:
    with Tracker(run, "pretrain", OFF, total_steps=3, devices=1) as tracker:
        tracker.log(1, {})
        tracker.log(2, {"time/checkpoint_s": 3.0})
        tracker.log(3, {"time/memory_checkpoint_s": 2.0})
    _, second, third = read_records(run.metrics_file)
    took_s = [float(record["time/step_s"]) for record in (second, third)]  # type: ignore[arg-type]
    assert second["perf/checkpoint_share"] == pytest.approx(3 / took_s[0])
    assert third["perf/checkpoint_share"] == pytest.approx(5 / sum(took_s))


def test_what_a_step_cannot_tell_is_said_once_with_the_reason(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(run, "pretrain", OFF, total_steps=3, devices=2) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"train/tokens": 100, "time/train_s": 0.5, "time/communication_exposed_s": 0.1})
    assert "perf/dollars_per_million_tokens" not in read_records(run.metrics_file)[-1]
    out = capsys.readouterr().out
    assert out.count("steps lack MFU (") == 1 and "$/M (set cluster.dollars_per_gpu_hour)" in out
    assert "exposed (" not in out and UNKNOWN.keys() <= USE.keys(), "they are what the line says of devices"


def test_an_update_that_was_skipped_is_told_with_its_reason(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    log = run.log_file("trainer/0")
    with Tracker(run, "pretrain", OFF, total_steps=2, devices=1) as tracker:
        tracker.log(1, {"train/skipped": 1})
        log.write_text(
            "".join(f"2026 WARNING tessera: update {step} is refused: why {step}\n2026 INFO fine\n" for step in (1, 2))
        )
        tracker.log(2, {"train/skipped": 1})
    first, second = (line for line in capsys.readouterr().out.splitlines() if "skipped" in line or "refused" in line)
    assert first.endswith(f"an update was skipped, see {log}") and second.endswith("  update 2 is refused: why 2")


def test_a_step_after_a_restart_has_no_step_time(run: RunDir) -> None:
    with Tracker(run, "pretrain", OFF, total_steps=9, devices=2) as tracker:
        for step in (1, 2, 3, 2, 3):
            tracker.log(step, {"train/loss": 1.0})
        tracker.pause()  # no step has to be done again
        tracker.log(4, {"train/loss": 1.0})
    assert ["time/step_s" in record for record in read_records(run.metrics_file)] == [False, True, True, False, True, False]


def test_a_failure_is_written_down_and_passed_on(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="boom"), Tracker(run, "pretrain", OFF, total_steps=2, devices=2):
        raise RuntimeError("boom")
    assert read_status(run.path)["state"] == "failed"
    assert "stopped" in capsys.readouterr().out


def test_a_full_disk_at_the_end_does_not_hide_why_a_run_failed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="boom"), Tracker(run, "pretrain", OFF, total_steps=2, devices=2):
        monkeypatch.setattr("trainer.tracking.open", full_disk, raising=False)
        monkeypatch.setattr("trainer.run_dir.open", full_disk, raising=False)
        raise RuntimeError("boom")
    said = capsys.readouterr().out
    assert said.count("cannot be written: No space left on device") == 2, said  # how it ended, and the last line of its log


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Slow:
    """W&B's run while its last records travel, when somebody loses patience."""

    def __init__(self, impatience: BaseException) -> None:
        self.impatience = impatience

    def finish(self, exit_code: int) -> None:
        raise self.impatience


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped by Ctrl-C"), ValueError("ours")])
def test_the_folder_says_how_the_run_ended_even_if_ctrl_c_comes_again_while_wandb_is_waited_for(
    run: RunDir, error: BaseException
) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker(run, "pretrain", OFF, total_steps=2, devices=1) as tracker:
        tracker.wandb = Slow(KeyboardInterrupt())  # type: ignore[assignment]
        raise error
    assert read_status(run.path)["state"] == ("failed" if isinstance(error, ValueError) else "stopped")
    assert run.lock.closed


def test_ctrl_c_at_the_end_of_a_run_does_without_what_wandb_lacks(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(run, "pretrain", OFF, total_steps=2, devices=1) as tracker:
        tracker.wandb = Slow(Interrupted("stopped by Ctrl-C before a step was made"))  # type: ignore[assignment]
    assert read_status(run.path)["state"] == "finished"
    assert "W&B is not waited for any longer; `wandb sync " in capsys.readouterr().out


def test_ctrl_c_while_wandb_is_started_leaves_a_run_that_has_stopped(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "_start_wandb", lambda self: (_ for _ in ()).throw(Interrupted("stopped by Ctrl-C")))
    with pytest.raises(Interrupted), Tracker(run, "pretrain", OFF, total_steps=2, devices=1):
        raise AssertionError("the run has begun")
    assert read_status(run.path)["state"] == "stopped" and run.lock.closed


def test_an_undeclared_key_writes_nothing(run: RunDir) -> None:
    with (
        pytest.raises(KeyError, match="nearest is train/loss"),
        Tracker(run, "pretrain", OFF, total_steps=2, devices=2) as tracker,
    ):
        tracker.log(1, {"train/los": 1.0})
    assert not run.metrics_file.exists()


def test_a_console_that_is_gone_ends_no_run_and_neither_does_a_name_that_is_no_text(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        write_any_text()
        with Tracker(run, "pretrain", OFF, total_steps=1, devices=1) as tracker:
            tracker.log(1, {"train/loss": 3.0})
            tracker.say("such as b\udcff.txt")
    assert read_status(run.path)["state"] == "finished"
    assert "such as b\\udcff.txt" in run.log_file("driver").read_text()


def test_a_log_that_cannot_be_written_is_a_message(run: RunDir) -> None:
    run.log_file("driver").mkdir(parents=True)
    with pytest.raises(UserError, match=r"driver.log cannot be written: Is a directory; make room for it"):
        Tracker(run, "pretrain", OFF, total_steps=2, devices=2).say("a word")


def test_records_that_cannot_be_written_are_a_message(run: RunDir) -> None:
    run.metrics_file.mkdir()
    with (
        pytest.raises(UserError, match=r"metrics.jsonl cannot be written"),
        Tracker(run, "pretrain", OFF, total_steps=2, devices=2) as tracker,
    ):
        tracker.log(1, {"train/loss": 1.0})


@pytest.mark.parametrize(("mode", "key"), [("auto", ""), ("offline", SECRET)])
def test_wandb_hears_nothing_unless_it_is_asked_for_or_has_a_key(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, key: str
) -> None:
    with WandbServer() as server, at(server.url, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", key)
        with Tracker(run, "pretrain", logger(mode), total_steps=1, devices=2) as tracker:
            tracker.log(1, {"train/loss": 1.0})
        assert not server.asked
    assert list((run.path / "wandb").glob("offline-run-*"))


def test_attempts_of_a_run_are_one_run_to_wandb_with_its_own_axis_and_a_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [f"runs_dir={tmp_path}", "run_name=again", "resume=auto"]
    with WandbServer() as server, at(server.url, tmp_path / "home", monkeypatch):
        for step in (1, 2):
            run = RunDir.open(load(PretrainConfig, "pretrain", options), "pretrain")
            with Tracker(run, "pretrain", logger("auto"), total_steps=2, devices=1) as tracker:
                tracker.log(step, {"train/loss": 1.0 / step, "moe/load": [[1.0]]})
                assert beyond_loopback(os.getpid()) == {}, "W&B's own process listens to others"
    assert list(server.runs) == [run.id] and server.runs[run.id] >= 2
    told = [{key: record[key] for key in record if "/" in key} for record in server.history[run.id]]
    assert [(one["train/step"], one["train/loss"]) for one in told] == [(1, 1.0), (2, 0.5)]
    assert all("moe/load" not in one for one in told)
    assert server.saved == 1 and list(server.views) == ["nw-tesserapretrain-v"], "the second attempt makes no other workspace"
    output = capfd.readouterr()
    assert f"W&B workspace: {server.url}/{ENTITY}/tessera?nw=tesserapretrain" in output.out
    assert SECRET not in output.out + output.err + json.dumps(server.views)
    assert not [file for file in run.path.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]


def test_a_workspace_that_wandb_refuses_is_said_and_the_run_goes_on(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        WandbServer(refuses_views=True) as server,
        at(server.url, tmp_path, monkeypatch),
        Tracker(run, "pretrain", logger("online"), total_steps=1, devices=2) as tracker,
    ):
        tracker.log(1, {"train/loss": 1.0})
    assert re.search(
        r"no W&B workspace \(.*permission denied.*\); `python -m launch.report .* --wandb`", capsys.readouterr().out
    )
    assert read_status(run.path)["state"] == "finished" and server.history[run.id]


def test_a_run_survives_the_death_of_wandbs_process(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with WandbServer() as server, at(server.url, tmp_path, monkeypatch):
        with Tracker(run, "pretrain", logger("online"), total_steps=2, devices=2) as tracker:
            tracker.log(1, {"train/loss": 1.0})
            (service,) = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
            service.kill()
            service.wait(10)
            tracker.log(2, {"train/loss": 0.5})
        said = capsys.readouterr().out
    assert said.count("W&B has failed") == 1 and "step 2/2" in said
    assert read_status(run.path)["state"] == "finished" and len(read_records(run.metrics_file)) == 2


def test_a_run_does_not_wait_for_ever_for_a_wandb_that_has_gone(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "UPLOAD_S", 2.0)
    with ExitStack() as servers:
        server = servers.enter_context(WandbServer())
        with at(server.url, tmp_path, monkeypatch), Tracker(run, "pretrain", logger("online"), 1, devices=2) as tracker:
            servers.close()
            tracker.log(1, {"train/loss": 1.0})
    assert "W&B has failed (Timed out finishing run" in capsys.readouterr().out
    assert read_status(run.path)["state"] == "finished"


def test_without_a_network_wandb_goes_offline_and_says_so(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "WANDB_S", 2.0)
    with WandbServer() as server:
        address = server.url
    with (
        at(address, tmp_path, monkeypatch),
        Tracker(run, "pretrain", logger("online"), total_steps=1, devices=2) as tracker,
    ):
        tracker.log(1, {"train/loss": 1.0})
    out = capsys.readouterr().out
    assert "W&B cannot be reached (" in out and "wandb sync" in out and read_status(run.path)["state"] == "finished"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_wandb_finds_nobody_to_ask_for_a_login(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a login it would ask, and wait without end, where it finds a terminal."""
    terminal, found, init = Terminal(), dict[str, bool](), Tracker._init_wandb

    def look(self: Tracker, mode: str) -> Any:
        found[mode] = sys.stdin.isatty()
        if mode == "online":
            raise UsageError("No API key configured. Use `wandb login` to log in.")
        return init(self, mode)

    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr(Tracker, "_init_wandb", look)
    with Tracker(run, "pretrain", logger("online"), total_steps=1, devices=2) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        assert sys.stdin is terminal
    assert found == {"online": False, "offline": True}
    assert re.search(r"W&B cannot be reached \(.*wandb login.*\); tracking offline, `wandb sync ", capsys.readouterr().out)
    assert list((run.path / "wandb").glob("offline-run-*"))


def test_the_real_wandb_writes_offline_into_the_run_without_the_key(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with Tracker(run, "pretrain", logger("offline"), total_steps=1, devices=2) as tracker:
        tracker.log(1, {"train/loss": 1.0})
    written = list((run.path / "wandb").glob(f"offline-run-*-{run.id}/run-{run.id}.wandb"))
    assert len(written) == 1
    for file in run.path.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    assert "wandb" not in capfd.readouterr().err


def test_a_resumed_run_is_the_same_run_to_wandb(tmp_path: Path) -> None:
    options = [f"runs_dir={tmp_path}", "run_name=again", "resume=auto"]
    opened = []
    for step in (1, 2):
        run = RunDir.open(load(PretrainConfig, "pretrain", options), "pretrain")
        with Tracker(run, "pretrain", logger("offline"), total_steps=2, devices=1) as tracker:
            tracker.log(step, {"train/loss": 1.0})
        opened.append(run)
    assert opened[0].id == opened[1].id and [run.attempt for run in opened] == [1, 2]
    folders = list(opened[0].path.glob("wandb/offline-run-*"))
    assert len(folders) == 2 and all((folder / f"run-{opened[0].id}.wandb").is_file() for folder in folders)


def test_a_run_that_was_copied_is_another_run_to_wandb(tmp_path: Path) -> None:
    """Two that go on from the same step never write into one. One that was moved, or put back, stays what it was."""

    def go_on(name: str) -> RunDir:
        opened = RunDir.open(
            load(PretrainConfig, "pretrain", [f"runs_dir={runs}", f"run_name={name}", "resume=auto"]), "pretrain"
        )
        with Tracker(opened, "pretrain", logger("off"), total_steps=9, devices=1):
            return opened

    runs = tmp_path / "runs"
    first = go_on("first")
    shutil.copytree(first.path, runs / "copy")
    copy = go_on("copy")
    assert copy.id != first.id == go_on("first").id and go_on("copy").id == copy.id, "told apart, and then the same again"
    log = copy.log_file("driver").read_text().splitlines()
    assert len([line for line in log if f"copied from {first.path}, and is another run to W&B" in line]) == 1
    first.path.rename(runs / "moved")
    assert go_on("moved").id == first.id
    shutil.copytree(runs / "moved", tmp_path / "saved")
    shutil.rmtree(runs / "moved")
    shutil.copytree(tmp_path / "saved", runs / "moved")
    assert go_on("moved").id == first.id
    runs.rename(tmp_path / "elsewhere")
    runs.symlink_to(tmp_path / "elsewhere")
    assert go_on("copy").id == copy.id


def test_the_table_has_a_row_for_each_change() -> None:
    text = summary_table([Change("loss", "nats", "7.1", "3.2"), Change("MaxVio", "", "1.5", "0.1")], title="demo")
    assert all(part in text for part in ("demo", "first", "last", "loss", "nats", "7.1", "3.2", "MaxVio"))
    assert "\x1b" not in text


def test_records_are_json_lines_that_end(run: RunDir) -> None:
    with Tracker(run, "pretrain", OFF, total_steps=2, devices=2) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        text = run.metrics_file.read_text()  # flushed at once
        assert text.endswith("}\n") and json.loads(text)["step"] == 1
