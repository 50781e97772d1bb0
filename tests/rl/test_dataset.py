"""A task out of a file: GSM8K-like JSON lines, Parquet, the split, demonstrations, and what may be wrong with the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from kernels.errors import UserError
from launch.cli import load
from rl.rewards.dataset import Dataset
from rl.rewards.task import Task, is_held_out
from rl.rewards.tasks import check_task, make_task
from rl.token_task import check_prompts
from tests.rl.test_turns import tokenizer  # noqa: F401 - fixture
from trainer.config.rl import RLConfig, TaskConfig
from trainer.tokenizer import Tokenizer

ROWS = [
    {
        "question": f"What is {n} + {n}?",
        "answer": f"It is {n} twice.\n#### {2 * n}",
        "level": n % 3,
        "hint": None if n % 2 else "add",
    }
    for n in range(200)
]
GSM8K: dict[str, Any] = {"verifier": "math", "prompt_field": "question", "answer_pattern": r"####\s*(.+)"}


@pytest.fixture(params=["jsonl", "parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"train.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def dataset(path: Path, seed: int = 0, **options: Any) -> Task:
    return make_task(TaskConfig(name="dataset", options={"path": str(path), **options}, eval_prompts=4), seed)


def test_grpo_on_a_file_needs_no_code(file: Path) -> None:
    task = dataset(file, **GSM8K)
    check_task(task, warmup_steps=0)
    prompt = task.prompt(3)
    number = int(prompt.text.split()[2])
    assert prompt.answer == str(2 * number)
    assert task.score(prompt, f"Twice {number} makes \\boxed{{{2 * number}}}.", ended=True) == 1
    assert task.score(prompt, f"\\boxed{{{2 * number}}}", ended=False) == 0
    assert task.score(prompt, "\\boxed{1}", ended=True) == 0
    assert dataset(file, **GSM8K, must_end=False).score(prompt, f"{2 * number}", ended=False) == 1


def test_every_training_prompt_comes_once_an_epoch_in_an_order_of_its_own(file: Path) -> None:
    task = dataset(file, **GSM8K)
    texts = {row["question"] for row in ROWS}
    training = {text for text in texts if not is_held_out(text)}  # type: ignore[arg-type]
    count = len(training)
    epochs = [[task.prompt(epoch * count + place).text for place in range(count)] for epoch in range(3)]
    assert all(set(epoch) == training for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [task.prompt(place).text for place in range(count)] == epochs[0], "earlier ones can be asked for again"
    again, other = dataset(file, **GSM8K), dataset(file, 1, **GSM8K)
    assert [again.prompt(place).text for place in range(count)] == epochs[0]
    assert [other.prompt(place).text for place in range(count)] != epochs[0]
    held_out = {task.held_out(index).text for index in range(300)}
    assert held_out == texts - training and 10 < len(held_out) < 45
    assert {other.held_out(index).text for index in range(300)} == held_out


def test_demonstrations_come_from_their_field_and_from_rows_that_train(file: Path) -> None:
    task = dataset(file, **GSM8K, demonstration_field="hint")
    for index in range(150):
        prompt, completion = task.demonstration(index)
        assert completion == "add" and not is_held_out(prompt.text) and int(prompt.text.split()[2]) % 2 == 0


def test_a_warm_up_without_demonstrations_is_an_error_before_anything_starts(file: Path) -> None:
    with pytest.raises(UserError, match=r"has no field for them; set task.options.demonstration_field .*: warmup=none"):
        check_task(dataset(file, **GSM8K), warmup_steps=1)
    with pytest.raises(UserError, match="has none in field 'solution'"):
        check_task(dataset(file, **GSM8K, demonstration_field="solution"), warmup_steps=1)


def test_a_template_and_answers_that_are_no_text(file: Path) -> None:
    task = dataset(file, verifier="exact", prompt_field="question", answer_field="level", template="Q: {prompt}\nA:")
    prompt = task.prompt(0)
    assert prompt.text.startswith("Q: What is ") and prompt.text.endswith("?\nA:")
    assert prompt.answer in ("0", "1", "2") and task.score(prompt, prompt.answer, True) == 1


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "cannot be read: No such file"),
        ("", {}, "has 0 rows, and none is for training"),
        (
            '{"prompt": "a"}\n',
            {},
            r"line 1 has no field 'answer'; its fields are 'prompt'.*set task.options.answer_field=prompt",
        ),
        ('{"promt": "a", "answer": 1}\n', {}, r"no field 'prompt'.*set task.options.prompt_field=promt"),
        ('{"prompt": "a", "answer": null}\n', {}, "no field 'answer'"),
        ("[]\n", {}, "line 1 is a JSON array, not an object; task=dataset wants lines with 'prompt' and 'answer'"),
        ("{\n", {}, "line 1 is not JSON"),
        (
            '{"prompt": "a", "answer": "b"}\n',
            {"answer_pattern": "#"},
            "line 1: task.options.answer_pattern '#' is not in the answer",
        ),
        ('{"prompt": "a", "answer": "b"}\n', {}, "none is held out"),
        (
            '{"prompt": [{"role": "user", "content": "2 + 2"}], "answer": 4}\n',
            {},
            r"line 1: field 'prompt' is \[{\"role\": \"user\", .* and not text; set task.options.prompt_field .* chat=chatml",
        ),
        ('{"prompt": "a", "answer": "b", "shown": {}}\n', {"demonstration_field": "shown"}, "field 'shown' is {} and not text"),
        ("", {"answer_pattern": "("}, "is no regular expression"),
        ("", {"template": "Q:"}, "it needs {prompt}"),
        ("", {"verifer": "math"}, "unexpected keyword argument 'verifer'; it takes: pattern, ignore_case"),
    ],
)
def test_what_is_wrong_with_a_file_or_an_option_is_said(
    tmp_path: Path, content: str | None, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        check_task(dataset(path, **{"verifier": "exact"} | options), warmup_steps=0)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR0")
    with pytest.raises(UserError, match="is not a Parquet file"):
        dataset(tmp_path / "broken.parquet", verifier="exact").prompt(0)
    with pytest.raises(UserError, match=r"neither a .jsonl nor a .parquet file"):
        dataset(tmp_path / "data.csv", verifier="exact").prompt(0)


def test_a_worker_makes_the_task_without_reading_the_file(tmp_path: Path) -> None:
    task = dataset(tmp_path / "missing.jsonl", verifier="exact")
    assert isinstance(task, Dataset)


def test_an_empty_prompt_needs_a_token_before_it(tokenizer: Tokenizer, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in ["", *map(str, range(60))]))
    task = dataset(path, verifier="exact")
    check_prompts(task, tokenizer, load(RLConfig, "rl", ["checkpoint=a"]))
    with pytest.raises(UserError, match=r"a prompt of the task is empty .*chat.bos=true"):
        check_prompts(task, tokenizer, load(RLConfig, "rl", ["checkpoint=a", "chat.bos=false"]))


def test_a_prompt_that_leaves_no_room_is_found_before_the_round_that_draws_it(tokenizer: Tokenizer, tmp_path: Path) -> None:  # noqa: F811
    """Also in training, where it may come after hours: options of a run that is continued cannot change."""
    long = next(text for n in range(99) if not is_held_out(text := f"{n} " + "zq " * 40))
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": f"What is {n}?", "answer": "1"} for n in range(60)] + [{"prompt": long, "answer": "1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dataset(path, verifier="exact")
    sizes = ["rollout.groups=8", "loop.rounds=8", "rollout.max_new_tokens=32", "task.eval_prompts=4"]

    def config(length: int, *changes: str) -> RLConfig:
        return load(RLConfig, "rl", ["checkpoint=a", *sizes, f"loop.sequence_length={length}", *changes])

    tokens = 1 + len(tokenizer.encode(long))  # with <bos>
    check_prompts(task, tokenizer, config(tokens + 32))
    with pytest.raises(
        UserError, match=f"1 of .* up to {tokens} .*max_new_tokens = 32 .*{tokens + 31}; raise it to {tokens + 32}"
    ):
        check_prompts(task, tokenizer, config(tokens + 31))
    few = config(tokens + 31, "rollout.groups=2", "loop.rounds=2", "task.eval_prompts=1")
    check_prompts(task, tokenizer, few)  # draws 8 of them at most
    for more in ("rollout.refills=30", "rollout.over_provision=30 rollout.stale=drop"):
        with pytest.raises(UserError, match="leave no room"):
            check_prompts(task, tokenizer, config(tokens + 31, "rollout.groups=2", "loop.rounds=2", *more.split()))
