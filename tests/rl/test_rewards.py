"""Tasks: prompts, demonstrations, scores, and how a task is found."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from rl.rewards.task import Prompt, Task, item_reward
from rl.rewards.tasks import TASKS, make_task
from trainer.config.rl import TaskConfig

items = st.lists(st.sampled_from("abc"), min_size=1, max_size=6)


def task_config(name: str, **options: int | float | str | bool) -> TaskConfig:
    return TaskConfig(name=name, options=options, eval_prompts=4)


@pytest.fixture(params=["brackets", "countdown", "sort"])
def task(request: pytest.FixtureRequest) -> Task:
    return make_task(task_config(request.param), seed=3)


def test_prompts_are_a_function_of_seed_and_index(task: Task) -> None:
    again, other = (make_task(task_config(name), seed) for name, seed in ((_name(task), 3), (_name(task), 4)))
    assert [task.prompt(index) for index in range(50)] == [again.prompt(index) for index in reversed(range(50))][::-1]
    assert [task.prompt(index) for index in range(50)] != [other.prompt(index) for index in range(50)]


def _name(task: Task) -> str:
    return next(name for name, kind in TASKS.items() if type(task) is kind)


def test_held_out_prompts_are_never_trained_on_whatever_the_seed(task: Task) -> None:
    other = make_task(task_config(_name(task)), seed=99)
    trained = {source.prompt(index).text for source in (task, other) for index in range(500)}
    held_out = {source.held_out(index).text for source in (task, other) for index in range(200)}
    assert not trained & held_out
    assert len(held_out) >= 5


def test_demonstrations_are_worth_one_and_less_when_they_do_not_end(task: Task) -> None:
    for index in range(50):
        prompt, text = task.demonstration(index)
        assert prompt == task.prompt(index)
        assert task.score(prompt, text, ended=True) == 1
        assert task.score(prompt, text, ended=False) == pytest.approx(0.6)
        assert task.score(prompt, "", ended=True) == 0
        assert task.score(prompt, " no idea", ended=True) == 0


def test_mistakes_come_at_their_rate_and_each_is_one_that_costs(task: Task) -> None:
    sloppy = make_task(task_config(_name(task), mistakes=0.4), seed=3)
    examples = [sloppy.demonstration(index) for index in range(400)]
    rewards = [sloppy.score(prompt, text, ended=True) for prompt, text in examples]
    wrong = [reward for reward in rewards if reward != 1]
    assert len(wrong) / len(rewards) == pytest.approx(0.4, abs=0.1)
    assert examples == [sloppy.demonstration(index) for index in range(400)]
    assert [prompt for prompt, _ in examples] == [task.prompt(index) for index in range(400)]


def test_answers_differ_in_length(task: Task) -> None:
    lengths = sorted(len(task.prompt(index).answer.split()) for index in range(300))
    assert lengths[-1] >= 4 * lengths[len(lengths) // 10]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(items, items, st.booleans())
def test_rewards_lie_in_the_unit_interval_and_only_the_right_answer_gets_one(
    expected: list[str], given_items: list[str], ended: bool
) -> None:
    reward = item_reward(expected, given_items, ended)
    assert 0 <= reward <= 1
    assert (reward == 1) == (expected == given_items and ended)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(items, st.integers(1, 5))
def test_a_longer_right_prefix_pays_and_too_many_items_cost(expected: list[str], count: int) -> None:
    rewards = [item_reward(expected, expected[:length], True) for length in range(len(expected) + 1)]
    assert rewards == sorted(rewards) and len(set(rewards)) == len(rewards)
    assert item_reward(expected, expected + ["x"] * count, True) < item_reward(expected, expected, False) + 0.1


def test_answers_follow_from_the_text_of_the_prompt() -> None:
    for index in range(100):
        sort, countdown, brackets = (make_task(task_config(n), 1).prompt(index) for n in ("sort", "countdown", "brackets"))
        numbers = sort.text.removeprefix("# sort ").removesuffix(":").split()
        assert sort.answer.split() == sorted(numbers, key=int)
        number, first, last = map(int, re.findall(r"\d+", countdown.text))
        assert 0 <= number < 10
        expected = [(first - place) % 10 for place in range(1 + (first - last) % 10)]
        assert [int(digit) for digit in countdown.answer.split()] == expected
        nested = "".join((brackets.text.removeprefix("# close ").removesuffix(":") + brackets.answer).split())
        while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", nested)) != nested:
            nested = shorter
        assert nested == ""


@pytest.mark.parametrize(("exercises", "prompts", "held_out"), [(10, 900, 116), (0, 90, 8)])
def test_countdown_holds_out_as_many_prompts_as_its_page_says(exercises: int, prompts: int, held_out: int) -> None:
    task = make_task(task_config("countdown", exercises=exercises), 5)
    found = [{side(index).text for index in range(9000)} for side in (task.prompt, task.held_out)]
    assert [len(texts) for texts in found] == [prompts - held_out, held_out]
    with pytest.raises(UserError, match=r"task.options.exercises is -1; countdown needs a number >= 0"):
        make_task(task_config("countdown", exercises=-1), 0)


def test_white_space_around_items_does_not_matter() -> None:
    task = make_task(task_config("countdown"), 0)
    assert task.score(Prompt("", "2 1 0"), "\n2  1 0 ", ended=True) == 1


class Echo:
    """A task of one's own."""

    def __init__(self, seed: int, word: str) -> None:
        self.word = word

    def prompt(self, index: int) -> Prompt:
        return Prompt(f"{self.word} {index}", self.word)

    held_out = prompt

    def demonstration(self, index: int) -> tuple[Prompt, str]:
        return self.prompt(index), self.word

    def score(self, prompt: Prompt, completion: str, ended: bool) -> float | None:
        return None


class NoScore:
    def __init__(self, seed: int) -> None:
        pass

    def prompt(self, index: int) -> Prompt:
        return Prompt("", "")


def test_a_task_of_ones_own_is_found_by_its_import_path() -> None:
    task = make_task(task_config(f"{__name__}:Echo", word="hi"), 0)
    assert task.prompt(3) == Prompt("hi 3", "hi")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (task_config("sorting"), "known tasks: brackets, calculator, countdown, dataset, sort"),
        (task_config("no_such_module:Class"), "module 'no_such_module' cannot be imported"),
        (task_config(f"{__name__}:Missing"), "has no class 'Missing'"),
        (task_config(f"{__name__}:NoScore"), "lacks held_out, demonstration, score"),
        (task_config("sort", lenght=3), "got an unexpected keyword argument 'lenght'; it takes seed and: longest"),
        (task_config(f"{__name__}:Echo"), "missing a required argument: 'word'"),
        (task_config("sort", longest=2), "longest is 2"),
        (task_config("brackets", mistakes=1.5), "mistakes is 1.5"),
    ],
)
def test_a_wrong_task_is_an_error_that_says_what_there_is(config: TaskConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(config, 0)
