"""A policy update equals a loop over responses, each alone in the model, however rows, micro-batches and ranks deal them out.

The reference never packs: it takes one document at a time through the whole model, writes the loss of the response from its
definition, and lets autograd do the rest. Sequence quantities that leak between documents of a row, means that are taken per
row, per micro-batch or per rank, and masks that are lost on the way, each show here.
"""

from __future__ import annotations

import math
import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.vocab_loss import token_logprobs
from parallel.topology import World
from rl.algorithms import PolicyObjective
from rl.extras import PROXIMAL
from rl.packing import Document, policy_batches
from tests.distributed.ranks import run_cases, run_ranks
from tests.models import spec, tiny_model
from tests.rl.algorithm import algorithm_config
from trainer.batch import TrainBatch
from trainer.config.rl import AlgorithmConfig
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.transformer import LanguageModel
from trainer.state import TrainerSpec
from trainer.step import Trainer

LONGEST = 9  # tokens of a response
CASES: dict[str, dict[str, Any]] = {
    "gspo-sequence": {"loss": "gspo", "clip_low": 0.1, "clip_high": 0.1, "aggregation": "sequence", "off_policy": "bypass"},
    "ppo-token-masks": {"off_policy": "decoupled", "token_band": (0.5, 2.0), "sequence_delta": 0.1, "entropy_bonus": 0.01},
    "ppo-constant": {"off_policy": "bypass", "aggregation": "constant"},
}


def model_of(told: TrainerSpec) -> LanguageModel:
    return LanguageModel.initialize(told.model, told.seed)


def alone(model: LanguageModel, document: Document) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) of the response of one document in a row of its own."""
    ids = torch.tensor([document.prompt_ids + document.response_ids])
    numbers = torch.zeros(1, document.positions, dtype=torch.int32)
    output = model.forward(ids[:, :-1], positions_of(numbers), numbers >= 0, PackedAttention(numbers, numbers.device))
    logprobs, entropy = token_logprobs(output.hidden_BSD.flatten(0, 1), model.dense.head_VD, ids[0, 1:])
    return logprobs[-len(document.response_ids) :], entropy[-len(document.response_ids) :]


@cache
def random_documents(count: int) -> list[Document]:
    """Responses whose stored log-probabilities are near those of the model, some of their tokens not learned."""
    draw, model, documents = random.Random(0), model_of(spec(tiny_model())), []
    for _ in range(count):
        prompt, response = (tuple(draw.randrange(61) for _ in range(draw.randint(1, n))) for n in (6, LONGEST))
        learned = (True, *(draw.random() < 0.8 for _ in response[1:]))
        plain = Document(prompt, response, (0.0,) * len(response), draw.gauss(0, 1), learned)
        with torch.no_grad():
            logprobs = alone(model, plain)[0].tolist()
        behaviour = tuple(min(0.0, value + draw.gauss(0, 0.4)) for value in logprobs)
        documents.append(Document(prompt, response, behaviour, plain.advantage, learned))
    return documents


def token_losses(logprobs: Tensor, entropy: Tensor, document: Document, config: AlgorithmConfig) -> list[Tensor]:
    """The loss of every learned token of a response, by the definitions."""
    a, low, high = document.advantage, 1 - config.clip_low, 1 + config.clip_high
    pairs = zip(logprobs, document.behaviour_logprobs, document.learned, strict=True)
    gaps = [lp - behaviour for lp, behaviour, learned in pairs if learned]
    mean = torch.stack(gaps).mean()
    if config.loss == "gspo":
        s = mean.exp()
        return [torch.maximum(-s * a, -s.clamp(low, high) * a)] * len(gaps)
    if config.off_policy == "bypass":
        return [torch.maximum(-gap.exp() * a, -gap.exp().clamp(low, high) * a) for gap in gaps]
    losses = []
    assert config.token_band is not None and config.sequence_delta is not None
    entropies = [value for value, learned in zip(entropy, document.learned, strict=True) if learned]
    for gap, h in zip(gaps, entropies, strict=True):
        weight = math.exp(gap.item())
        kept = config.token_band[0] <= weight <= config.token_band[1] and not (a < 0 and -mean.item() > config.sequence_delta)
        policy = -min(weight, config.truncation) * a * (gap - gap.detach()).exp() if kept else 0.0
        losses.append(policy - config.entropy_bonus * h)
    return losses


def loop_over_responses(told: TrainerSpec, documents: list[Document], config: AlgorithmConfig) -> tuple[float, float]:
    """(mean loss over the learned tokens or sequences, norm of the gradient of what is minimised)."""
    model = model_of(told)
    parameters = [*model.dense.parameters(), model.experts.gate_up_LECD, model.experts.down_LEDF]
    for parameter in parameters:
        parameter.requires_grad_()
    responses = [token_losses(*alone(model, document), document, config) for document in documents]
    token_mean = sum(sum(losses) for losses in responses) / sum(map(len, responses))
    if config.aggregation == "sequence":
        reported = loss = sum(sum(losses) / len(losses) for losses in responses) / len(responses)
    elif config.aggregation == "constant":
        reported, loss = token_mean, sum(sum(losses) for losses in responses) / (len(responses) * LONGEST)
    else:
        reported = loss = token_mean
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(reported.detach()), math.sqrt(sum(float((g**2).sum()) for g in gradients if g is not None))


def batches_of(documents: list[Document], config: AlgorithmConfig, length: int, multiple: int) -> list[TrainBatch]:
    return policy_batches(documents, config, LONGEST, sequence_length=length, rows_multiple_of=multiple, pad_id=0)


def own_rows(batch: TrainBatch, world: World) -> TrainBatch:
    share = batch.num_rows // world.size
    return batch.rows(world.rank * share, (world.rank + 1) * share)


def update(world: World, told: TrainerSpec, batch: TrainBatch, config: AlgorithmConfig) -> dict[str, Any]:
    return Trainer(told, world).learn(own_rows(batch, world), PolicyObjective(config), 1e-3)


@pytest.mark.parametrize("case", CASES)
def test_an_update_equals_a_loop_over_responses_for_any_rows_micro_batches_and_ranks(case: str) -> None:
    config = algorithm_config(**CASES[case])
    documents = random_documents(14)
    loss, norm = loop_over_responses(spec(tiny_model()), documents, config)
    for size, layouts in ((1, [(8, 64), (1, 16)]), (2, [(2, 24)])):
        cases = [
            (spec(tiny_model(), micro_rows=micro_rows), *batches_of(documents, config, length, size), config)
            for micro_rows, length in layouts
        ]
        for metrics in (found for by_rank in run_cases(update, size, cases) for found in by_rank):
            assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5)
            assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
            assert metrics["train/tokens"] == sum(sum(document.learned) for document in documents)
    assert 0 < metrics["policy/clip_share"] + metrics["policy/masked_share"] < 1


def two_updates(world: World, told: TrainerSpec, batches: list[TrainBatch], config: AlgorithmConfig) -> list[Any]:
    """The log-probabilities before both updates, and what the updates tell."""
    trainer = Trainer(told, world)
    shares = [own_rows(batch, world) for batch in batches]
    proximal = [trainer.predict(share, policy=True, reference=False)["logprobs"] for share in shares]
    shares = [
        TrainBatch(s.tokens_BS, s.targets_BS, s.documents_BS, s.weights_BS, {**s.extras, PROXIMAL: logprobs}, s.denominator)
        for s, logprobs in zip(shares, proximal, strict=True)
    ]
    return [proximal, [trainer.learn(share, PolicyObjective(config), 3e-3) for share in shares]]


def test_the_clip_acts_on_the_second_update_of_a_round_and_ranks_agree() -> None:
    config = algorithm_config(updates_per_round=2, clip_low=0.02, clip_high=0.02)
    told = spec(tiny_model(), micro_rows=2)
    documents = random_documents(14)
    batches = batches_of(documents, config, 24, 2)
    assert len(batches) == 2
    (alone_proximal, alone_told), *_ = run_ranks(two_updates, 1, told, batches, config)
    results = run_ranks(two_updates, 2, told, batches, config)
    for index, batch in enumerate(batches):
        together = torch.cat([proximal[index] for proximal, _ in results])
        learned = batch.weights_BS > 0
        torch.testing.assert_close(together[learned], alone_proximal[index][learned], rtol=1e-5, atol=1e-5)
        for key in ("train/loss", "train/grad_norm", "policy/ratio_mean", "policy/clip_share"):
            assert results[0][1][index][key] == pytest.approx(alone_told[index][key], rel=1e-3, abs=1e-5), key
    first, second = alone_told
    assert first["policy/clip_share"] == 0 and first["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert second["policy/clip_share"] > 0


def test_a_round_has_no_more_updates_than_responses_and_loses_none() -> None:
    documents = random_documents(3)
    for updates, expected in ((1, 1), (2, 2), (5, 3)):
        batches = batches_of(documents, algorithm_config(updates_per_round=updates, aggregation="constant"), 24, 1)
        assert len(batches) == expected
        assert sum(batch.denominator or 0 for batch in batches) == 3 * LONGEST
        assert sum(int((batch.weights_BS > 0).sum()) for batch in batches) == sum(sum(d.learned) for d in documents)
