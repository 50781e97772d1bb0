"""Advantages of single tokens in packed rows against loops over documents and tokens."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.errors import UserError
from launch.cli import load
from rl.extras import ADVANTAGES, PROXIMAL, REFERENCE, RESPONSES, RETURNS, VALUES
from rl.packing import Document, pack
from rl.returns import clipped_value_loss, explained_variance, gae, whitened, with_token_advantages
from tests.rl.algorithm import algorithm_config
from trainer.batch import TrainBatch
from trainer.config.rl import RLConfig

Spans = list[tuple[int, int, int]]  # (row, first, end) of every response
seeds = st.integers(0, 10**6)


def batch_of(seed: int) -> tuple[TrainBatch, Spans]:
    """Documents of which each earned a number of its own, packed, with random predictions at every position."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(draw.randint(1, 9)):
        prompt, response = (tuple(range(draw.randint(1, n))) for n in (5, 7))
        learned = (True, *(draw.random() < 0.7 for _ in response[1:]))
        documents.append(Document(prompt, response, (-1.0,) * len(response), draw.gauss(0, 1), learned))
    batch = pack(documents, sequence_length=16, rows_multiple_of=2, aggregation="token", pad_id=0)
    drawn = {
        name: torch.randn(batch.tokens_BS.shape, generator=generator, dtype=torch.float64)
        for name in (VALUES, PROXIMAL, REFERENCE)
    }
    spans = []
    for row in range(batch.num_rows):
        for number in range(int(batch.documents_BS[row].max()) + 1):
            places = torch.nonzero((batch.documents_BS[row] == number) & batch.extras[RESPONSES][row]).flatten().tolist()
            spans.append((row, places[0], places[-1] + 1))
    assert len(spans) == len(documents)
    return replace(batch, extras={**batch.extras, **drawn}), spans


def by_definition(rewards: list[float], values: list[float], learned: list[bool], discount: float, decay: float) -> list[float]:
    """A_t = sum_k (discount decay)^k delta_{t + k} over the learned tokens, each with what is earned before the next one."""
    places = [place for place, own in enumerate(learned) if own]
    earned = [math.fsum(rewards[one:following]) for one, following in zip(places, [*places[1:], len(rewards)], strict=True)]
    after = [*(values[place] for place in places[1:]), 0.0]
    deltas = [r + discount * next_value - values[place] for r, next_value, place in zip(earned, after, places, strict=True)]
    found = [0.0] * len(rewards)
    for number, place in enumerate(places):
        found[place] = math.fsum((discount * decay) ** k * delta for k, delta in enumerate(deltas[number:]))
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seeds, st.sampled_from([(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.7, 1.0)]))
def test_gae_of_packed_rows_is_that_of_the_learned_tokens_of_each_response_alone(
    seed: int, factors: tuple[float, float]
) -> None:
    batch, spans = batch_of(seed)
    rewards = batch.extras[REFERENCE]  # any numbers, prompts and padding included, which must not leak
    found = gae(rewards, batch.extras[VALUES], batch.documents_BS, batch.weights_BS > 0, *factors)
    wanted = torch.zeros_like(found)
    for row, first, end in spans:
        own = [x[row, first:end].tolist() for x in (rewards, batch.extras[VALUES], batch.weights_BS > 0)]
        wanted[row, first:end] = torch.tensor(by_definition(*own, *factors), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
@pytest.mark.parametrize("advantage", ["gae", "reinforce_pp", "reinforce_pp_baseline"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=seeds)
def test_advantages_of_a_round_equal_a_loop_over_tokens(advantage: str, kl_coefficient: float, seed: int) -> None:
    """Two batches, whitened together over learned tokens; returns are those before the whitening."""
    config = algorithm_config(
        advantage=advantage, discount=0.9, gae_lambda=0.8, value_lambda=0.95, kl_coefficient=kl_coefficient, kl_estimator="k1"
    )
    rounds = [batch_of(seed), batch_of(seed + 1)]
    raw, returns = list[Tensor](), list[Tensor]()
    for batch, spans in rounds:
        found, returned = torch.zeros_like(batch.extras[VALUES]), torch.zeros_like(batch.extras[VALUES])
        for row, first, end in spans:
            learned_here = batch.weights_BS[row, first:end] > 0  # others cost nothing, as what the environment said
            gap = ((batch.extras[PROXIMAL] - batch.extras[REFERENCE])[row, first:end] * learned_here).tolist()
            rewards = [-kl_coefficient * d for d in gap]
            rewards[-1] += batch.extras[ADVANTAGES][row, first].item()
            values, decay = (
                (batch.extras[VALUES][row, first:end].tolist(), 0.8) if advantage == "gae" else ([0.0] * len(gap), 1.0)
            )
            own = learned_here.tolist()
            found[row, first:end] = torch.tensor(by_definition(rewards, values, own, 0.9, decay))
            returned[row, first:end] = torch.tensor(by_definition(rewards, values, own, 0.9, 0.95)) + torch.tensor(values)
        raw.append(found)
        returns.append(returned)
    learned = [batch.weights_BS > 0 for batch, _ in rounds]
    tokens = [value for x, mask in zip(raw, learned, strict=True) for value in x[mask].tolist()]
    mean, scale = statistics.fmean(tokens), statistics.pstdev(tokens) + 1e-6
    batches = [batch if advantage == "gae" else without(batch, VALUES) for batch, _ in rounds]
    results, metrics = with_token_advantages(batches, config)
    for result, plain, returned, mask in zip(results, raw, returns, learned, strict=True):
        expected = torch.where(mask, (plain - mean) / scale, 0.0).float()
        torch.testing.assert_close(result.extras[ADVANTAGES], expected, rtol=1e-4, atol=1e-5)
        if advantage == "gae":
            torch.testing.assert_close(result.extras[RETURNS][mask], returned[mask].float(), rtol=1e-5, atol=1e-5)
    assert metrics.keys() == ({"value/explained_variance"} if advantage == "gae" else set())


def test_a_long_answer_of_a_tool_takes_nothing_from_the_turn_before_it() -> None:
    """Two turns of two tokens with 40 tokens of the environment between them, and the same without those."""
    turns = Document((1,), (2,) * 4, (-1.0,) * 4, 1.0, (True,) * 4)
    talk = Document((1,), (2,) * 44, (-1.0,) * 44, 1.0, (True,) * 2 + (False,) * 40 + (True,) * 2)
    config, found = algorithm_config(advantage="gae", discount=0.9, gae_lambda=0.9, value_lambda=0.9), list[list[float]]()
    for document in (turns, talk):
        batch = pack([document], sequence_length=48, rows_multiple_of=1, aggregation="token", pad_id=0)
        own = batch.weights_BS > 0
        values_BS = torch.where(own, torch.linspace(0, 1, 48), 9.0)  # what is said of the environment's tokens means nothing
        values_BS[own] = torch.tensor([0.5, 0.25, 0.75, 0.5])
        (result,), _ = with_token_advantages([replace(batch, extras={**batch.extras, VALUES: values_BS})], config)
        found.append(result.extras[RETURNS][own].tolist())
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def without(batch: TrainBatch, name: str) -> TrainBatch:
    return replace(batch, extras={key: value for key, value in batch.extras.items() if key != name})


def test_reinforce_pp_without_a_penalty_whitens_the_rewards_counted_by_tokens() -> None:
    """Rewards 1, 1 of a token each, 0 of 6 tokens and 1 of 2: mean 0.4 over 10 tokens, not 0.75 over 4 samples."""
    documents = [
        Document((1,), (2,) * n, (0.0,) * n, reward, (True,) * n) for reward, n in ((1.0, 1), (1.0, 1), (0.0, 6), (1.0, 2))
    ]
    batch = pack(documents, sequence_length=8, rows_multiple_of=1, aggregation="token", pad_id=0)
    (result,), _ = with_token_advantages([batch], algorithm_config(advantage="reinforce_pp"))
    found = result.extras[ADVANTAGES][batch.weights_BS > 0]
    assert sorted(set(found.tolist())) == pytest.approx([-0.4 / math.sqrt(0.24), 0.6 / math.sqrt(0.24)], rel=1e-5)


def test_equal_returns_teach_nothing() -> None:
    assert whitened([torch.full((2, 3), 0.7, dtype=torch.float64)], [torch.ones(2, 3).bool()])[0].abs().max() < 1e-9


@pytest.mark.parametrize("clip", [None, 0.3])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(value=st.floats(-2, 2), old=st.floats(-2, 2), target=st.floats(-2, 2))
def test_value_loss_and_gradient_are_the_formula(clip: float | None, value: float, old: float, target: float) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    loss, held = clipped_value_loss(values, *(torch.tensor([x], dtype=torch.float64) for x in (old, target)), clip)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    free = (value - target) ** 2
    bound = free if clip is None else (min(max(value, old - clip), old + clip) - target) ** 2
    assert loss.item() == pytest.approx(0.5 * max(free, bound), rel=1e-6, abs=1e-6)
    assert held.item() == (bound > free)
    # Where the clip decides, its value does not move with V; the boundaries, where both are equal, may have either slope.
    if abs(free - bound) > 1e-9 or clip is None or abs(value - old) < clip - 1e-9:
        slope = value - target if free >= bound else 0.0
        assert gradient.item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_only_estimators_that_compare_nothing_within_a_prompt_take_a_single_sample() -> None:
    for algorithm in ("ppo_gae", "reinforce_pp"):
        assert load(RLConfig, "rl", ["checkpoint=a", f"algorithm={algorithm}", "rollout.samples_per_group=1"])
    for algorithm in ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "gspo"):
        with pytest.raises(UserError, match=r"compares the samples of a prompt, .*samples_per_group is 1; raise it, or choose"):
            load(RLConfig, "rl", ["checkpoint=a", f"algorithm={algorithm}", "rollout.samples_per_group=1"])
    with pytest.raises(UserError, match=r"rollout.refills \(9\) replaces groups .* set refills=0"):
        load(RLConfig, "rl", ["checkpoint=a", "algorithm=ppo_gae", "rollout=dynamic", "rollout.samples_per_group=1"])


def test_explained_variance_is_one_for_the_truth_zero_for_a_constant_and_negative_for_worse() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[True, True, True, False]])
    told: list[Any] = [returns, torch.full_like(returns, 5.0), -returns]
    assert [explained_variance([x], [returns], [mask]) for x in told] == pytest.approx([1, 0, -3])
    assert explained_variance(told[:1], [torch.ones(1, 4)], [mask]) == 0
