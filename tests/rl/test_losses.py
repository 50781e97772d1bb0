"""Losses and masks in packed rows against loops over documents and tokens, in value and in gradient, to 1e-6 in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl.algorithms import PolicyObjective
from rl.losses import gspo, ppo
from rl.off_policy import sequence_mean
from tests.rl.algorithm import algorithm_config
from trainer.batch import Predictions, TrainBatch
from trainer.config.rl import AlgorithmConfig

ROWS, LENGTH = 3, 24


@dataclass(frozen=True)
class Response:
    """Learned tokens of a document, as plain numbers: where they stand, and what the policies gave them."""

    places: list[tuple[int, int]]
    policy: list[float]
    behaviour: list[float]
    advantage: float


def rows_of_responses(seed: int, spread: float) -> tuple[TrainBatch, Tensor, list[Response]]:
    """Random documents side by side in rows, each with a prompt, some response tokens that are not learned, and padding."""
    draw = random.Random(seed)
    shape = (ROWS, LENGTH)
    documents = torch.full(shape, -1, dtype=torch.int32)
    weights, advantages, behaviour = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    policy = torch.tensor([[draw.uniform(-4, -0.01) for _ in range(LENGTH)] for _ in range(ROWS)], dtype=torch.float64)
    responses = []
    for row in range(ROWS):
        place = number = 0
        while place < LENGTH - 8:
            end = place + draw.randint(3, 8)
            documents[row, place:end] = number
            advantage = draw.gauss(0, 1)
            start = place + draw.randint(1, end - place - 1)
            learned = [(row, at) for at in range(start, end) if draw.random() < 0.8] or [(row, start)]
            for at in range(start, end):
                advantages[row, at] = advantage
                behaviour[row, at] = min(0.0, policy[row, at].item() + draw.gauss(0, spread))
            for at in learned:
                weights[at] = 1.0
            responses.append(
                Response(learned, [policy[at].item() for at in learned], [behaviour[at].item() for at in learned], advantage)
            )
            place, number = end, number + 1
    tokens = torch.zeros(shape, dtype=torch.int64)
    extras = {"advantages": advantages, "behaviour_logprobs": behaviour}
    return TrainBatch(tokens, tokens, documents, weights, extras), policy.requires_grad_(), responses


# Each returns (loss, d loss / d log p) of a token from its ratio r to the behaviour policy, derived by hand.
def ppo_token(r: float, s: float, a: float, lp: float, c: AlgorithmConfig) -> tuple[float, float]:
    low, high = 1 - c.clip_low, 1 + c.clip_high
    if a > 0:
        loss, slope = (-high * a, 0.0) if r > high else (-r * a, -r * a)
    else:
        loss, slope = (-low * a, 0.0) if r < low else (-r * a, -r * a)
        if c.dual_clip is not None and r > c.dual_clip:
            loss, slope = -c.dual_clip * a, 0.0
    return loss, slope


def gspo_token(r: float, s: float, a: float, lp: float, c: AlgorithmConfig) -> tuple[float, float]:
    return ppo_token(s, s, a, lp, c)


def cispo_token(r: float, s: float, a: float, lp: float, c: AlgorithmConfig) -> tuple[float, float]:
    weight = min(max(r, 1 - c.clip_low), 1 + c.clip_high)
    return -weight * a * lp, -weight * a


def sapo_token(r: float, s: float, a: float, lp: float, c: AlgorithmConfig) -> tuple[float, float]:
    t = c.sapo_temperatures[0 if a > 0 else 1]
    gate = 1 / (1 + math.exp(-t * (r - 1)))
    return -a * gate * 4 / t, -a * 4 * gate * (1 - gate) * r


def dppo_token(r: float, s: float, a: float, lp: float, c: AlgorithmConfig) -> tuple[float, float]:
    shift = math.exp(lp) - math.exp(lp) / r
    if (a > 0 and shift > c.clip_high) or (a < 0 and shift < -c.clip_low):
        return 0.0, 0.0
    return -r * a, -r * a


CASES: dict[str, tuple[Callable[..., tuple[float, float]], dict[str, Any]]] = {
    "ppo": (ppo_token, {}),
    "ppo-dual-clip": (ppo_token, {"loss": "ppo", "dual_clip": 1.5}),
    "gspo": (gspo_token, {"loss": "gspo", "clip_low": 0.1, "clip_high": 0.15}),
    "cispo": (cispo_token, {"loss": "cispo", "clip_low": 0.4, "clip_high": 0.5}),
    "sapo": (sapo_token, {"loss": "sapo"}),
    "dppo": (dppo_token, {"loss": "dppo", "clip_low": 0.05, "clip_high": 0.03}),
}


def check(
    config: AlgorithmConfig,
    seed: int,
    token: Callable[[Response, int], tuple[float, float]],
    change: Callable[[TrainBatch], TrainBatch] = lambda batch: batch,
) -> None:
    """Asserts loss and gradient at every learned token."""
    batch, policy, responses = rows_of_responses(seed, spread=0.5)
    batch = change(batch)
    result = PolicyObjective(config)(Predictions(policy, torch.zeros_like(policy)), batch)
    (gradient,) = torch.autograd.grad((result.loss_BS * batch.weights_BS).sum(), policy)
    wanted, slopes = torch.zeros_like(gradient), torch.zeros_like(gradient)
    for response in responses:
        for index, place in enumerate(response.places):
            wanted[place], slopes[place] = token(response, index)
    torch.testing.assert_close(result.loss_BS * batch.weights_BS, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, slopes, rtol=1e-6, atol=1e-6)


def mean_gap(response: Response) -> float:
    """The mean of log policy - log behaviour."""
    return sum(p - b for p, b in zip(response.policy, response.behaviour, strict=True)) / len(response.policy)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_losses_equal_a_loop(case: str, seed: int) -> None:
    of_token, changes = CASES[case]
    config = algorithm_config(off_policy="bypass", **changes)

    def token(response: Response, index: int) -> tuple[float, float]:
        ratio = math.exp(response.policy[index] - response.behaviour[index])
        return of_token(ratio, math.exp(mean_gap(response)), response.advantage, response.policy[index], config)

    check(config, seed, token)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_of_a_cut_distribution_bypass_clips_the_ratio_to_the_whole_one_and_weighs_the_share_kept(case: str, seed: int) -> None:
    """As the loop above with the whole distribution in the place of the behaviour's, times the share, any number below 1."""
    of_token, changes = CASES[case]
    config = algorithm_config(off_policy="bypass", **changes)

    def share(whole: float) -> float:
        return 0.65 + 0.3 * math.sin(1000 * whole)

    def cut(batch: TrainBatch) -> TrainBatch:
        whole = batch.extras["behaviour_logprobs"]
        behaviour = whole - whole.clone().apply_(share).log()
        return replace(batch, extras={**batch.extras, "whole_logprobs": whole, "behaviour_logprobs": behaviour})

    def token(response: Response, index: int) -> tuple[float, float]:
        ratio = math.exp(response.policy[index] - response.behaviour[index])
        loss, slope = of_token(ratio, math.exp(mean_gap(response)), response.advantage, response.policy[index], config)
        return loss * share(response.behaviour[index]), slope * share(response.behaviour[index])

    check(config, seed, token, cut)


@pytest.mark.parametrize("case", [case for case in CASES if case != "sapo"])
def test_the_random_inputs_reach_the_clip(case: str) -> None:
    _, changes = CASES[case]
    batch, policy, _ = rows_of_responses(0, spread=0.5)
    result = PolicyObjective(algorithm_config(off_policy="bypass", **changes))(
        Predictions(policy, torch.zeros_like(policy)), batch
    )
    assert 0 < result.metrics["policy/clip_share"][batch.weights_BS > 0].mean() < 1


@pytest.mark.parametrize(
    "changes",
    [
        {"token_band": (0.8, 1.3)},
        {"sequence_band": (0.9, 1.1)},
        {"sequence_delta": 0.05},
        {"token_band": (0.5, 2.0), "sequence_band": (0.7, 1.4), "sequence_delta": 0.1},
    ],
    ids=["token", "sequence", "opsm", "all"],
)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_masks_and_truncated_importance_equal_a_loop(changes: dict[str, Any], seed: int) -> None:
    """Under decoupled, with one update a round, loss and gradient are -importance A, or 0 where a mask drops."""
    config = algorithm_config(truncation=1.2, **changes)

    def token(response: Response, index: int) -> tuple[float, float]:
        ratio, gap = math.exp(response.policy[index] - response.behaviour[index]), mean_gap(response)
        tokens, sequences, delta = config.token_band, config.sequence_band, config.sequence_delta
        kept = tokens is None or tokens[0] <= ratio <= tokens[1]
        kept &= sequences is None or sequences[0] <= math.exp(gap) <= sequences[1]
        kept &= not (delta is not None and response.advantage < 0 and -gap > delta)
        loss = -min(ratio, 1.2) * response.advantage if kept else 0.0
        return loss, loss

    check(config, seed, token)


@pytest.mark.parametrize("changes", [{"token_band": (0.8, 1.3)}, {"sequence_band": (0.9, 1.1)}, {"sequence_delta": 0.05}])
def test_the_random_inputs_reach_the_masks(changes: dict[str, Any]) -> None:
    batch, policy, _ = rows_of_responses(0, spread=0.5)
    result = PolicyObjective(algorithm_config(**changes))(Predictions(policy, torch.zeros_like(policy)), batch)
    assert 0 < result.metrics["policy/masked_share"][batch.weights_BS > 0].mean() < 1


def test_gspo_has_the_gradient_of_the_sequence_form() -> None:
    """Mean over sequences of max(-s A, -clip(s) A), s = exp(mean log ratio), written with one s a sequence."""
    batch, policy, responses = rows_of_responses(5, spread=0.5)
    shares = torch.zeros_like(batch.weights_BS)
    total = torch.zeros((), dtype=torch.float64)
    for response in responses:
        rows, places = (torch.tensor(index) for index in zip(*response.places, strict=True))
        shares[rows, places] = 1 / len(response.places) / len(responses)
        s = (policy[rows, places] - batch.extras["behaviour_logprobs"][rows, places]).mean().exp()
        a = response.advantage
        total = total + torch.maximum(-s * a, -s.clamp(0.9, 1.1) * a) / len(responses)
    (wanted,) = torch.autograd.grad(total, policy)
    config = algorithm_config(loss="gspo", clip_low=0.1, clip_high=0.1, off_policy="bypass")
    loss = (PolicyObjective(config)(Predictions(policy, torch.zeros_like(policy)), batch).loss_BS * shares).sum()
    (found,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(found, wanted)


def test_clip_stops_the_gradient_only_where_a_ratio_left_in_the_direction_of_its_advantage() -> None:
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.25]).log().requires_grad_()
    loss, clipped = ppo(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), low=0.2, high=0.28)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert clipped.tolist() == [True, False, False, True, False]
    assert gradient.tolist() == pytest.approx([0, 1.5, -0.5, 0, -1.25])


def test_gspo_clips_by_the_sequence_and_not_by_the_token() -> None:
    """Two tokens with ratios 3 and 1/3 have a sequence ratio of 1: nothing is clipped, and the token ratios do not matter."""
    log_ratio = torch.tensor([math.log(3), -math.log(3)], requires_grad=True)
    loss, clipped = gspo(log_ratio, torch.zeros(2), torch.ones(2), 3e-4, 4e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert loss.tolist() == gradient.tolist() == [-1, -1] and not clipped.any()


def test_the_mean_of_a_document_is_its_own() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [5.0, 7.0, 9.0, 11.0, 13.0]])
    documents = torch.tensor([[0, 0, 1, 1, -1], [0, 1, 1, 1, -1]])
    learned = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 1, 0]]).bool()
    assert sequence_mean(values, documents, learned).tolist() == [[1.5, 1.5, 8, 8, 0], [0, 9, 9, 9, 0]]
    assert sequence_mean(values, torch.full_like(documents, -1), ~learned).eq(0).all(), "rows of nothing but padding"
