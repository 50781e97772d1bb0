"""Rounds of APRIL against synchronous ones: one engine, responses with a long tail, for `python -m launch.bench rollout`.

The rounds are those of rl/april.py, with its buffer; only the reward is a constant, and the length of a response is forced,
since random weights would end it anywhere. Lengths are lognormal: exp(normal) times the median. Half of the variance is the
prompt's (a hard one makes all its responses long), half the response's own. The standard deviation puts the longest of 256 at
16 times the median, where lengths are cut. A sample keeps its length through interruptions, and it is the same for every
factor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.table import Table

from launch.benchmarks.models import ModelOptions, floor_bytes
from launch.benchmarks.options import Listed, OneOrMore
from launch.benchmarks.record import one_row
from launch.benchmarks.timing import WorkClock
from launch.machines import read_group
from rl.april import Prompts, Score, rollout_round, submitted_groups
from rl.engine.decoder import Step
from rl.engine.engine import Engine
from rl.engine.pool import LocalPool
from rl.engine.rows import Row
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.trajectory import UIDS_PER_GROUP, Group, RolloutBuffer, Sample, Status
from trainer.config.model import ModelConfig
from trainer.config.rl import RolloutConfig
from trainer.estimate import vocab_size
from trainer.model.transformer import LanguageModel

SIGMA = 1.0  # of the logarithm of a length: the expected longest of 256 is exp(2.8) = 16 times the median
NO_TOKEN = -1  # as <eos>: what is sampled ends nothing


class RoundOptions(ModelOptions):
    prompt: PositiveInt = Field(128, description="tokens of a prompt")
    groups: PositiveInt = Field(32, description="that a round trains")
    samples: PositiveInt = Field(8, description="of a group")
    median: PositiveInt = Field(description="tokens of a response in rounds")
    longest: PositiveInt = Field(description="tokens that no response exceeds in rounds")
    max_staleness: NonNegativeInt = Field(8, description="rounds; a group with older tokens starts again")
    advance: PositiveInt = Field(32, description="tokens between two looks at who has finished")
    warm_rounds: PositiveInt = Field(6, description="before the buffer is steady, not counted")
    rounds: PositiveInt = Field(10, description="that are counted")


class SweepOptions(RoundOptions):
    over_provision: Listed[float] = Field(description="factors of APRIL; none: no rounds. 1 waits for all, and runs first")
    slots: OneOrMore[PositiveInt] = Field(description="sequences that the engine decodes at once in rounds")


@dataclass(frozen=True)
class Round:
    """What one round did. Tokens are those of responses."""

    seconds: float
    trained_tokens: int
    generated_tokens: int
    recomputed_tokens: int  # of prefixes of samples that were interrupted, prompts included
    busy_slots: float  # mean over the time in which the engine generated
    decode_steps: int
    stale_share: float  # of the trained tokens
    staleness: int  # rounds that the oldest trained token is behind
    waiting_tokens: int  # in the buffer when it ended
    length_bias: float  # mean length of trained samples over that of drawn ones
    floor_bytes: float  # that decoding had to read
    device_seconds: float  # in which a step or a prefill was under way


@dataclass(frozen=True)
class Rounds:
    """One over-provision factor."""

    work: str
    over_provision: float
    submitted_groups: int
    slots: int
    rounds: tuple[Round, ...]
    discarded_tokens: int  # of groups that started again
    sync_rate: float  # trained tokens a second with factor 1
    floor_s: float  # reading what decoding has to read, at the rate of a copy
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.rounds)

    @property
    def trained(self) -> int:
        return sum(one.trained_tokens for one in self.rounds)

    @property
    def trained_rate(self) -> float:
        return self.trained / self.seconds

    @property
    def generated(self) -> int:
        return sum(one.generated_tokens for one in self.rounds)

    @property
    def idle_share(self) -> float:
        """Slots that decode nothing, of all slots, over the time of the rounds."""
        return 1 - sum(one.busy_slots * one.seconds for one in self.rounds) / self.seconds / self.slots

    @property
    def engine_idle(self) -> float:
        """The time of the rounds in which neither a step nor a prefill is under way on the engine's device."""
        return 1 - sum(one.device_seconds for one in self.rounds) / self.seconds

    @property
    def idle_of_steps(self) -> float:
        """The same over the decoding steps of the rounds, whatever prefill takes between them."""
        return 1 - self.generated / sum(one.decode_steps for one in self.rounds) / self.slots


def response_length(uid: int, median: int, longest: int, seed: int) -> int:
    group, own = divmod(uid, UIDS_PER_GROUP)
    normal = sum(np.random.default_rng(key).standard_normal() for key in ([seed, group], [seed, group, own + 1])) / math.sqrt(2)
    return int(np.clip(round(median * math.exp(SIGMA * normal)), 1, longest))


class ForcedEngine(Engine):
    """Its responses end where `response_length` says, whatever is sampled; it counts what it does."""

    def __init__(
        self, config: ModelConfig, settings: EngineSettings, device: torch.device, dtype: torch.dtype, options: RoundOptions
    ) -> None:
        super().__init__(config, settings, device, dtype)
        self.config, self.dtype = config, dtype
        self._length = cache(lambda uid: response_length(uid, options.median, options.longest, options.seed))
        self.decoded_tokens = 0
        self.recomputed_tokens = 0
        self.context_tokens = 0  # whose keys the decoded tokens needed, each its own
        self.work = WorkClock(device)

    @property
    def decodes_on(self) -> bool:
        """Whether a step is under way between two calls."""
        return self._running is not None

    def _step(self) -> Step:
        with self.work:
            return super()._step()

    def _prefill(self) -> None:
        with self.work:
            super()._prefill()

    def _status(self, row: Row) -> Status:
        self.decoded_tokens += 1
        self.context_tokens += len(row.ids)
        return "finished" if row.generated >= self._length(row.sample.uid) else "partial"

    def _row(self, item: Sample) -> Row | None:
        row = super()._row(item)
        if row is not None and item.length:
            self.recomputed_tokens += len(row.ids) - 1 - row.cached
        return row


class TimedPool(LocalPool):
    """One engine, and how many of its slots were busy for how long."""

    def __init__(self, engine: ForcedEngine) -> None:
        super().__init__([engine])
        self.engine = engine
        self.returned = 0.0  # when `advance` did
        self.busy_slot_seconds = 0.0
        self.floor_bytes = 0.0

    def advance(self, tokens: int) -> list[Sample]:
        engine = self.engine
        decoded, context = engine.decoded_tokens, engine.context_tokens
        started = self.returned if engine.decodes_on else time.perf_counter()
        done = super().advance(tokens)
        self.returned = time.perf_counter()
        # Fewer than `tokens` steps only where all that was left has finished; the slots are idle then.
        rows = (engine.decoded_tokens - decoded) / tokens
        self.busy_slot_seconds += (self.returned - started) * rows
        self.floor_bytes += tokens * floor_bytes(
            engine.config, rows, (engine.context_tokens - context) / tokens, engine.dtype.itemsize
        )
        return done


def sweep(
    options: SweepOptions,
    name: str,
    weights: LanguageModel,
    slots: int,
    device: torch.device,
    dtype: torch.dtype,
    copy_tbytes: float,
) -> Iterator[Rounds]:
    """One case a factor, with the same engine."""
    engine = forced_engine(options, weights.config, slots, device, dtype)
    sync_rate: float | None = None
    for factor in (1.0, *(factor for factor in options.over_provision if factor != 1)):
        config = rollout_config(options, factor, slots)
        # Without over-provision nothing waits in the buffer: a first round compiles and captures, and the second is steady.
        warm = options.warm_rounds if factor > 1 else 1
        done = run_rounds(options, config, weights, engine, warm + options.rounds)
        counted = done[warm:]
        generated, trained = (sum(x) for x in zip(*((r.generated_tokens, r.trained_tokens) for r in counted), strict=True))
        grown = done[-1].waiting_tokens - done[warm - 1].waiting_tokens
        sync_rate = sync_rate or trained / sum(one.seconds for one in counted)
        yield Rounds(
            work=f"rounds by {name}: {options.groups} groups of {options.samples}, median response {options.median} tokens, "
            f"longest {options.longest}, {slots} slots",
            over_provision=factor,
            submitted_groups=submitted_groups(options.groups, config),
            slots=slots,
            rounds=counted,
            discarded_tokens=generated - trained - grown,
            sync_rate=sync_rate,
            floor_s=sum(one.floor_bytes for one in counted) / copy_tbytes / 1e12,
        )


def forced_engine(
    options: RoundOptions, model: ModelConfig, slots: int, device: torch.device, dtype: torch.dtype
) -> ForcedEngine:
    return ForcedEngine(model, engine_settings(options, slots), device, dtype, options)


def engine_settings(options: RoundOptions, slots: int) -> EngineSettings:
    length, sampling = options.prompt + options.longest + 1, Sampling(temperature=1.0, seed=options.seed)
    return EngineSettings(slots, length, options.longest + 1, None, sampling, NO_TOKEN)


def run_rounds(
    options: RoundOptions, config: RolloutConfig, weights: LanguageModel, engine: ForcedEngine, rounds: int
) -> tuple[Round, ...]:
    """`rounds` rounds from an empty buffer, each under weights that the engine takes as new."""
    buffer, pool = RolloutBuffer(), TimedPool(engine)
    prompts, done = random_prompts(options, weights.config), list[Round]()
    for version in range(rounds):
        engine.load_weights(weights.state(), version)
        done.append(one_round(pool, buffer, prompts, config, version, lambda samples: [0.0] * len(samples))[0])
    return tuple(done)


def random_prompts(options: RoundOptions, model: ModelConfig) -> Prompts:
    def prompt(index: int) -> list[int]:
        generator = np.random.default_rng([options.seed, index])
        tokens: list[int] = generator.integers(vocab_size(model), size=options.prompt).tolist()
        return tokens

    return prompt


def one_round(
    pool: TimedPool, buffer: RolloutBuffer, prompts: Prompts, config: RolloutConfig, version: int, score: Score
) -> tuple[Round, tuple[Group, ...]]:
    """A round, and the groups that it trains. The time of `score` is part of it."""
    engine = pool.engine
    recomputed, busy, floor, worked = engine.recomputed_tokens, pool.busy_slot_seconds, pool.floor_bytes, engine.work.seconds
    started = time.perf_counter()
    result = rollout_round(pool, buffer, prompts, config, version, score)
    seconds = time.perf_counter() - started
    done = Round(
        seconds=seconds,
        trained_tokens=_tokens(result.groups),
        generated_tokens=int(result.metrics["rollout/new_tokens"]),
        recomputed_tokens=engine.recomputed_tokens - recomputed,
        busy_slots=(pool.busy_slot_seconds - busy) / seconds,
        decode_steps=int(result.metrics["rollout/decode_steps"]),
        stale_share=result.metrics["rollout/stale_token_share"],
        staleness=int(result.metrics["rollout/staleness_max"]),
        waiting_tokens=_tokens((*buffer.recycled, *buffer.surplus)),
        length_bias=result.metrics["rollout/length_bias"],
        floor_bytes=pool.floor_bytes - floor,
        device_seconds=engine.work.seconds - worked,
    )
    return done, result.groups


def rollout_config(options: RoundOptions, over_provision: float, slots: int) -> RolloutConfig:
    """rollout=april with the sizes of the options."""
    return read_group(
        "rollout",
        "april",
        RolloutConfig,
        groups=options.groups,
        samples_per_group=options.samples,
        over_provision=over_provision,
        max_new_tokens=options.longest,
        max_staleness=options.max_staleness,
        engine_slots=slots,
        advance_tokens=options.advance,
    )


def _tokens(groups: Sequence[Group]) -> int:
    return sum(sample.length for group in groups for sample in group.samples)


def table(case: Rounds) -> Table:
    generated, rounds = case.generated, case.rounds
    row = {
        "N'/N": f"{case.over_provision:g}",
        "round s": f"{case.seconds / len(rounds):.2f}",
        "trained tokens/s": f"{case.trained_rate:,.0f}",
        "generated tokens/s": f"{generated / case.seconds:,.0f}",
        "of sync": f"{case.trained_rate / case.sync_rate:.2f}x",
        "generated of sync": f"{generated / case.seconds / case.sync_rate:.2f}x",
        "slots idle": f"{case.idle_share:.1%}",
        "of steps": f"{case.idle_of_steps:.1%}",
        "engine idle": f"{case.engine_idle:.1%}",
        "of floor": f"{case.floor_s / case.seconds:.0%}",
        "stale": f"{sum(one.stale_share * one.trained_tokens for one in rounds) / case.trained:.0%}",
        "oldest": f"{max(one.staleness for one in rounds)}",
        "discarded": f"{case.discarded_tokens / generated:.1%}",
        "recomputed": f"{sum(one.recomputed_tokens for one in rounds) / generated:.0%}",
        "length bias": f"{rounds[-1].length_bias:.2f}",
    }
    return one_row(case.work, row)
