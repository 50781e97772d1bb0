"""A request to stop waits for the step inside the loop and acts at once outside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import CTRL_C, guarded, load
from trainer.cluster import run_attempts
from trainer.config.run import PretrainConfig
from trainer.stopping import REQUEUE, SIGNALS, Interrupted, Move, Moved, Stopped, StopRequest, finished_first

STEP = "the end of this step"


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """The end of the terminal acts, also in tests that nohup has started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGHUP])
def test_a_signal_in_the_loop_is_kept_until_the_loop_asks(number: signal.Signals) -> None:
    with StopRequest() as stop, stop.deferred(STEP):
        stop.obey("after step 1")
        signal.raise_signal(number)
        assert stop.signal == number.name
        with pytest.raises(Stopped, match=rf"stopped by {number.name} after step 2; resume=auto goes on"):
            stop.obey("after step 2")


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGHUP])
def test_a_signal_acts_after_what_is_finished_first(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    came: list[int] = []
    before = signal.signal(number, lambda sent, _: came.append(sent))
    try:
        with finished_first("the report"):
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert came == []
        assert came == [number]
        with finished_first("the report"):
            pass
        assert came == [number]
    finally:
        signal.signal(number, before)
    assert capfd.readouterr().err == f"\n{number.name}: waiting for the report to be written\n"


def test_ctrl_c_acts_after_what_is_finished_first_and_the_second_at_once() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), finished_first("the report"):
        signal.raise_signal(signal.SIGINT)
        done.append("once")
    with pytest.raises(KeyboardInterrupt), finished_first("the report"):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("twice")
    assert done == ["once"]


def test_a_signal_outside_the_loop_stops_at_once() -> None:
    with StopRequest(), pytest.raises(Stopped, match="stopped by SIGTERM before a step was made"):
        signal.raise_signal(signal.SIGTERM)


def test_a_loop_that_had_better_go_on_elsewhere_is_told_so_and_a_signal_comes_first() -> None:
    moves = iter([None, move := Move("a will go", frozenset("a")), move])
    with StopRequest() as stop:
        with stop.deferred(STEP, lambda: next(moves)):
            assert not stop.asked()
            stop.obey("after step 1")
            assert stop.asked() and stop.move == move
            with pytest.raises(Moved, match="a will go: the ranks start again after step 2") as caught:
                stop.obey("after step 2")
            assert caught.value.move == move
        with stop.deferred(STEP, lambda: move):
            signal.raise_signal(signal.SIGUSR1)
            assert stop.asked() and stop.move is None
            with pytest.raises(Stopped, match="stopped by SIGUSR1 after step 3"):
                stop.obey("after step 3")


def test_a_run_that_is_bound_to_its_nodes_stops_when_one_is_to_go() -> None:
    move = Move("a will go, with ranks", frozenset("a"), elsewhere=False)
    with StopRequest() as stop, stop.deferred(STEP, lambda: move):
        assert stop.asked() and stop.leaving is None
        with pytest.raises(Stopped, match=r"a will go, with ranks, and cluster\.nodes .*: stopped after step 2; resume=auto"):
            stop.obey("after step 2")


def test_a_signal_that_comes_while_the_run_prepares_to_move_ends_it() -> None:
    with StopRequest() as stop, stop.deferred(STEP, lambda: Move("a will go", frozenset("a"))):
        assert stop.asked() and stop.leaving == frozenset("a")
        signal.raise_signal(signal.SIGTERM)
        assert stop.leaving is None, "what is in memory goes with the run"
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 2"):
            stop.obey("after step 2")


def test_who_listened_before_listens_again() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with StopRequest():
            pass
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


def test_ctrl_c_is_kept_too_and_says_what_it_waits_for_and_once_more_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop, stop.deferred(STEP):
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err.strip() == "Ctrl-C: waiting for the end of this step; Ctrl-C again ends at once"
        assert stop.asked()
        with pytest.raises(Interrupted, match="stopped by Ctrl-C after step 2; resume=auto goes on"):
            stop.obey("after step 2")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_outside_the_loop_is_an_orderly_stop_until_it_comes_again() -> None:
    with StopRequest() as stop:
        with pytest.raises(Interrupted, match="stopped by Ctrl-C before a step was made"):
            signal.raise_signal(signal.SIGINT)
        with stop.deferred("a checkpoint"), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_the_end_of_a_terminal_are_not_heeded_where_shell_or_nohup_have_had_them_ignored(
    number: signal.Signals,
) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(number)
            assert not stop.asked()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_command_that_was_interrupted_says_so_and_does_not_ask_to_be_started_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        raise Interrupted("stopped by Ctrl-C after step 3; resume=auto goes on")

    assert guarded(work) == CTRL_C == 130
    assert "after step 3" in capsys.readouterr().err


def test_a_command_that_was_stopped_asks_to_be_started_again(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise Stopped("stopped by SIGTERM after step 3; resume=auto goes on")

    assert guarded(work) == REQUEUE == 75
    assert "after step 3" in capsys.readouterr().err


def test_what_ends_already_is_left_alone_but_for_a_second_ctrl_c(capfd: pytest.CaptureFixture[str]) -> None:
    """As by a job's manager that sends one signal after the other, while Ray is shut down."""
    with StopRequest() as stop:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        said = capfd.readouterr().err.strip()
        assert said == "Ctrl-C: waiting for what has been started to end; Ctrl-C again ends at once"
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_behind_a_move_brings_to_the_disk_what_the_ranks_moved_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """They had kept it in memory only, and no other attempt begins."""
    monkeypatch.setattr("trainer.cluster.start_ray", lambda *_: None)
    brought: list[str] = []
    attempts = iter([Moved(Move("a will go", frozenset("a")), "after step 2")])

    def attempt() -> None:
        moved = next(attempts)
        with stop.deferred(STEP):
            signal.raise_signal(signal.SIGTERM)
        raise moved

    config = load(PretrainConfig, "pretrain", []).cluster
    with StopRequest() as stop, pytest.raises(Stopped, match="stopped by SIGTERM before another attempt"):
        run_attempts(config, 1, attempt, lambda: -1, stop, lambda: brought.append("step 2"), lambda text: None)
    assert brought == ["step 2"]


@pytest.mark.parametrize("disguise", [SystemError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ray_makes_of_a_signal_is_an_orderly_stop_all_the_same(
    monkeypatch: pytest.MonkeyPatch, disguise: type[BaseException], number: signal.Signals
) -> None:
    """Its core drops what a handler raises while it waits for the ranks."""
    monkeypatch.setattr("trainer.cluster.start_ray", lambda *_: None)
    brought: list[str] = []

    def attempt() -> None:
        try:
            signal.raise_signal(number)
        except Stopped:
            raise disguise from None

    config = load(PretrainConfig, "pretrain", []).cluster
    with StopRequest() as stop, pytest.raises(Stopped, match="before a step was made; resume=auto goes on") as caught:
        run_attempts(config, 1, attempt, lambda: -1, stop, lambda: brought.append("all"), lambda text: None)
    assert isinstance(caught.value, Interrupted) == (number == signal.SIGINT) and brought == ["all"]


def test_ctrl_c_while_ray_starts_is_kept_until_it_has(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.cluster.start_ray", lambda *_: signal.raise_signal(signal.SIGINT))
    config = load(PretrainConfig, "pretrain", []).cluster
    with StopRequest() as stop, pytest.raises(Interrupted, match="stopped by Ctrl-C before another attempt"):
        run_attempts(config, 1, pytest.fail, lambda: -1, stop, lambda: None, lambda text: None)
    assert "Ctrl-C: waiting for Ray, which is being started; Ctrl-C again" in capfd.readouterr().err


def test_ctrl_c_while_a_command_is_still_being_imported_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    ended = subprocess.run(
        [sys.executable, "-m", "launch.pretrain"], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGINT and ended.stderr.strip() == "stopped by Ctrl-C before anything was started"
