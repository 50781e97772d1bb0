"""The sampler: what is drawn, how often, and the log-probability it is given, alone and in the engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from kernels.linear import product
from launch.cli import load
from rl.april import complete
from rl.engine.sampler import Sampling, kept, sample
from rl.trajectory import Sample
from tests.rl.test_engine import CONFIG, engine_for, interrupted, requests, trainer_logprobs
from trainer.config.rl import RLConfig
from trainer.model.attention import BatchInvariantAttention, positions_of
from trainer.model.transformer import LanguageModel

# ---------------------------------------------------------------- the distribution


def left(shares: list[float], sampling: Sampling) -> set[int]:
    """The tokens that stay, one after the other by definition: top-k, then top-p of the rest, then min-p."""
    stay = set(range(len(shares)))
    if sampling.top_k is not None:
        least = sorted(shares, reverse=True)[min(sampling.top_k, len(shares)) - 1]
        stay = {token for token in stay if shares[token] >= least}
    if sampling.top_p < 1:
        total, before, least = sum(shares[token] for token in stay), 0.0, math.inf
        for token in sorted(stay, key=lambda token: -shares[token]):
            if before / total < sampling.top_p:
                least = shares[token]
            before += shares[token]
        stay = {token for token in stay if shares[token] >= least}
    return {token for token in stay if shares[token] >= sampling.min_p * max(shares)}


# Shares are whole multiples of each other, so that no limit falls onto one by rounding; many are equal.
Weights = st.lists(st.sampled_from([1, 2, 3, 5, 8, 13]), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    Weights,
    st.one_of(st.none(), st.integers(1, 14)),
    st.sampled_from([1.0, 0.9517, 0.7013, 0.3019, 1e-6]),
    st.sampled_from([0.0, 0.019, 0.1101, 0.3401, 0.7001, 0.9]),
    st.sampled_from([0.5, 1.0]),
)
def test_what_stays_is_that_of_the_definition_and_logprobs_are_of_what_stays(
    weights: list[int], top_k: int | None, top_p: float, min_p: float, temperature: float
) -> None:
    sampling = Sampling(temperature, 3, top_k, top_p, min_p)
    powers = [weight ** (1 / temperature) for weight in weights]
    stay, draws = left(powers, sampling), 64
    logits = torch.tensor(weights, dtype=torch.float64).log().float()
    found = kept(logits[None] / temperature, sampling)[0]
    assert set(found.isfinite().nonzero().flatten().tolist()) == stay
    positions = torch.zeros(draws, dtype=torch.int64)
    tokens, logprobs, whole_logprobs = sample(logits.expand(draws, -1), torch.arange(draws), positions, sampling)
    assert set(tokens.tolist()) <= stay

    def among(total: float) -> torch.Tensor:
        return torch.tensor([math.log(powers[token] / total) for token in tokens.tolist()])

    torch.testing.assert_close(logprobs, among(sum(powers[token] for token in stay)), rtol=1e-5, atol=1e-6)
    assert sampling.whole == (top_k is None and top_p == 1 and min_p == 0)
    assert (whole_logprobs is None) == sampling.whole
    if whole_logprobs is not None:
        torch.testing.assert_close(whole_logprobs, among(sum(powers)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_the_lowest_temperature_takes_the_likeliest_token_and_its_logprob_is_finite(changes: dict[str, Any]) -> None:
    logits = torch.tensor([[-100.0, 60.0, 20.0, 59.5], [3.0, 3.0, -3.0, 0.0]])
    for uid in range(20):
        uids = torch.full((2,), uid)
        tokens, logprobs, _ = sample(logits, uids, uids, Sampling(1e-3, 5, **changes))
        assert tokens[0] == 1 and logprobs[0] == pytest.approx(0.0, abs=1e-6)
        assert tokens[1] in (0, 1), "two are alike"
        assert logprobs[1] == pytest.approx(-math.log(2), abs=3000 * 2**-23), "and share it; a step of float32 is that"


def test_a_temperature_below_the_lowest_is_refused() -> None:
    load(RLConfig, "rl", ["checkpoint=a", "rollout.temperature=0.001"])
    for lower in ("0", "1e-4", "-1"):
        with pytest.raises(UserError, match=r"rollout.temperature .* greater than or equal to 0.001"):
            load(RLConfig, "rl", ["checkpoint=a", f"rollout.temperature={lower}"])


CASES = {
    "top-k": Sampling(0.9, 3, top_k=5),
    "top-p": Sampling(0.9, 3, top_p=0.8),
    "min-p": Sampling(0.9, 3, min_p=0.15),
    "all": Sampling(1.3, 3, top_k=9, top_p=0.95, min_p=0.05),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_what_stays(case: str) -> None:
    draws, sampling = 20000, CASES[case]
    logits_V = torch.linspace(-3, 2, 12)
    uids = torch.arange(draws) % 100
    tokens, logprobs, _ = sample(logits_V.expand(draws, 12), uids, torch.arange(draws) // 100, sampling)
    expected_V = kept(logits_V[None] / sampling.temperature, sampling)[0].softmax(-1)
    stay = int((expected_V > 0).sum())
    assert 1 < stay < 12
    torch.testing.assert_close(logprobs, expected_V.log()[tokens])
    counts_V = torch.bincount(tokens, minlength=12).double()
    assert counts_V[expected_V == 0].sum() == 0
    there = expected_V > 0
    chi_square = ((counts_V - draws * expected_V) ** 2 / (draws * expected_V))[there].sum().item()
    assert chi_square < stay - 1 + 4 * math.sqrt(2 * (stay - 1)) + 8, "beyond the 0.1 % point for stay - 1 degrees of freedom"


def test_tokens_that_are_left_out_need_the_log_probabilities_that_they_were_sampled_at() -> None:
    for option in ("rollout.top_k=5", "rollout.top_p=0.9", "rollout.min_p=0.1"):
        for mode in ("recompute", "mask", "staged"):
            load(RLConfig, "rl", ["checkpoint=a", f"algorithm.off_policy={mode}"])
            with pytest.raises(
                UserError, match=rf"off_policy={mode} takes the trainer's .* choose algorithm.off_policy=decoupled"
            ):
                load(RLConfig, "rl", ["checkpoint=a", f"algorithm.off_policy={mode}", option])
        for mode in ("decoupled", "bypass"):
            load(RLConfig, "rl", ["checkpoint=a", f"algorithm.off_policy={mode}", option])


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.initialize(CONFIG, seed=0, batch_invariant=True)


@torch.no_grad()
def distribution(model: LanguageModel, item: Sample, sampling: Sampling) -> torch.Tensor:
    """(response tokens, V): log-probabilities of what the engine may draw, from the trainer's forward pass."""
    ids = torch.tensor([[*item.prompt_ids, *item.response_ids][:-1]])
    documents = torch.zeros_like(ids, dtype=torch.int32)
    attend = BatchInvariantAttention(documents, model.config, documents.device)
    hidden = model.forward(ids, positions_of(documents), documents >= 0, attend).hidden_BSD[0, -item.length :]
    return kept(product(hidden, model.dense.head_VD, torch.float32) / sampling.temperature, sampling).log_softmax(-1)


@pytest.mark.parametrize("case", CASES)
def test_an_engines_logprobs_are_of_the_distribution_that_it_draws_from_and_beside_them_the_trainers(
    model: LanguageModel, case: str
) -> None:
    """With interruptions, and alike in any number of slots; the trainer's, of the whole distribution, bit for bit."""
    sampling = CASES[case]
    engine, waiting, done = engine_for(model, slots=6, sampling=sampling), requests(20), list[Sample]()
    while waiting:
        ended, waiting = interrupted(engine, waiting, 5)
        done += ended
    done.sort(key=lambda item: item.uid)
    smallest = 1.0
    for item, expected in zip(done, trainer_logprobs(model, done, temperature=sampling.temperature), strict=True):
        assert item.whole_logprobs == tuple(expected), "bit for bit"
        shares = distribution(model, item, sampling)
        found = shares.gather(1, torch.tensor(item.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(item.logprobs), found, rtol=1e-6, atol=1e-6)
        smallest = min(smallest, (shares > -math.inf).float().mean().item())
    assert smallest < 0.9, "something was left out"
    whole = complete(engine_for(model, slots=40, sampling=sampling), requests(20), 100)
    assert [(item.response_ids, item.logprobs) for item in whole] == [(item.response_ids, item.logprobs) for item in done]


def test_sampled_frequencies_follow_the_distribution_and_logprobs_name_it() -> None:
    draws, vocab, temperature = 20000, 12, 0.7
    logits_V = torch.linspace(-3, 2, vocab)
    uids = torch.arange(draws) % 100
    drawn = sample(logits_V.expand(draws, vocab), uids, torch.arange(draws) // 100, Sampling(temperature, seed=3))
    expected_V = (logits_V / temperature).softmax(-1)
    torch.testing.assert_close(drawn.logprobs_B, expected_V.log()[drawn.tokens_B])
    counts_V = torch.bincount(drawn.tokens_B, minlength=vocab).double()
    chi_square = ((counts_V - draws * expected_V) ** 2 / (draws * expected_V)).sum().item()
    assert chi_square < 31.3  # the 0.1 % point for 11 degrees of freedom


def test_what_is_left_out_is_never_drawn_and_the_rest_keeps_its_odds() -> None:
    shares = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    cases = [
        (Sampling(1.0, 0, top_k=2), 2),
        (Sampling(1.0, 0, top_p=0.69), 2),
        (Sampling(1.0, 0, top_p=0.71), 3),
        (Sampling(1.0, 0, min_p=0.3), 3),
        (Sampling(1.0, 0, top_k=4, top_p=0.99, min_p=0.2), 4),
        (Sampling(1.0, 0, top_p=1e-6), 1),
    ]
    for sampling, count in cases:
        left = kept(shares.log()[None], sampling)[0]
        assert left.isfinite().sum() == count and left[:count].isfinite().all()
        positions = torch.zeros(500, dtype=torch.int64)
        tokens, logprobs, _ = sample(shares.log().expand(500, 5), torch.arange(500), positions, sampling)
        assert tokens.max() == count - 1
        torch.testing.assert_close(logprobs, (shares / shares[:count].sum()).log()[tokens])
    assert Sampling(0.7, 1).whole and not any(sampling.whole for sampling, _ in cases)
