"""What the trainer says of a token is kept from the round in which the token was new."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.errors import UserError
from parallel.topology import World
from rl.algorithms import PolicyObjective
from rl.april import RoundResult, rollout_round
from rl.engine.engine import Engine
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.extras import PROXIMAL
from rl.packing import Rows, documents_of, pack, policy_batches
from rl.staged import appended, stage, staged
from rl.trajectory import Group, RolloutBuffer, Sample, Segment
from tests.distributed.ranks import run_ranks
from tests.models import spec, tiny_model
from tests.rl.algorithm import algorithm_config
from tests.rl.test_april import each, rollout_config
from trainer.batch import TrainBatch
from trainer.config.run import BalanceConfig
from trainer.model.transformer import ExpertWeights, LanguageModel
from trainer.step import Trainer

ROWS = Rows(sequence_length=16, rows_multiple_of=2, pad_id=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2)), min_size=1, max_size=5), st.integers(0, 10**6))
def test_every_token_keeps_what_was_said_when_it_was_new(rounds: list[tuple[int, int]], seed: int) -> None:
    """Rounds of (tokens, segments); the trainer says another number of every token in every round."""
    draw = torch.Generator().manual_seed(seed)
    sample, wanted = Sample(uid=1, group=0, prompt_ids=(9,)), list[float]()
    for version, (tokens, segments) in enumerate(rounds):
        for _ in range(segments):
            sample = sample.extended(Segment((5,) * tokens, (-1.0,) * tokens, version), "partial")
        fresh = torch.rand(sample.length, generator=draw).tolist()
        before = list(wanted)
        wanted += fresh[len(wanted) :]
        assert appended(before, fresh) == tuple(wanted)
        sample = staged(sample, fresh)
        assert sample.trainer_logprobs == tuple(wanted)
    assert [segment.weight_version for segment in sample.segments] == [v for v, (_, n) in enumerate(rounds) for _ in range(n)]


class ScriptedRanks:
    """Two ranks; a target's log-probability is -(target + 1000 * version)."""

    def __init__(self) -> None:
        self.version, self.asked = 0, list[TrainBatch]()

    def call(self, method: str, batch: TrainBatch, policy: bool, reference: bool) -> list[dict[str, Tensor]]:
        assert (method, policy, reference) == ("predict", True, False)
        self.asked.append(batch)
        said = -(batch.targets_BS + 1000.0 * self.version)
        return [{"logprobs": part} for part in said.chunk(2)]


def sample_of(uid: int, status: Any, *tokens: tuple[int, ...], version: int = 0) -> Sample:
    segments = tuple(Segment(ids, (-0.5,) * len(ids), version) for ids in tokens)
    return Sample(uid, uid >> 16, (7, 8), segments, status, 1.0 if status == "finished" else None)


def test_finished_surplus_and_unfinished_samples_are_asked_once_and_the_buffer_keeps_it() -> None:
    ranks = ScriptedRanks()
    done = Group(0, (sample_of(0, "finished", (11, 12)), sample_of(1, "finished", (13,))))
    surplus = Group(1, (sample_of(1 << 16, "finished", (21,)),))
    waiting = Group(2, (sample_of(2 << 16, "partial", (31,), (32,)), sample_of((2 << 16) + 1, "pending")))
    buffer = RolloutBuffer([waiting], [surplus])
    result = stage(ranks, RoundResult((done,), {"reward/mean": 1.0}), buffer, 0, **ROWS)  # type: ignore[arg-type]
    assert [sample.trainer_logprobs for sample in result.groups[0].samples] == [(-11, -12), (-13,)]
    assert result.metrics.keys() == {"reward/mean", "time/staged_s"}
    buffer = RolloutBuffer.from_state(json.loads(json.dumps(buffer.to_state())))
    assert buffer.surplus[0].samples[0].trainer_logprobs == (-21,)
    partial, pending = buffer.recycled[0].samples
    assert partial.trainer_logprobs == (-31, -32) and pending.trainer_logprobs == ()
    partial = partial.extended(Segment((33,), (-0.5,), 1), "finished")
    ranks.version = 1
    later = stage(ranks, RoundResult((Group(2, (partial,)),), {}), RolloutBuffer([], [surplus_of(buffer)]), 1, **ROWS)  # type: ignore[arg-type]
    assert later.groups[0].samples[0].trainer_logprobs == (-31, -32, -1033), "old tokens keep the old policy"
    assert int((ranks.asked[1].weights_BS > 0).sum()) == 3, "the surplus was asked about before"


def surplus_of(buffer: RolloutBuffer) -> Group:
    return buffer.surplus[0]


def test_nothing_new_asks_nobody_and_tokens_of_other_weights_are_refused() -> None:
    ranks = ScriptedRanks()
    stage(ranks, RoundResult((), {}), RolloutBuffer(), 3, **ROWS)  # type: ignore[arg-type]
    assert not ranks.asked
    group = Group(0, (sample_of(0, "finished", (11,), version=2),))
    with pytest.raises(UserError, match=r"sample 0 has new tokens of weight version 2, but the trainer holds 3: .*decoupled"):
        stage(ranks, RoundResult((group,), {}), RolloutBuffer(), 3, **ROWS)  # type: ignore[arg-type]


class OneRank:
    """A trainer in this process, as the driver calls it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(self.trainer, method)(*arguments)]

    def weights(self) -> dict[str, Tensor]:
        layers = [self.trainer.experts.gathered(layer) for layer in range(self.trainer.spec.model.num_moe_layers)]
        experts = ExpertWeights(*(torch.stack(parts) for parts in zip(*[x for x in layers if x is not None], strict=True)))
        return LanguageModel(self.trainer.spec.model, self.trainer.model, experts, self.trainer.bias_LE).state()


def rounds_with_an_engine(world: World, rounds: int) -> tuple[list[Sample], list[float]]:
    """Rollouts under weights that learn and a bias that moves: (finished samples, gap of PROXIMAL to the engine a round)."""
    balance = BalanceConfig(rule="sign", rate=0.01)
    told = spec(tiny_model(), micro_rows=4, batch_invariant=True, temperature=0.8, balance=balance)
    trainer = Trainer(told, world)
    ranks, buffer, config = OneRank(trainer), RolloutBuffer(), algorithm_config(off_policy="staged", updates_per_round=2)
    answers = EngineSettings(8, 32, 16, None, Sampling(0.8, seed=5), eos_id=1)
    engine = Engine(told.model, answers, world.device, torch.float32)
    rows, finished, gaps = Rows(sequence_length=32, rows_multiple_of=1, pad_id=0), list[Sample](), list[float]()
    rollout = rollout_config(groups=2, samples_per_group=3, max_new_tokens=16, advance_tokens=2)
    for version in range(rounds):
        engine.load_weights(ranks.weights(), version)
        score = each(lambda sample: float(sample.uid % 2))
        result = rollout_round(engine, buffer, lambda index: (3, 4 + index % 7), rollout, version, score)  # type: ignore[arg-type]
        result = stage(ranks, result, buffer, version, **rows)  # type: ignore[arg-type]
        finished += [sample for group in result.groups for sample in group.samples]
        batches = policy_batches(documents_of(result.groups, config, version, 16), config, 16, **rows)
        for batch in batches:
            assert PROXIMAL in batch.extras
            gaps.append(trainer.learn(batch, PolicyObjective(config), 3e-3)["policy/mismatch_abs"])  # type: ignore[arg-type]
    return finished, gaps


def test_with_an_exact_engine_they_are_the_engines_own_numbers_bit_for_bit_at_any_age() -> None:
    """So the weights of every round, a moving selection bias included, are those that the engine has."""
    ((finished, gaps),) = run_ranks(rounds_with_an_engine, 1, 5)
    assert any(len({*sample.versions}) > 1 for sample in finished), "no sample was continued under newer weights"
    for sample in finished:
        assert sample.trainer_logprobs == sample.logprobs
    assert not any(gaps) and len(gaps) == 10


def test_documents_bring_the_staged_numbers_to_their_tokens() -> None:
    config = algorithm_config(off_policy="staged")
    samples = tuple(staged(sample_of(uid, "finished", (11 + 2 * uid, 12 + 2 * uid)), [-0.25, -0.5 - uid]) for uid in range(2))
    batch = pack(documents_of([Group(0, samples)], config, 0, 8), aggregation="token", **ROWS)
    learned = batch.weights_BS > 0
    found = dict(zip(batch.targets_BS[learned].tolist(), batch.extras[PROXIMAL][learned].tolist(), strict=True))
    assert found == {11: -0.25, 12: -0.5, 13: -0.25, 14: -1.5} and not batch.extras[PROXIMAL][~learned].any()
