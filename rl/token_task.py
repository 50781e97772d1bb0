"""A task in tokens: its texts, replies and rewards for engines and ranks, which know no text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kernels.errors import UserError
from rl.april import OverlappingPool, complete, submitted_groups
from rl.chat import Chat
from rl.engine.stops import Stops
from rl.evaluation import EVAL_GROUP, Judged, estimate
from rl.rewards.task import Conversation, Prompt, Task
from rl.rewards.workers import Reply, Response, RewardWorkers
from rl.trajectory import Sample, fresh_group
from rl.turns import TurnPool, with_reply
from trainer.config.rl import RLConfig
from trainer.tokenizer import Tokenizer

SHOWN = 80  # characters of a prompt in a message
MOST_CHECKED = 1 << 16  # prompts, of which those with fewer bytes than there may be tokens take microseconds


def check_prompts(task: Task, tokenizer: Tokenizer, config: RLConfig) -> None:
    """Raises UserError where a prompt that the run will draw has no token or leaves no room for a response, and not in the
    round that draws it.

    Looks at the first MOST_CHECKED prompts of training, and at those of the evaluations. A round uses up `rollout.groups`
    prompts, or more where groups are replaced or dropped.
    """
    rollout, frame = config.rollout, Chat.of(config.chat, tokenizer).prompt
    room = config.loop.sequence_length - rollout.max_new_tokens
    submitted = submitted_groups(rollout.groups, rollout)
    keeps_all = rollout.refills == 0 and rollout.stale == "regenerate"
    used_up = rollout.groups if keeps_all else (1 + rollout.refills) * submitted
    drawn = min(MOST_CHECKED, config.loop.rounds * used_up + submitted)
    texts = {task.held_out(index).text for index in range(config.task.eval_prompts)}
    texts |= {task.prompt(index).text for index in range(drawn)}
    around = len(frame.before) + len(frame.behind)
    if not around and "" in texts:
        raise UserError(
            "a prompt of the task is empty and nothing stands before it, so there is no token to go on from; "
            "set chat.bos=true, or leave such prompts out"
        )
    lengths = {text: len(frame.around(text)) for text in texts if around + len(text.encode()) > room}  # no token without a byte
    too_long = {text: length for text, length in lengths.items() if length > room}
    if too_long:
        text, longest = max(too_long.items(), key=lambda item: item[1])
        raise UserError(
            f"{len(too_long)} of {len(texts)} distinct prompts have more than {room} tokens, up to {longest} "
            f"({text[:SHOWN]!r}), and leave no room for rollout.max_new_tokens = {rollout.max_new_tokens} in "
            f"loop.sequence_length = {config.loop.sequence_length}; raise it to {longest + rollout.max_new_tokens}, lower "
            "rollout.max_new_tokens, or leave these prompts out"
        )


@dataclass(frozen=True)
class TokenTask:
    """The task of a run. Groups from EVAL_GROUP on are of its held-out prompts."""

    task: Task
    tokenizer: Tokenizer
    rewards: RewardWorkers
    config: RLConfig

    def prompt_ids(self, group: int) -> list[int]:
        """The prompt of a group, as the model reads it."""
        return self._ids(self._prompt(group))

    def turns(self, pool: OverlappingPool) -> OverlappingPool:
        """The pool, in conversation with the task where the task is one."""
        return TurnPool(pool, self.replied) if isinstance(self.task, Conversation) else pool

    def replied(self, samples: Sequence[Sample]) -> list[Sample]:
        """Finished samples after the task had its say, at most so often that the model has `rollout.max_turns` turns."""
        rollout, replies = self.config.rollout, dict[int, Reply]()
        asked = [sample for sample in samples if len(sample.turns) // 2 + 1 < rollout.max_turns]
        for sample, reply in zip(asked, self.rewards.reply([self.response(sample) for sample in asked]), strict=True):
            replies[sample.uid] = reply
        return [self._with(replies.get(sample.uid, Reply(None)), sample) for sample in samples]

    def _with(self, reply: Reply, sample: Sample) -> Sample:
        if reply.failed:
            return replace(sample, status="abandoned")
        if not reply.text:
            return sample
        return with_reply(sample, self.chat.reply.around(reply.text), self.config.rollout.max_new_tokens)

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        """The rewards of samples that are done."""
        judged = [sample for sample in samples if sample.status != "abandoned"]
        rewards = iter(self.rewards.score([self.response(sample) for sample in judged]))
        return [None if sample.status == "abandoned" else next(rewards) for sample in samples]

    def evaluate(self, pool: OverlappingPool) -> dict[str, float]:
        """The mean reward of one sample for each held-out prompt, with the same noise every time, and its standard error."""
        clock = time.perf_counter()
        found = estimate(self.judged(pool, range(EVAL_GROUP, EVAL_GROUP + self.config.task.eval_prompts)))
        error = {} if found.error is None else {"reward/eval_error": found.error}
        return {"reward/eval_mean": found.mean, **error, "time/eval_s": time.perf_counter() - clock}

    def judged(self, pool: OverlappingPool, groups: Sequence[int]) -> list[Judged]:
        """One response each to the prompts of these groups, less those that could not be judged; the engines must be empty."""
        samples = [fresh_group(group, self.prompt_ids(group), 1).samples[0] for group in groups]
        done = complete(self.turns(pool), samples, self.config.rollout.advance_tokens)
        rewards = zip(done, self.score(done), strict=True)
        found = [(self._prompt(sample.group).text, reward) for sample, reward in rewards if reward is not None]
        if not found:
            raise UserError(
                f"none of the answers to {len(done)} held-out prompts could be judged (every score was None); "
                "check the task's score method and the service it may ask"
            )
        return found

    def demonstration(self, index: int) -> tuple[list[int], list[int], list[bool]]:
        """(prompt ids, the ids of what follows it, which of these are learned): the model's, each turn with its <eos>."""
        prompt, shown = self.task.demonstration(index)
        ids, learned = list[int](), list[bool]()
        for number, turn in enumerate((shown,) if isinstance(shown, str) else shown):
            own = number % 2 == 0
            said = [*self.tokenizer.encode(turn), self.tokenizer.eos] if own else self.chat.reply.around(turn)
            ids += said
            learned += [own] * len(said)
        return self._ids(prompt), ids, learned

    # ------------------------------------------------------------ texts and tokens

    @cached_property
    def chat(self) -> Chat:
        return Chat.of(self.config.chat, self.tokenizer)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(map(self.tokenizer.id_of, self.config.rollout.stop_tokens))

    @cached_property
    def stops(self) -> Stops | None:
        rollout = self.config.rollout
        strings = tuple(string.encode() for string in rollout.stop)
        return Stops(strings, self.tokenizer.spelled(), rollout.include_stop) if strings else None

    def response(self, sample: Sample) -> Response:
        """What the task sees of a sample."""
        turns = (self.text(turn, own=number % 2 == 0) for number, turn in enumerate(sample.turns))
        return Response(self._prompt(sample.group), tuple(turns), sample.status == "finished")

    def text(self, turn: Sequence[int], own: bool) -> str:
        """A turn of the model without what ended it, or one of the environment without the template around it."""
        if not own:
            return self.chat.reply.inside(turn)
        ids = turn[:-1] if turn[-1] in (self.tokenizer.eos, *self.stop_ids) else turn
        return self.tokenizer.decode(ids) if self.stops is None else self.stops.text(ids)

    def _prompt(self, group: int) -> Prompt:
        return self.task.prompt(group) if group < EVAL_GROUP else self.task.held_out(group - EVAL_GROUP)

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.chat.prompt.around(prompt.text)
