"""The engine against the trainer's forward pass, and its independence of batch, slots and interruptions."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.errors import UserError
from kernels.vocab_loss import token_logprobs
from rl.april import complete
from rl.engine.engine import Engine, EngineSettings
from rl.engine.pool import LocalPool, deal
from rl.engine.sampler import exponential_noise, random_bits, sample
from rl.packing import Document, pack
from rl.trajectory import Sample
from tests.models import tiny_model
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.transformer import LanguageModel

CPU = torch.device("cpu")
EOS, TEMPERATURE, MAX_NEW, LENGTH = 1, 0.8, 24, 40
CONFIG = tiny_model(
    num_experts=4, expert_hidden_size=16, routed_scale=1.0, tie_embeddings=False, max_positions=64, vocab_size=20
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = LanguageModel.initialize(CONFIG, seed=0)
    model.bias_LE += torch.linspace(-0.1, 0.1, model.bias_LE.numel()).view_as(model.bias_LE)
    return model


def engine_for(model: LanguageModel, slots: int = 8, version: int = 0, seed: int = 5, max_new: int = MAX_NEW) -> Engine:
    engine = Engine(CONFIG, EngineSettings(slots, LENGTH, max_new, TEMPERATURE, EOS, seed), CPU, torch.float32)
    engine.load_weights(model.state(), version)
    return engine


def requests(count: int) -> list[Sample]:
    """Prompts of 1..9 tokens; every third is shared by two samples."""
    prompts = [tuple(2 + (index * 7 + place) % 18 for place in range(1 + index % 9)) for index in range(count)]
    return [Sample(uid=1000 + index, group=index, prompt_ids=prompts[index - (index % 3 == 1)]) for index in range(count)]


@pytest.fixture(scope="module")
def uninterrupted(model: LanguageModel) -> list[Sample]:
    return complete(engine_for(model), requests(20), advance_tokens=5)


def trainer_logprobs(model: LanguageModel, samples: list[Sample]) -> list[list[float]]:
    """What the trainer computes for the response tokens, from packed rows."""
    result = []
    for item in samples:  # a second document in front makes positions and mask do some work
        longer = item.length + 12
        other = Document((3,) * 5, (4,) * longer, (0.0,) * longer, 0.0, (True,) * longer)
        own = Document(item.prompt_ids, item.response_ids, item.logprobs, 1.0, (True,) * item.length)
        batch = pack([own, other], sequence_length=96, rows_multiple_of=1, aggregation="token", pad_id=2)
        assert batch.num_rows == 1
        output = model.forward(
            batch.tokens_BS, positions_of(batch.documents_BS), batch.documents_BS >= 0, PackedAttention(batch.documents_BS)
        )
        logprobs, _ = token_logprobs(output.hidden_BSD[0], model.dense.head_VD, batch.targets_BS[0], temperature=TEMPERATURE)
        result.append(logprobs[batch.extras["advantages"][0] == 1].tolist())
    return result


def assert_like_the_trainer(model: LanguageModel, samples: list[Sample]) -> None:
    for item, expected in zip(samples, trainer_logprobs(model, samples), strict=True):
        assert item.logprobs == pytest.approx(expected, abs=2e-5, rel=0)


def test_samples_end_with_eos_or_at_the_limit(uninterrupted: list[Sample]) -> None:
    assert {item.status for item in uninterrupted} == {"finished", "truncated"}, "the fixture shows both"
    for item in uninterrupted:
        assert EOS not in item.response_ids[:-1]
        assert (item.response_ids[-1] == EOS) == (item.status == "finished")
        assert item.length == MAX_NEW or item.status == "finished"


def test_logprobs_equal_the_trainers(model: LanguageModel, uninterrupted: list[Sample]) -> None:
    assert_like_the_trainer(model, uninterrupted)


@pytest.mark.parametrize(("slots", "advance"), [(1, 7), (3, 2), (64, 100)])
def test_tokens_do_not_depend_on_slots_or_on_how_far_an_advance_goes(
    model: LanguageModel, uninterrupted: list[Sample], slots: int, advance: int
) -> None:
    again = complete(engine_for(model, slots), requests(20), advance)
    assert [item.response_ids for item in again] == [item.response_ids for item in uninterrupted]


def test_tokens_do_not_depend_on_the_batch_or_the_number_of_engines(model: LanguageModel, uninterrupted: list[Sample]) -> None:
    alone = [complete(engine_for(model), [request], 5)[0] for request in requests(20)[::4]]
    assert [item.response_ids for item in alone] == [item.response_ids for item in uninterrupted[::4]]
    pool = LocalPool([engine_for(model, 2), engine_for(model, 3)])
    assert [item.response_ids for item in complete(pool, requests(20), 5)] == [item.response_ids for item in uninterrupted]


def test_interruptions_change_neither_tokens_nor_logprobs(model: LanguageModel, uninterrupted: list[Sample]) -> None:
    engine, waiting, done = engine_for(model, slots=6), requests(20), []
    for _ in range(40):
        engine.submit(waiting[::-1])
        done += engine.advance(4)
        waiting = sorted(engine.drain(), key=lambda item: item.uid)
        if not waiting:
            break
    done.sort(key=lambda item: item.uid)
    assert [item.response_ids for item in done] == [item.response_ids for item in uninterrupted]
    assert [item.status for item in done] == [item.status for item in uninterrupted]
    assert max(len(item.segments) for item in done) >= MAX_NEW // 4
    assert_like_the_trainer(model, done)


def test_segments_carry_the_version_they_were_sampled_under(model: LanguageModel) -> None:
    other = LanguageModel.initialize(CONFIG, seed=1)
    engine = engine_for(model, slots=32, version=3)
    engine.submit(requests(12))
    done = engine.advance(6)
    unfinished = engine.drain()
    assert unfinished and all(item.versions == (3,) * 6 for item in unfinished)
    engine.load_weights(other.state(), 4)
    continued = complete(engine, unfinished, 6)
    assert len(done) + len(continued) == 12
    for item in continued:
        assert item.versions == (3,) * 6 + (4,) * (item.length - 6)
        assert item.segments[0] == next(before for before in unfinished if before.uid == item.uid).segments[0]
    for item, expected in zip(continued, trainer_logprobs(other, continued), strict=True):
        assert item.logprobs[6:] == pytest.approx(expected[6:], abs=2e-5, rel=0), "the prefix is encoded by the new weights"


def test_drain_returns_queued_samples_untouched_and_empties_the_engine(model: LanguageModel) -> None:
    engine = engine_for(model, slots=2)
    engine.submit(requests(6))
    assert engine.drain() == requests(6)
    engine.submit(requests(6))
    done = engine.advance(2)
    unfinished = engine.drain()
    assert {item.uid for item in (*done, *unfinished)} == {item.uid for item in requests(6)}
    assert sum(item.status == "pending" for item in unfinished) >= 2
    assert engine.drain() == [] and engine.advance(3) == []


def test_weights_cannot_change_under_a_running_sample(model: LanguageModel) -> None:
    engine = engine_for(model)
    engine.submit(requests(2))
    with pytest.raises(AssertionError, match="drain the engine first"):
        engine.load_weights(model.state(), 1)


def test_a_sample_at_a_lowered_limit_is_truncated_as_it_is(model: LanguageModel) -> None:
    engine = engine_for(model, slots=32)
    engine.submit(requests(4))
    engine.advance(6)
    partial = engine.drain()
    stopped = complete(engine_for(model, max_new=6), partial, 3)
    assert [item.status for item in stopped] == ["truncated"] * len(partial)
    assert [item.segments for item in stopped] == [item.segments for item in sorted(partial, key=lambda item: item.uid)]


def test_too_long_prompts_and_models_are_errors_with_numbers(model: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"17 tokens and rollout.max_new_tokens = 24 exceed loop.sequence_length = 40"):
        engine_for(model).submit([Sample(0, 0, (3,) * 17)])
    with pytest.raises(UserError, match=r"65 tokens, but model.max_positions is 64"):
        Engine(CONFIG, EngineSettings(2, 65, 4, 1.0, EOS, 0), CPU, torch.float32)


def test_dealt_samples_are_spread_evenly() -> None:
    hands = deal(requests(10), 3)
    assert sorted(len(hand) for hand in hands) == [3, 3, 4]
    assert sorted(item.uid for hand in hands for item in hand) == [item.uid for item in requests(10)]


# ---------------------------------------------------------------- sampler


def test_sampled_frequencies_follow_the_distribution_and_logprobs_name_it() -> None:
    draws, vocab, temperature = 20000, 12, 0.7
    logits_V = torch.linspace(-3, 2, vocab)
    uids = torch.arange(draws) % 100
    tokens, logprobs = sample(logits_V.expand(draws, vocab), uids, torch.arange(draws) // 100, 3, temperature)
    expected_V = (logits_V / temperature).softmax(-1)
    torch.testing.assert_close(logprobs, expected_V.log()[tokens])
    counts_V = torch.bincount(tokens, minlength=vocab).double()
    chi_square = ((counts_V - draws * expected_V) ** 2 / (draws * expected_V)).sum().item()
    assert chi_square < 31.3  # the 0.1 % point for 11 degrees of freedom


def test_noise_is_exponential_and_uncorrelated_between_uids_positions_tokens_and_seeds() -> None:
    uids, positions = torch.arange(64).repeat_interleave(64), torch.arange(64).repeat(64)
    noise = exponential_noise(uids, positions, 0, 32).view(64, 64, 32)
    assert noise.mean().item() == pytest.approx(1, abs=0.02)
    assert noise.var().item() == pytest.approx(1, abs=0.05)
    assert (noise > math.log(2)).double().mean().item() == pytest.approx(0.5, abs=0.01)
    other_seed = exponential_noise(uids, positions, 1, 32).view(64, 64, 32)
    pairs = [(noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1]), (noise, other_seed)]
    for left, right in pairs:
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].item()
        assert abs(correlation) < 0.015


def test_random_bits_equal_the_same_arithmetic_on_plain_integers() -> None:
    def mix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def bits(uid: int, position: int, seed: int, token: int) -> int:
        key = mix64((mix64((mix64(seed) + uid) % 2**64) + position) % 2**64)
        x = (token * 0x9E3779B9 + key) % 2**32
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x ^= key >> 32
        x = (x ^ (x >> 15)) * 0xD35A2D97 % 2**32
        return x ^ (x >> 15)

    uids, positions = torch.tensor([0, 7, 3 << 40]), torch.tensor([0, 5, 31000])
    got = random_bits(uids, positions, 11, 50)
    for row in range(3):
        for token in range(50):
            assert got[row, token].item() % 2**32 == bits(uids[row].item(), positions[row].item(), 11, token)  # type: ignore[arg-type]


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_on_a_gpu_stays_near_the_trainer_and_survives_interruptions() -> None:
    cuda = torch.device("cuda")
    config = CONFIG.model_copy(update={"hidden_size": 64, "expert_hidden_size": 32})  # the least that the kernels take
    model = LanguageModel.initialize(config, seed=0)
    engine = Engine(config, EngineSettings(6, LENGTH, MAX_NEW, TEMPERATURE, EOS, 5), cuda, torch.bfloat16)
    engine.load_weights(model.state(), 0)
    waiting, done = requests(20), []
    while waiting:
        engine.submit(waiting)
        done += engine.advance(9)
        waiting = engine.drain()
    gaps = [
        abs(got - expected)
        for item, values in zip(done, trainer_logprobs(model, done), strict=True)
        for got, expected in zip(item.logprobs, values, strict=True)
    ]
    assert len(done) == 20
    # bfloat16 keeps 8 bits; float32 weights on the CPU are the reference, so this bounds rounding and not a second error
    assert sum(gaps) / len(gaps) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sampling_noise_is_the_same_on_cpu_and_gpu() -> None:
    uids, positions = torch.arange(16) << 33, torch.arange(16)
    assert torch.equal(random_bits(uids, positions, 9, 4096), random_bits(uids.cuda(), positions.cuda(), 9, 4096).cpu())
