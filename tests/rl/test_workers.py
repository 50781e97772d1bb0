"""Rewards from child processes: in order, never a silent 0, and nothing outlives the driver."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from rl.rewards.task import Prompt
from rl.rewards.worker import answered
from rl.rewards.workers import Reply, Response, RewardWorkers
from trainer.config.rl import RewardConfig, TaskConfig

REPOSITORY = Path(__file__).parents[2]
CLEAN = {"reward/timeouts": 0, "reward/errors": 0, "reward/deaths": 0}


def workers(
    folder: Path, said: list[str], count: int = 2, timeout_s: float = 5.0, kind: str = "Scripted", **options: str | float
) -> RewardWorkers:
    task = TaskConfig(name=f"tests.rl.scorers:{kind}", options=options, eval_prompts=1)
    config = RewardConfig(workers=count, timeout_s=timeout_s, memory_gib=1.0)
    return RewardWorkers(task, 0, config, lambda name: folder / f"{name}.log", said.append)


def response(completion: str) -> Response:
    return Response(Prompt("text", "answer"), (completion,), True)


def gone(pids: list[int], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> RewardWorkers:
    with workers(tmp_path_factory.mktemp("calm"), said=[], count=3) as rewards:
        yield rewards


@pytest.mark.parametrize(
    "written", ["write {", 'write {"found": "1"}', 'write {"found": NaN}', 'write {"ready": true}', "flood"]
)
def test_what_is_no_answer_is_no_reward_and_its_process_is_replaced(tmp_path: Path, written: str) -> None:
    """A flood too is seen well before the timeout."""
    said: list[str] = []
    with workers(tmp_path, said, count=1, timeout_s=10.0) as rewards:
        assert rewards.score([response(written), response("reward 2")]) == [None, 2.0]
        assert rewards.counts() == {**CLEAN, "reward/errors": 1}
    assert len(said) == 1 and "wrote" in said[0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.none() | st.floats(-1e300, 1e300), max_size=40))
def test_rewards_come_back_bit_by_bit_in_the_order_of_the_samples(calm: RewardWorkers, expected: list[float | None]) -> None:
    completions = ["none" if reward is None else f"reward {reward!r}" for reward in expected]
    assert calm.score([response(text) for text in completions]) == expected
    assert calm.counts() == CLEAN


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.text(), st.text(), st.booleans())
def test_any_text_reaches_the_scorer(text: str, answer: str, ended: bool) -> None:
    """The messages are JSON in ASCII, so that neither line ends nor halves of surrogate pairs can break them."""

    class Seen:
        def score(self, *found: object) -> float:
            return float(found == (Prompt(text, answer), answer + text, ended))

    request = {"method": "score", "text": text, "answer": answer, "turns": [answer + text], "ended": ended}
    assert answered(Seen(), json.loads(json.dumps(request))) == {"found": 1.0}  # type: ignore[arg-type]


def test_long_completions_arrive_whole(calm: RewardWorkers) -> None:
    assert calm.score([response("reward " + "0" * 5_000_000 + "7\n")] * 2) == [7.0, 7.0]


def test_errors_are_none_counted_and_the_first_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    with workers(tmp_path, said) as rewards:
        found = rewards.score([response(t) for t in ("raise this", "reward 1", "raise that", "text", "reward nan", "none")])
        assert found == [None, 1.0, None, None, None, None]
        assert rewards.counts() == CLEAN | {"reward/errors": 4}
        assert rewards.counts() == CLEAN, "counted since they were last asked for"
        rewards.score([response("raise again")])
    assert len(said) == 1
    assert "task tests.rl.scorers:Scripted: score raised ValueError: no reward for th" in said[0]


@pytest.mark.parametrize("hung", ["hang", "regex"])
def test_a_hung_scorer_is_killed_and_the_others_get_their_rewards(tmp_path: Path, hung: str) -> None:
    said: list[str] = []
    with workers(tmp_path, said, timeout_s=0.5, pids=str(tmp_path)) as rewards:
        found = rewards.score([response(text) for text in (hung, "reward 0.25", hung, "reward 0.5", "late 0.2")])
        assert found == [None, 0.25, None, 0.5, 1.0]
        assert rewards.counts() == CLEAN | {"reward/timeouts": 2}
        pids = [int(file.name) for file in tmp_path.iterdir() if file.name.isdigit()]
        alive = [pid for pid in pids if psutil.pid_exists(pid)]
        assert len(pids) >= 3 and len(alive) <= 2, "hung ones are gone, new ones took their places"
    assert len(said) == 1 and f"reward.timeout_s = 0.5 s on the completion '{hung}'" in said[0]
    assert gone(pids)


@pytest.mark.parametrize(
    ("death", "message"),
    [
        ("exit 3", "ended with exit code 3"),
        ("kill", "was ended by SIGKILL"),
        ("crash", "was ended by SIGSEGV"),
    ],
)
def test_a_scorer_that_dies_is_replaced(tmp_path: Path, death: str, message: str) -> None:
    said: list[str] = []
    with workers(tmp_path, said, count=1) as rewards:
        assert rewards.score([response(text) for text in (death, "reward 1", death, "reward 0")]) == [None, 1.0, None, 0.0]
        assert rewards.counts() == CLEAN | {"reward/deaths": 2}
    assert len(said) == 1 and message in said[0] and str(tmp_path / "reward") in said[0]


def test_a_worker_that_is_killed_from_outside_costs_no_reward(tmp_path: Path) -> None:
    """While it starts, while it is idle, and while it scores."""

    def kill() -> None:
        for child in psutil.Process().children():
            if child.status() != psutil.STATUS_ZOMBIE and "rl.rewards.worker" in child.cmdline():
                child.kill()

    def scoring() -> list[Path]:
        return [file for file in tmp_path.iterdir() if file.name.isdigit()]

    def kill_one_that_scores() -> None:
        while not scoring():
            time.sleep(0.05)
        kill()

    threading.Timer(0.2, kill).start()
    with workers(tmp_path, [], count=1, pids=str(tmp_path), slow_start=0.5) as rewards:
        kill()
        threading.Thread(target=kill_one_that_scores, daemon=True).start()
        assert rewards.score([response(text) for text in ("late 0.3",) * 10]) == [1.0] * 10
        assert rewards.counts() == CLEAN
    assert len(scoring()) >= 2


def test_an_environment_that_fails_is_no_end_of_a_conversation(tmp_path: Path) -> None:
    said: list[str] = []
    texts = ("say hello", "over", "raise it", "number", "hang", "kill", "say bye")
    with workers(tmp_path, said, timeout_s=0.5, kind="Talking") as rewards:
        found = rewards.reply([Response(Prompt("", ""), ("say x", "1:x", text), True) for text in texts])
        failed = Reply(None, failed=True)
        assert found == [Reply("3:hello"), Reply(None), failed, failed, failed, failed, Reply("3:bye")]
        assert rewards.counts() == {"reward/timeouts": 1, "reward/errors": 2, "reward/deaths": 1}
        assert rewards.score([response("reward 1")]) == [1.0]
    assert any("reply raised" in text for text in said) and any("reply took longer" in text for text in said)


def test_a_scorer_that_eats_the_memory_is_an_error(tmp_path: Path) -> None:
    said: list[str] = []
    with workers(tmp_path, said, count=1) as rewards:
        assert rewards.score([response(f"memory {3 << 30}"), response("reward 1")]) == [None, 1.0]
        assert rewards.counts() == CLEAN | {"reward/errors": 1}
    assert "MemoryError" in said[0]


def test_the_time_that_a_task_takes_to_be_made_is_not_the_scorers(tmp_path: Path) -> None:
    with workers(tmp_path, [], count=1, timeout_s=0.4, slow_start=0.8) as rewards:
        assert rewards.score([response("reward 1")]) == [1.0]


def test_a_task_that_a_worker_cannot_make_stops_the_run_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not make task .*Unmakeable: .*exit code 1.*no licence in this process"):
        workers(tmp_path, [], kind="Unmakeable").__enter__()


def test_nothing_is_left_after_the_block(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), workers(tmp_path, [], pids=str(tmp_path)) as rewards:
        rewards.score([response("reward 1")] * 8)
        raise KeyboardInterrupt
    assert gone([int(file.name) for file in tmp_path.iterdir() if file.name.isdigit()])


DRIVER = """
import sys
from pathlib import Path
from tests.rl.test_workers import response, workers
with workers(Path(sys.argv[1]), [], count=3, timeout_s=60, pids=sys.argv[1]) as rewards:
    rewards.score([response("reward 1")] * 30)
    rewards.score([response("child"), response("hang")])
"""


def test_workers_and_what_they_started_do_not_survive_a_killed_driver(tmp_path: Path) -> None:
    """One worker is idle, one waits for a child and one computes."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(driver.pid).children(recursive=True)) or "sleep" not in {c.name() for c in children}:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert len(children) == 4, children
    driver.kill()
    driver.wait()
    assert gone([child.pid for child in children])


def test_a_scorer_that_holds_the_lock_ends_by_itself_when_the_driver_is_gone(tmp_path: Path) -> None:
    code = DRIVER.replace("timeout_s=60", "timeout_s=1").replace('response("child"), response("hang")', 'response("regex")')
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not (tmp_path / "regex").exists():
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(driver.pid).children()
    driver.kill()
    driver.wait()
    assert gone([child.pid for child in children], timeout_s=15)
    assert "Timeout" in "".join(log.read_text() for log in tmp_path.glob("reward/*.log")), "its stack is in the log"
