"""Conversations: through the real engine, the buffer and packing; and the calculator, with its tokens and its workers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from launch.cli import load
from rl.april import complete, rollout_round
from rl.packing import documents_of, pack
from rl.rewards.calculator import Calculator
from rl.rewards.task import Conversation, Prompt, Task, is_held_out
from rl.rewards.tasks import TASKS
from rl.rewards.workers import RewardWorkers
from rl.token_task import TokenTask
from rl.trajectory import Group, RolloutBuffer, Sample, Segment, fresh_group
from rl.turns import TurnPool, with_reply
from tests.rl.algorithm import algorithm_config
from tests.rl.scorers import Talking
from tests.rl.test_april import rollout_config
from tests.rl.test_engine import AHEAD, CONFIG, EOS, LENGTH, MAX_NEW, engine_for, interrupted, requests, trainer_logprobs
from trainer.config.rl import RLConfig
from trainer.config.run import TokenizerConfig
from trainer.model.transformer import LanguageModel
from trainer.tokenizer import Tokenizer, train_tokenizer

# ---------------------------------------------------------------- tokens


def reply_to(sample: Sample) -> tuple[int, ...]:
    """One to three tokens that depend on all that was said; never <eos>."""
    return tuple(2 + (sum(sample.response_ids) + place) % 18 for place in range(1 + len(sample.turns[-1]) % 3))


def replied(samples: Sequence[Sample]) -> list[Sample]:
    """By an environment that replies twice."""
    return [with_reply(s, reply_to(s), MAX_NEW) if len(s.turns) < 5 else s for s in samples]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.initialize(CONFIG, seed=0, batch_invariant=True)


@pytest.fixture(scope="module")
def uninterrupted(model: LanguageModel) -> list[Sample]:
    return complete(TurnPool(engine_for(model), replied), requests(40), advance_tokens=5)


def test_turns_alternate_and_each_reply_is_that_of_the_environment(uninterrupted: list[Sample]) -> None:
    assert {len(sample.turns) for sample in uninterrupted} == {1, 3, 5}, "the fixture shows all"
    for sample in uninterrupted:
        assert sample.length <= MAX_NEW and len(sample.turns) % 2 == 1
        assert sample.status == "truncated" or len(sample.turns) == 5
        for number, turn in enumerate(sample.turns):
            own = number % 2 == 0
            if number < len(sample.turns) - 1 or sample.status == "finished":
                assert (turn[-1] == EOS) == own and EOS not in turn[:-1]
        before = [segment for segment in sample.segments if segment.sampled]
        assert sum(len(s.token_ids) for s in before) == sum(sample.sampled) == sum(len(turn) for turn in sample.turns[::2])
        for place, segment in enumerate(sample.segments):
            if not segment.sampled:
                so_far = replace(sample, segments=sample.segments[:place])
                assert segment.token_ids == reply_to(so_far) and segment.logprobs == ()


def test_the_models_logprobs_are_the_trainers_behind_a_reply_too(model: LanguageModel, uninterrupted: list[Sample]) -> None:
    for sample, expected in zip(uninterrupted, trainer_logprobs(model, uninterrupted), strict=True):
        for found, wanted, sampled in zip(sample.logprobs, expected, sample.sampled, strict=True):
            assert found == (wanted if sampled else 0), "bit for bit"


@AHEAD
def test_interruptions_and_checkpoints_change_nothing(model: LanguageModel, uninterrupted: list[Sample], ahead: bool) -> None:
    pool, waiting, done = TurnPool(engine_for(model, slots=6, ahead=ahead), replied), requests(40), list[Sample]()
    for _ in range(60):
        ended, waiting = interrupted(pool, waiting, 3)
        done += ended
        drained = sorted(waiting, key=lambda item: item.uid)
        groups = [replace(fresh_group(sample.group, (1,), 1), samples=(sample,)) for sample in drained]
        state = json.loads(json.dumps(RolloutBuffer(groups).to_state()))
        waiting = [sample for group in RolloutBuffer.from_state(state).recycled for sample in group.samples]
        if not waiting:
            break
    done.sort(key=lambda item: item.uid)
    assert [(s.turns, s.logprobs, s.sampled, s.status) for s in done] == [
        (s.turns, s.logprobs, s.sampled, s.status) for s in uninterrupted
    ]


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_partial_rollouts_of_conversations_learn_the_models_tokens_only(model: LanguageModel, aggregation: Any) -> None:
    config = rollout_config(groups=3, samples_per_group=3, max_new_tokens=MAX_NEW, advance_tokens=2)
    buffer, seen, resumed = RolloutBuffer(), 0, 0.0
    for version in range(4):
        pool = TurnPool(engine_for(model, slots=4, version=version), replied)
        result = rollout_round(
            pool, buffer, lambda index: (2 + index % 18, 3), config, version, lambda done: [float(s.uid % 2) for s in done]
        )
        resumed += result.metrics["rollout/resumed_samples"]
        documents = documents_of(result.groups, algorithm_config(), version, MAX_NEW)
        assert len(documents) == 9
        for sample, document in zip((s for group in result.groups for s in group.samples), documents, strict=True):
            batch = pack([document], sequence_length=LENGTH, rows_multiple_of=1, aggregation=aggregation, pad_id=0)
            learned = (batch.weights_BS > 0)[0].nonzero().flatten() - (len(sample.prompt_ids) - 1)
            assert learned.tolist() == [place for place, sampled in enumerate(sample.sampled) if sampled]
            assert batch.weights_BS.sum() == pytest.approx(1 if aggregation == "sequence" else sum(sample.sampled))
            seen += not all(sample.sampled)
    assert seen > 5 and resumed > 0, "there were conversations, and they were interrupted"


def test_a_reply_that_leaves_no_room_ends_the_sample() -> None:
    sample = Sample(0, 0, (1,)).extended(Segment((5, EOS), (-1.0, -1.0), 3), "finished")
    assert with_reply(sample, (4, 4, 4), 5) == replace(sample, status="truncated")
    assert with_reply(sample, (), 5) == sample
    going_on = with_reply(sample, (4, 4), 5)
    assert (going_on.status, going_on.turns, going_on.sampled) == ("partial", ((5, EOS), (4, 4)), (True, True, False, False))
    assert Group(0, (going_on,)).versions == {3}


# ---------------------------------------------------------------- the calculator


def test_demonstrations_are_conversations_with_the_calculator_that_are_worth_one() -> None:
    task = Calculator(seed=2, terms=4)
    assert isinstance(task, Conversation) and not isinstance(TASKS["sort"](seed=0), Conversation)
    for index in range(100):
        prompt, turns = task.demonstration(index)
        assert prompt == task.prompt(index) and not is_held_out(prompt.text)
        for number in range(1, len(turns), 2):
            assert task.reply(prompt, turns[:number]) == turns[number]
        assert task.reply(prompt, turns) is None
        assert task.score(prompt, turns[-1], ended=True) == 1
        assert task.score(prompt, turns[-1], ended=False) == task.score(prompt, turns[0], ended=True) == 0
        assert int(prompt.answer) == eval(prompt.text.removeprefix("# ").removesuffix(" ="))


def test_the_calculator_says_when_it_cannot_read_a_call() -> None:
    task = Calculator(seed=0)
    assert task.reply(task.prompt(0), [" calc 6 * -7"]) == " -42"
    for call in ("calc", "calc 1", "calc 9**9", "calc 1 + " + "9" * 99, "calc 1 / 2"):
        assert task.reply(task.prompt(0), [call]) == " error"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = " ".join(" ".join(Calculator(seed=0).demonstration(index)[1]) for index in range(50))
    return train_tokenizer([text], TokenizerConfig(vocab_size=300, train_mib=1), tmp_path_factory.mktemp("cache"), print)


Player = Callable[[str, Sequence[str]], str]  # the prompt and the turns so far -> the model's next turn


class PlayerPool:
    """A pool whose model is a function of text, a turn in each advance."""

    def __init__(self, tokenizer: Tokenizer, player: Player) -> None:
        self.tokenizer, self.player = tokenizer, player
        self.waiting: list[Sample] = []

    def submit(self, samples: Sequence[Sample]) -> None:
        self.waiting += samples

    def advance(self, tokens: int) -> list[Sample]:
        done, self.waiting = [self._played(sample) for sample in self.waiting], []
        return done

    def drain(self) -> list[Sample]:
        return []

    def _played(self, sample: Sample) -> Sample:
        said = self.player(self.tokenizer.decode(sample.prompt_ids), [self.tokenizer.decode(turn) for turn in sample.turns])
        ids = (*self.tokenizer.encode(said), self.tokenizer.eos)
        return sample.extended(Segment(ids, (-1.0,) * len(ids), 0), "finished")


def good_player(prompt: str, turns: Sequence[str]) -> str:
    total, *steps = re.findall(r"[-+]|\d+", prompt)
    steps = steps[len(turns) :]
    total = turns[-1].strip() if turns else total
    return f" calc {total} {steps[0]} {steps[1]}" if steps else f" {total}"


def player_who_never_answers(prompt: str, turns: Sequence[str]) -> str:
    return f" calc {len(turns)} + 1"


@pytest.fixture(scope="module")
def in_tokens(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TokenTask]]:
    """Tasks in tokens; their reward workers are real."""
    folder, made = tmp_path_factory.mktemp("workers"), list[RewardWorkers]()

    def make(task: Task, *options: str) -> TokenTask:
        config = load(RLConfig, "rl", ["checkpoint=a", "rollout.max_new_tokens=100", "task.eval_prompts=12", *options])
        made.append(RewardWorkers(config.task, config.seed, config.reward, lambda name: folder / name, print))
        return TokenTask(task, tokenizer, made[-1].__enter__(), config)

    yield make
    for workers in made:
        workers.__exit__(None, None, None)


def test_a_model_that_uses_the_calculator_is_rewarded(in_tokens: Callable[..., TokenTask], tokenizer: Tokenizer) -> None:
    task = in_tokens(Calculator(seed=0), "task=calculator", "rollout.max_turns=3")
    assert task.evaluate(PlayerPool(tokenizer, good_player))["reward/eval_mean"] == 1  # type: ignore[arg-type]
    never = PlayerPool(tokenizer, player_who_never_answers)
    assert task.evaluate(never)["reward/eval_mean"] == 0  # type: ignore[arg-type]
    group = fresh_group(5, task.prompt_ids(5), 3)
    done = complete(task.turns(PlayerPool(tokenizer, player_who_never_answers)), group.samples, 4)  # type: ignore[arg-type]
    assert [len(sample.turns) for sample in done] == [5, 5, 5], "three turns of the model"
    assert [tokenizer.decode(turn) for turn in done[0].turns[1::2]] == [" 1", " 3"]


def test_a_conversation_whose_environment_failed_has_no_reward(
    in_tokens: Callable[..., TokenTask], tokenizer: Tokenizer
) -> None:
    task = in_tokens(Talking(seed=0), "task.name=tests.rl.scorers:Talking", "task.options={}")
    scripts = {0: ["say 5", "reward 0.5"], 1: ["say 5", "raise no"], 2: ["reward 1", "reward 0.25"], 3: ["reward 0.75", "over"]}

    def player(prompt: str, turns: Sequence[str]) -> str:
        return scripts[int(prompt)][len(turns) // 2] if len(turns) < 4 else "over"

    samples = [fresh_group(index, task.prompt_ids(index), 1).samples[0] for index in scripts]
    done = complete(task.turns(PlayerPool(tokenizer, player)), samples, 4)  # type: ignore[arg-type]
    assert [sample.status for sample in done] == ["finished", "abandoned", "finished", "finished"]
    assert task.score(done)[1] is None
    assert task.rewards.counts()["reward/errors"] > 0


class OneSum(Calculator):
    def demonstration(self, index: int) -> tuple[Prompt, tuple[str, ...]]:
        return Prompt("# 1 + 2 =", "3"), (" calc 1 + 2", " 3", " 3")


def test_a_demonstration_learns_the_models_turns(in_tokens: Callable[..., TokenTask], tokenizer: Tokenizer) -> None:
    task = in_tokens(OneSum(seed=0), "task=calculator")
    prompt_ids, ids, learned = task.demonstration(0)
    assert prompt_ids == [tokenizer.bos, *tokenizer.encode("# 1 + 2 =")]
    own = [token for token, is_own in zip(ids, learned, strict=True) if is_own]
    assert own == [*tokenizer.encode(" calc 1 + 2"), tokenizer.eos, *tokenizer.encode(" 3"), tokenizer.eos]
    assert tokenizer.decode([token for token, is_own in zip(ids, learned, strict=True) if not is_own]) == " 3"


def test_a_template_stands_around_replies_and_the_task_does_not_see_it(
    in_tokens: Callable[..., TokenTask], tokenizer: Tokenizer
) -> None:
    task = in_tokens(OneSum(seed=0), "task=calculator", "chat.bos=false", "chat.reply='<|bos|>tool:{text};'")
    _, ids, learned = task.demonstration(0)
    reply = [token for token, is_own in zip(ids, learned, strict=True) if not is_own]
    assert reply == [tokenizer.bos, *tokenizer.encode("tool:"), *tokenizer.encode(" 3"), *tokenizer.encode(";")]
    assert task.text(reply, own=False) == " 3"
    assert task.prompt_ids(5) == tokenizer.encode(task.task.prompt(5).text)
