"""The engine against the trainer's forward pass, and its independence of batch, slots and interruptions."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from kernels.errors import UserError
from kernels.vocab_loss import token_logprobs
from rl.april import EnginePool, complete
from rl.engine.engine import Engine
from rl.engine.kv_cache import PageTable
from rl.engine.pool import LocalPool, deal
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.packing import Document, pack
from rl.trajectory import Sample
from tests.models import tiny_model
from trainer.config.model import CosineRouter, RouterConfig
from trainer.config.rl import SyncConfig
from trainer.model.attention import BatchInvariantAttention, positions_of
from trainer.model.transformer import LanguageModel
from trainer.weight_delta import WeightDelta
from trainer.weight_sync import WeightSource
from trainer.weights import PackedTensors
from trainer.weights import pack as pack_weights

CPU = torch.device("cpu")
AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["waits", "ahead"])
EOS, TEMPERATURE, MAX_NEW, LENGTH = 1, 0.8, 24, 40
SAMPLING = Sampling(TEMPERATURE, seed=5)
CONFIG = tiny_model(
    num_experts=4, expert_hidden_size=16, routed_scale=1.0, tie_embeddings=False, max_positions=64, vocab_size=20
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = LanguageModel.initialize(CONFIG, seed=0, batch_invariant=True)
    model.bias_LE += torch.linspace(-0.1, 0.1, model.bias_LE.numel()).view_as(model.bias_LE)
    return model


def settings(**changes: Any) -> EngineSettings:
    values = {"slots": 8, "max_length": LENGTH, "max_new_tokens": MAX_NEW, "cache_tokens": None, "eos_id": EOS}
    return EngineSettings(**{**values, "sampling": SAMPLING, **changes})


def engine_for(
    model: LanguageModel, slots: int = 8, version: int = 0, max_new: int = MAX_NEW, ahead: bool = False, **changes: Any
) -> Engine:
    """With `ahead`, steps overlap with what the host does as they do on a GPU."""
    engine = Engine(CONFIG, settings(slots=slots, max_new_tokens=max_new, **changes), CPU, torch.float32)
    engine._ahead = ahead
    engine.load_weights(model.state(), version)
    return engine


def interrupted(pool: EnginePool, samples: list[Sample], tokens: int) -> tuple[list[Sample], list[Sample]]:
    """Those of the samples that are done after `tokens` more tokens, and those that are not."""
    pool.submit(samples)
    stopped = [*pool.advance(tokens), *pool.drain()]
    return [sample for sample in stopped if sample.done], [sample for sample in stopped if not sample.done]


def requests(count: int) -> list[Sample]:
    """Prompts of 1..9 tokens; every third is shared by two samples."""
    prompts = [tuple(2 + (index * 7 + place) % 18 for place in range(1 + index % 9)) for index in range(count)]
    return [Sample(uid=1000 + index, group=index, prompt_ids=prompts[index - (index % 3 == 1)]) for index in range(count)]


@pytest.fixture(scope="module")
def uninterrupted(model: LanguageModel) -> list[Sample]:
    return complete(engine_for(model), requests(20), advance_tokens=5)


@torch.no_grad()
def trainer_logprobs(
    model: LanguageModel, samples: list[Sample], length: int = 128, temperature: float = TEMPERATURE
) -> list[list[float]]:
    """What the trainer computes for the response tokens, from packed rows."""
    result = []
    for item in samples:  # a second document in front makes positions and mask do some work
        length_before = item.length + 12
        other = Document((3,) * 5, (4,) * length_before, (0.0,) * length_before, 0.0, (True,) * length_before)
        own = Document(item.prompt_ids, item.response_ids, item.logprobs, 1.0, (True,) * item.length)
        batch = pack([own, other], sequence_length=length, rows_multiple_of=1, aggregation="token", pad_id=2)
        assert batch.num_rows == 1
        device = model.bias_LE.device
        documents_BS = batch.documents_BS.to(device)
        output = model.forward(
            batch.tokens_BS.to(device),
            positions_of(documents_BS),
            documents_BS >= 0,
            BatchInvariantAttention(documents_BS, model.config, documents_BS.device),
        )
        targets_S = batch.targets_BS[0].to(device)
        logprobs, _ = token_logprobs(output.hidden_BSD[0], model.dense.head_VD, targets_S, temperature=temperature)
        result.append(logprobs[batch.extras["advantages"][0] == 1].tolist())
    return result


def assert_like_the_trainer(model: LanguageModel, samples: list[Sample]) -> None:
    for item, expected in zip(samples, trainer_logprobs(model, samples), strict=True):
        assert list(item.logprobs) == expected, "bit for bit"


def test_samples_end_with_eos_or_at_the_limit(uninterrupted: list[Sample]) -> None:
    assert {item.status for item in uninterrupted} == {"finished", "truncated"}, "the fixture shows both"
    for item in uninterrupted:
        assert EOS not in item.response_ids[:-1]
        assert (item.response_ids[-1] == EOS) == (item.status == "finished")
        assert item.length == MAX_NEW or item.status == "finished"


def test_logprobs_equal_the_trainers(model: LanguageModel, uninterrupted: list[Sample]) -> None:
    assert_like_the_trainer(model, uninterrupted)


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "cosine", "size": 6, "temperature": 0.07},
        {"kind": "noisy_top_k"},
        {"kind": "group_limited", "groups": 2, "top_groups": 1},
    ],
    ids=["cosine", "noisy_top_k", "group_limited"],
)
def test_with_other_routers_logprobs_equal_the_trainers_too(router: dict[str, Any]) -> None:
    config = tiny_model(**{**CONFIG.model_dump(), "router": router})
    model = LanguageModel.initialize(config, seed=0, batch_invariant=True)
    engine = Engine(config, settings(), CPU, torch.float32)
    engine.load_weights(model.state(), 0)
    assert_like_the_trainer(model, complete(engine, requests(20), advance_tokens=5))


@AHEAD
@pytest.mark.parametrize(("slots", "advance"), [(1, 7), (3, 2), (64, 100)])
def test_tokens_do_not_depend_on_slots_or_on_how_far_an_advance_goes(
    model: LanguageModel, uninterrupted: list[Sample], slots: int, advance: int, ahead: bool
) -> None:
    engine = engine_for(model, slots, ahead=ahead)
    again = complete(engine, requests(20), advance)
    assert [item.response_ids for item in again] == [item.response_ids for item in uninterrupted]
    assert engine.drain() == [] and engine.state().pages_used == 0


def test_tokens_do_not_depend_on_the_batch_or_the_number_of_engines(model: LanguageModel, uninterrupted: list[Sample]) -> None:
    alone = [complete(engine_for(model), [request], 5)[0] for request in requests(20)[::4]]
    assert [item.response_ids for item in alone] == [item.response_ids for item in uninterrupted[::4]]
    pool = LocalPool([engine_for(model, 2), engine_for(model, 3)])
    assert [item.response_ids for item in complete(pool, requests(20), 5)] == [item.response_ids for item in uninterrupted]


@AHEAD
def test_interruptions_change_neither_tokens_nor_logprobs(
    model: LanguageModel, uninterrupted: list[Sample], ahead: bool
) -> None:
    engine, waiting, done = engine_for(model, slots=6, ahead=ahead), requests(20), list[Sample]()
    for _ in range(40):
        ended, waiting = interrupted(engine, waiting[::-1], 4)
        waiting.sort(key=lambda item: item.uid)
        done += ended
        if not waiting:
            break
    assert engine.state().pages_used == 0
    done.sort(key=lambda item: item.uid)
    assert [item.response_ids for item in done] == [item.response_ids for item in uninterrupted]
    assert [item.status for item in done] == [item.status for item in uninterrupted]
    assert max(len(item.segments) for item in done) >= MAX_NEW // 4
    assert_like_the_trainer(model, done)


@AHEAD
def test_segments_carry_the_version_they_were_sampled_under(model: LanguageModel, ahead: bool) -> None:
    other = LanguageModel.initialize(CONFIG, seed=1, batch_invariant=True)
    engine = engine_for(model, slots=32, version=3, ahead=ahead)
    done, unfinished = interrupted(engine, requests(12), 6)
    assert unfinished and all(item.versions == (3,) * 6 for item in unfinished)
    engine.load_weights(other.state(), 4)
    continued = complete(engine, unfinished, 6)
    assert len(done) + len(continued) == 12
    for item in continued:
        assert item.versions == (3,) * 6 + (4,) * (item.length - 6)
        assert item.segments[0] == next(before for before in unfinished if before.uid == item.uid).segments[0]
    for item, expected in zip(continued, trainer_logprobs(other, continued), strict=True):
        assert list(item.logprobs[6:]) == expected[6:], "the prefix is encoded by the new weights"


@AHEAD
def test_drain_returns_queued_samples_untouched_and_empties_the_engine(model: LanguageModel, ahead: bool) -> None:
    engine = engine_for(model, slots=2, ahead=ahead)
    engine.submit(requests(6))
    assert engine.drain() == requests(6)
    engine.submit(requests(6))
    done = engine.advance(2)
    unfinished = engine.drain()
    assert {item.uid for item in (*done, *unfinished)} == {item.uid for item in requests(6)}
    assert sum(item.status == "pending" for item in unfinished) >= 2
    assert engine.drain() == [] and engine.advance(3) == []


@AHEAD
def test_weights_may_change_under_running_samples(model: LanguageModel, ahead: bool) -> None:
    other = LanguageModel.initialize(CONFIG, seed=1, batch_invariant=True)
    engine = engine_for(model, slots=32, ahead=ahead)
    engine.submit(requests(12))
    done = engine.advance(6)
    engine.load_weights(other.state(), 1)
    continued = [*engine.advance(100), *engine.drain()]
    assert len(done) + len(continued) == 12
    for item, old, new in zip(continued, trainer_logprobs(model, continued), trainer_logprobs(other, continued), strict=True):
        assert item.versions == (0,) * 6 + (1,) * (item.length - 6)
        assert list(item.logprobs) == old[:6] + new[6:], "bit for bit, each under its weights"


def test_changes_of_weights_make_the_same_engine_as_all_weights(model: LanguageModel) -> None:
    """Under running samples, bit for bit; the hashes agree, and the engine says how much changed."""
    after = LanguageModel.initialize(CONFIG, seed=0, batch_invariant=True)
    after.load_state({name: tensor * (1 + 1e-3 * (torch.rand(tensor.shape) < 0.1)) for name, tensor in model.state().items()})
    config, source, whole = SyncConfig(transport="store", anchor_every=5, check=True), WeightSource(), WeightSource()
    engines = [Engine(CONFIG, settings(), CPU, torch.float32) for _ in range(2)]
    done: list[list[Sample]] = [[], []]
    for version, weights in enumerate((model, after)):
        block = pack_weights(weights.state())
        updates = (
            source.update(block, version, config),
            whole.update(block, version, SyncConfig(transport="store", anchor_every=1, check=True)),
        )
        receipts = [engine.receive(update) for engine, update in zip(engines, updates, strict=True)]
        for engine, found in zip(engines, done, strict=True):
            if version == 0:
                engine.submit(requests(12))
            found += engine.advance(6 if version == 0 else 100)
    by_changes, by_all = (sorted(found, key=lambda item: item.uid) for found in done)
    assert by_changes == by_all and len(by_all) == 12
    assert {version for item in by_all for version in item.versions} == {0, 1}
    assert receipts[1].changed_share is None and receipts[0].changed_share == pytest.approx(0.1, abs=0.02)
    assert receipts[0].nbytes < receipts[1].nbytes / 4 and receipts[0].check_s


def test_an_engine_refuses_changes_to_a_version_that_it_does_not_have(model: LanguageModel) -> None:
    source, config = WeightSource(), SyncConfig(transport="store", anchor_every=5, check=False)
    anchor, update = (source.update(pack_weights(model.state()), version, config) for version in (6, 7))
    assert isinstance(update.weights, WeightDelta)
    fresh, older = Engine(CONFIG, settings(), CPU, torch.float32), engine_for(model, version=5)
    for engine, version in ((fresh, None), (older, 5)):
        with pytest.raises(RuntimeError, match=f"changes from version 6, but this engine has {version}"):
            engine.receive(update)
        for one in (anchor, update):
            engine.receive(one)
        assert complete(engine, requests(1), 5)[0].versions[0] == 7


def test_weights_that_arrive_wrong_are_an_error_that_names_them(model: LanguageModel) -> None:
    update = WeightSource().update(pack_weights(model.state()), 3, SyncConfig(transport="store", anchor_every=1, check=True))
    assert isinstance(update.weights, PackedTensors)
    start = update.weights.layout["bias"][0]
    update.weights.data[start] ^= 1
    with pytest.raises(RuntimeError, match=r"weights of version 3 arrived wrong: 1 of \d+ tensors differ .* bias among them"):
        engine_for(model).receive(update)


def test_samples_share_the_pages_of_what_they_have_in_common(model: LanguageModel) -> None:
    prompt = tuple(2 + place % 18 for place in range(37))  # two full pages and five tokens
    group = [Sample(uid=index, group=0, prompt_ids=prompt) for index in range(8)]
    pages = 2 + 8 * 2  # what the group needs if the full pages exist once
    engine = engine_for(model, slots=8, max_new=20, max_length=60, cache_tokens=16 * pages)
    done = complete(engine, group, 5)
    roomy = complete(engine_for(model, slots=8, max_new=20, max_length=60), group[::-1], 5)
    assert done == roomy, "nobody had to make room"
    assert_like_the_trainer(model, done)


def test_a_cache_too_small_for_all_rows_changes_no_result(model: LanguageModel, uninterrupted: list[Sample]) -> None:
    again = complete(engine_for(model, slots=8, cache_tokens=64), requests(20), 5)
    assert [item.response_ids for item in again] == [item.response_ids for item in uninterrupted]
    assert [item.logprobs for item in again] == [item.logprobs for item in uninterrupted]
    assert max(len(item.segments) for item in again) > 1, "some rows had to make room"
    with pytest.raises(UserError, match=r"rollout.cache_tokens = 39 cannot hold one sequence of loop.sequence_length = 40"):
        engine_for(model, cache_tokens=39)


def test_a_long_prefix_enters_in_chunks(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [
        Sample(uid=index, group=index, prompt_ids=tuple(2 + (place * index) % 18 for place in range(16))) for index in range(9)
    ]
    whole = complete(engine_for(model), long, 5)
    monkeypatch.setattr("rl.engine.engine.PREFILL_TOKENS", 7)
    assert complete(engine_for(model), long, 5) == whole


@settings_of_hypothesis(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_a_page_is_free_exactly_when_nobody_holds_it(wanted: list[tuple[int, int]], random: Random) -> None:
    table, held = PageTable(60, 4), []
    for kind, length in wanted:
        ids = [kind] * length
        shared = table.shared(ids)
        if held and (random.random() < 0.4 or table.pages_for(length) - len(shared) > table.free):
            table.release(held.pop(random.randrange(len(held)))[0])
            continue
        if table.pages_for(length) - len(shared) > table.free:
            continue
        table.hold(shared)
        pages = shared + table.take(table.pages_for(length) - len(shared))
        table.publish(pages, ids)
        held.append((pages, ids))
        owners: dict[int, tuple[int, ...]] = {}
        for own, tokens in held:
            for place, page in enumerate(own):
                content = (place, *tokens[: (place + 1) * 4])
                assert owners.setdefault(page, content) == content, "a page is shared only where all up to it is the same"
        assert table.free == 59 - len(owners) and 0 not in owners
    for pages, _ in held:
        table.release(pages)
    assert table.free == 59 and table.shared([0] * 40) == []


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
        Engine(CONFIG, settings(max_length=65), CPU, torch.float32)


def test_a_model_whose_experts_choose_tokens_is_refused_with_the_way_out() -> None:
    chooses = {"router": {"kind": "expert_choice", "most_experts": 4}, "selection_bias": False}
    config = tiny_model(**{**CONFIG.model_dump(), **chooses})
    with pytest.raises(UserError, match=r"expert_choice .* cannot generate, nor go into RL; pretrain one with .*top_k"):
        Engine(config, settings(), CPU, torch.float32)


def test_dealt_samples_are_spread_evenly() -> None:
    hands = deal(requests(10), 3)
    assert sorted(len(hand) for hand in hands) == [3, 3, 4]
    assert sorted(item.uid for hand in hands for item in hand) == [item.uid for item in requests(10)]


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("heads", "router", "sampling"),
    [
        ((4, 2, 32), CONFIG.router, SAMPLING),
        ((8, 1, 64), CONFIG.router, SAMPLING),
        ((3, 3, 128), CONFIG.router, SAMPLING),
        ((4, 2, 32), CosineRouter(kind="cosine", size=6, temperature=0.07), SAMPLING),
        ((4, 2, 32), CONFIG.router, Sampling(TEMPERATURE, seed=5, top_k=12, top_p=0.9, min_p=0.02)),
    ],
    ids=["4-heads", "8-heads", "3-heads", "cosine", "cut"],
)
def test_bfloat16_logprobs_on_a_gpu_are_the_trainers_bit_for_bit(
    heads: tuple[int, int, int], router: RouterConfig, sampling: Sampling
) -> None:
    cuda = torch.device("cuda")
    sizes = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=True))
    changes = {"hidden_size": 192, "expert_hidden_size": 96, "max_positions": 512, "router": router, **sizes}
    config = CONFIG.model_copy(update=changes)
    model = LanguageModel.initialize(config, seed=0, batch_invariant=True).to(cuda, torch.bfloat16)
    engine = Engine(config, settings(slots=24, max_length=300, max_new_tokens=200, sampling=sampling), cuda, torch.bfloat16)
    engine.load_weights(model.state(), 0)
    prompts = [tuple(2 + (index * 7 + place) % 18 for place in range(1 + 9 * index)) for index in range(10)]
    waiting = [Sample(uid=index, group=index // 4, prompt_ids=prompts[index // 4]) for index in range(40)]
    done: list[Sample] = []
    while waiting:  # every sample is interrupted at least once, and graphs of many sizes are replayed
        ended, waiting = interrupted(engine, waiting, 67)
        done += ended
    assert len(done) == 40 and max(len(item.segments) for item in done) > 1
    for item, expected in zip(done, trainer_logprobs(model, done, 600), strict=True):
        assert list(item.whole_logprobs or item.logprobs) == expected, "bit for bit"
        assert (item.whole_logprobs is None) == sampling.whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefixes_are_filled_without_a_wait_for_what_the_gpu_is_at() -> None:
    cuda = torch.device("cuda")
    config = CONFIG.model_copy(update={"hidden_size": 192, "expert_hidden_size": 96, "max_positions": 512, "head_dim": 32})
    engine = Engine(config, settings(slots=8, max_length=300, max_new_tokens=200), cuda, torch.bfloat16)
    engine.load_weights(LanguageModel.initialize(config, seed=0, batch_invariant=True).state(), 0)
    samples = [Sample(uid=index, group=index, prompt_ids=tuple(range(2, 12 + index))) for index in range(8)]
    done = torch.cuda.Event()
    for busy in (False, False, True):  # kernels are loaded at their first call, which waits
        torch.cuda.synchronize()
        if busy:
            torch.cuda._sleep(2 * 10**9)  # cycles: about a second
        done.record()
        engine.submit(samples)
        with torch.inference_mode():
            engine._admit()
            engine._prefill()
        waited = done.query()
        assert not any(row.to_fill for row in engine._filling) and len(engine.drain()) == len(samples)
    assert not waited, "the host waited for what was started before"
