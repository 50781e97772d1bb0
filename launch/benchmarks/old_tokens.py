"""`python -m launch.bench old_tokens`: how well treatments of old tokens learn, with a policy so small that a run takes
seconds.

Rounds, buffer, advantages, packing and objective are those of launch.rl; only the model differs: two hidden layers that see the
prompt's two digits, the last token and its position, and count down (rl/rewards/lists.py, with the demo's share of wrong
demonstrations). So there can be enough seeds to tell treatments apart, and the learning rate can be chosen so that old tokens
are as unlikely to the policy as in one's own run (policy/mismatch_abs). All modes of a seed begin with the same weights.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from rich.table import Table
from torch import Tensor, nn

from launch.benchmarks.learning import difference, standard_error
from launch.benchmarks.options import FileOptions, OneOrMore
from launch.benchmarks.timing import Ceilings
from rl.algorithms import PolicyObjective
from rl.april import complete, rollout_round
from rl.engine.pool import advancing
from rl.evaluation import EVAL_GROUP, FINAL_GROUP
from rl.extras import PROXIMAL
from rl.packing import documents_of, policy_batches
from rl.rewards.lists import Countdown
from rl.rewards.task import Prompt
from rl.trajectory import Group, RolloutBuffer, Sample, Segment, fresh_group
from trainer.batch import Predictions, TrainBatch
from trainer.config.rl import RLConfig
from trainer.model.attention import positions_of
from trainer.optimizer import learning_rate

EOS, VOCABULARY = 10, 11  # tokens 0..9 are the digits
ROW = 64  # tokens
HIDDEN = 128
WARMUP_STEPS, WARMUP_EXAMPLES, WARMUP_RATE, MISTAKES = 300, 64, 3e-3, 0.7


class OldTokensOptions(FileOptions):
    modes: OneOrMore[str] = Field(description="of conf/rollout, with options after +; differences are to the first")
    lr: OneOrMore[PositiveFloat] = Field(description="highest rates; each is a table of its own")
    seeds: PositiveInt = Field(description="runs of each mode")
    rounds: PositiveInt
    prompts: PositiveInt = Field(description="that an evaluation draws")

    def config(self, mode: str, lr: float) -> RLConfig:
        from launch.cli import load  # here, since the other benchmarks do without Hydra

        name, *options = mode.split("+")
        fixed = ["checkpoint=none", f"loop.rounds={self.rounds}", f"loop.sequence_length={ROW}", f"optimizer.lr={lr}"]
        return load(RLConfig, "rl", [*fixed, f"rollout={name}", *options])


TREATED = ",".join(f"april+algorithm.off_policy={way}" for way in ("bypass", "decoupled", "recompute", "mask"))
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    kind: {"modes": f"sync,{TREATED}", "lr": "0.007,0.014", "seeds": 12, "rounds": 32, "prompts": 400}
    for kind in ("cuda", "cpu")
}  # fmt: skip


class TinyPolicy(nn.Module):
    """The next token, from the prompt's two digits, the token before and how many tokens of the response there are."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (10, 10, VOCABULARY, ROW)
        self.seen = nn.ModuleList(nn.Embedding(size, HIDDEN) for size in sizes)
        for table in self.seen.parameters():  # as small as a linear map of all of them has it
            nn.init.uniform_(table, -(sum(sizes) ** -0.5), sum(sizes) ** -0.5)
        self.deeper, self.head = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, seen_N4: Tensor) -> Tensor:
        """Log-probabilities (N, VOCABULARY)."""
        first = torch.stack([table(seen_N4[:, number]) for number, table in enumerate(self.seen)]).sum(dim=0)
        logits_NV: Tensor = self.head(torch.tanh(self.deeper(torch.tanh(first))))
        return logits_NV.log_softmax(dim=-1)

    def predicted(self, batch: TrainBatch) -> Predictions:
        """What a trainer says of packed rows; a document begins with the two digits."""
        places_BS = positions_of(batch.documents_BS)
        starts_BS = torch.arange(ROW) - places_BS
        first_BS = batch.tokens_BS.gather(1, starts_BS)
        last_BS = batch.tokens_BS.gather(1, (starts_BS + 1).clamp(max=ROW - 1))
        seen = torch.stack([first_BS, last_BS, batch.tokens_BS, (places_BS - 1).clamp(min=0)], dim=-1).flatten(0, 1)
        seen[:, :2].clamp_(max=9)  # padding
        logprobs_TV = self(seen)
        logprobs_T = logprobs_TV.gather(1, batch.targets_BS.flatten()[:, None])[:, 0]
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1)
        return Predictions(logprobs_T.view_as(places_BS), entropy_T.view_as(places_BS))


@dataclass
class _Row:
    sample: Sample
    response: list[int]
    logprobs: list[float] = field(default_factory=list)  # of the tokens that are new


class TinyPool:
    """An `OverlappingPool` of one engine that generates by a TinyPolicy."""

    def __init__(self, policy: TinyPolicy, config: RLConfig, seed: int) -> None:
        self.policy, self.version = policy, 0
        self._slots, self._longest = config.rollout.engine_slots, config.rollout.max_new_tokens
        self._noise = np.random.default_rng(seed)
        self._waiting, self._rows = deque[Sample](), list[_Row]()

    def submit(self, samples: Sequence[Sample]) -> None:
        self._waiting.extend(samples)

    @torch.no_grad()
    def advance(self, tokens: int) -> list[Sample]:
        done = list[Sample]()
        for _ in range(tokens):
            while self._waiting and len(self._rows) < self._slots:
                sample = self._waiting.popleft()
                self._rows.append(_Row(sample, list(sample.response_ids)))
            if not self._rows:
                break
            seen = [
                [*row.sample.prompt_ids, (row.response or row.sample.prompt_ids)[-1], len(row.response)] for row in self._rows
            ]
            logprobs_NV = self.policy(torch.tensor(seen))
            chosen_N = (logprobs_NV + torch.from_numpy(self._noise.gumbel(size=logprobs_NV.shape))).argmax(dim=-1)
            told = logprobs_NV.gather(1, chosen_N[:, None])[:, 0].tolist()
            for row, token, logprob in zip(self._rows, chosen_N.tolist(), told, strict=True):
                row.response.append(token)
                row.logprobs.append(logprob)
            done += [self._left(row) for row in self._rows if self._ended(row)]
            self._rows = [row for row in self._rows if not self._ended(row)]
        return done

    def drain(self) -> list[Sample]:
        unfinished = [*map(self._left, self._rows), *self._waiting]
        self._rows = []
        self._waiting.clear()
        return unfinished

    def going_on(self, tokens: int, samples: int) -> AbstractContextManager[list[Sample]]:
        return advancing(self, tokens, samples)

    def learning(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _ended(self, row: _Row) -> bool:
        return row.response[-1] == EOS or len(row.response) >= self._longest

    def _left(self, row: _Row) -> Sample:
        segment = Segment(tuple(row.response[-len(row.logprobs) :]), tuple(row.logprobs), self.version)
        status = "partial" if not self._ended(row) else "finished" if row.response[-1] == EOS else "truncated"
        return row.sample.extended(segment, status)  # type: ignore[arg-type]


@dataclass(frozen=True)
class CountdownInDigits:
    """The task, whose tokens are digits."""

    task: Countdown

    def prompt(self, group: int) -> Prompt:
        return self.task.prompt(group) if group < EVAL_GROUP else self.task.held_out(group - EVAL_GROUP)

    def prompt_ids(self, group: int) -> tuple[int, int]:
        digits = self.prompt(group).answer.split()
        return int(digits[0]), int(digits[-1])

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        said = " ".join(str(token) for token in sample.response_ids if token != EOS)
        reward = self.task.score(self.prompt(sample.group), said, sample.status == "finished")
        assert reward is not None
        return reward

    def demonstrations(self, first: int, count: int) -> Tensor:
        """(what is seen, and the token that follows), for every token of `count` demonstrations."""
        rows = list[list[int]]()
        for index in range(first, first + count):
            _, shown = self.task.demonstration(index)
            prompt, items = self.prompt_ids(index), [*map(int, shown.split()), EOS]
            rows += [[*prompt, items[place - 1] if place else prompt[-1], place, item] for place, item in enumerate(items)]
        return torch.tensor(rows)


def countdown(seed: int) -> Countdown:
    """The policy sees two digits, so the prompts differ in nothing else."""
    return Countdown(seed, MISTAKES, exercises=0)


def warmed_up(seed: int) -> TinyPolicy:
    """After supervised learning of demonstrations."""
    torch.manual_seed(seed)
    policy, task = TinyPolicy(), CountdownInDigits(countdown(seed))
    optimizer = torch.optim.Adam(policy.parameters(), lr=WARMUP_RATE)
    for step in range(WARMUP_STEPS):
        shown = task.demonstrations(step * WARMUP_EXAMPLES, WARMUP_EXAMPLES)
        loss = -policy(shown[:, :4]).gather(1, shown[:, 4:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@dataclass(frozen=True)
class TinyRun:
    """Means over the rounds except for rewards, which are of evaluations after a half and all of them, and `oldest`."""

    half: float
    last: float
    held_out: float
    stale: float
    oldest: float
    mismatch: float
    clipped: float
    decode_steps: float  # of all rounds


def run(config: RLConfig, policy: TinyPolicy, seed: int, prompts: int) -> TinyRun:
    """Learns in place."""
    rollout, optimizer = config.rollout, config.optimizer
    task, pool, buffer = CountdownInDigits(countdown(seed)), TinyPool(policy, config, seed), RolloutBuffer()
    adamw = torch.optim.AdamW(policy.parameters(), 0.0, optimizer.betas, optimizer.eps, optimizer.weight_decay)
    rounds, rewards = list[dict[str, float]](), dict[int, float]()

    def evaluate(first: int) -> float:
        samples = [fresh_group(group, task.prompt_ids(group), 1).samples[0] for group in range(first, first + prompts)]
        return mean(task.score(complete(pool, samples, rollout.advance_tokens)))

    for pool.version in range(config.loop.rounds):
        asked = pool, buffer, task.prompt_ids, rollout, pool.version, task.score
        result = rollout_round(*asked, newest_only=config.algorithm.newest_only)
        lr = learning_rate(pool.version, config.loop.rounds, optimizer)
        rounds.append(result.metrics | learn(config, policy, adamw, lr, result.groups, pool.version))
        rewards[pool.version + 1] = (
            evaluate(FINAL_GROUP) if pool.version + 1 in (config.loop.rounds // 2, config.loop.rounds) else 0.0
        )
    return TinyRun(
        half=rewards[config.loop.rounds // 2],
        last=rewards[config.loop.rounds],
        held_out=evaluate(EVAL_GROUP),
        stale=mean(one["rollout/stale_token_share"] for one in rounds),
        oldest=max(one["rollout/staleness_max"] for one in rounds),
        mismatch=mean(one["policy/mismatch_abs"] for one in rounds),
        clipped=mean(one["policy/clip_share"] for one in rounds),
        decode_steps=sum(one["rollout/decode_steps"] for one in rounds),
    )


def learn(
    config: RLConfig, policy: TinyPolicy, optimizer: torch.optim.Optimizer, lr: float, groups: Sequence[Group], version: int
) -> dict[str, float]:
    """The updates of a round; means of the objective's metrics."""
    algorithm, longest = config.algorithm, config.rollout.max_new_tokens
    documents = documents_of(groups, algorithm, version, longest)
    batches = policy_batches(documents, algorithm, longest, sequence_length=ROW, rows_multiple_of=1, pad_id=EOS)
    if len(batches) > 1:
        with torch.no_grad():
            known = [{PROXIMAL: policy.predicted(batch).logprobs_BS} for batch in batches]
        batches = [replace(batch, extras={**batch.extras, **one}) for batch, one in zip(batches, known, strict=True)]
    objective, found = PolicyObjective(algorithm), list[dict[str, float]]()
    for group in optimizer.param_groups:
        group["lr"] = lr
    for batch in batches:
        told = objective(policy.predicted(batch), batch)
        weight = batch.weights_BS.sum()
        loss = (told.loss_BS * batch.weights_BS).sum() / (batch.denominator or weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer.clip_norm or math.inf)
        optimizer.step()
        found.append({name: float((value.detach() * batch.weights_BS).sum() / weight) for name, value in told.metrics.items()})
    return {name: mean(one[name] for one in found) for name in found[0]}


@dataclass(frozen=True)
class TinyMode:
    name: str
    runs: tuple[TinyRun, ...]  # one a seed

    def each(self, what: Callable[[TinyRun], float]) -> list[float]:
        return [what(run) for run in self.runs]


@dataclass(frozen=True)
class Treatments:
    """All modes at one learning rate."""

    work: str
    modes: tuple[TinyMode, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure(
    options: OldTokensOptions, contenders: Mapping[str, Any], device: torch.device, ceilings: Ceilings
) -> Iterator[Treatments]:
    """One case a learning rate; on the CPU, whatever the device."""
    configs = {(mode, lr): options.config(mode, lr) for lr in options.lr for mode in options.modes}  # mistakes come first
    starts = [warmed_up(seed).state_dict() for seed in range(options.seeds)]

    def fresh(start: dict[str, Tensor]) -> TinyPolicy:
        policy = TinyPolicy()
        policy.load_state_dict(start)
        return policy

    for lr in options.lr:
        found = []
        for mode in options.modes:
            config = configs[mode, lr]
            runs = (run(config, fresh(start), seed, options.prompts) for seed, start in enumerate(starts))
            found.append(TinyMode(mode, tuple(runs)))
        yield Treatments(f"a tiny policy, {options.rounds} rounds at {lr:g}, {options.seeds} seeds", tuple(found))


def table(case: Treatments) -> Table:
    shown = Table(title=case.work, title_justify="left")
    columns = ("mode", "half way", "at the end", "less the first", "held-out", "less the first", "decoding steps")
    for column in (*columns, "stale", "oldest", "mismatch", "clipped"):
        shown.add_column(column, justify="left" if column == "mode" else "right")
    first = case.modes[0]
    for mode in case.modes:
        last, held_out = mode.each(lambda run: run.last), mode.each(lambda run: run.held_out)
        gaps = ("", "")
        if mode is not first:
            gaps = (
                str(difference(last, first.each(lambda run: run.last))),
                str(difference(held_out, first.each(lambda run: run.held_out))),
            )
        shown.add_row(
            mode.name,
            f"{mean(mode.each(lambda run: run.half)):.3f}",
            f"{mean(last):.3f} ± {standard_error(last):.3f}",
            gaps[0],
            f"{mean(held_out):.3f}",
            gaps[1],
            f"{mean(mode.each(lambda run: run.decode_steps)):,.0f}",
            f"{mean(mode.each(lambda run: run.stale)):.0%}",
            f"{max(mode.each(lambda run: run.oldest)):.0f}",
            f"{mean(mode.each(lambda run: run.mismatch)):.4f}",
            f"{mean(mode.each(lambda run: run.clipped)):.1%}",
        )
    return shown
