"""The experts that engines record are those that they used, and a trainer that replays them uses the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.errors import UserError
from kernels.vocab_loss import token_logprobs
from launch.cli import load
from parallel.topology import World
from rl.algorithms import PolicyObjective
from rl.april import complete
from rl.engine.engine import Engine
from rl.packing import documents_of, policy_batches
from rl.routed_experts import RoutedExperts
from rl.trajectory import Group, RolloutBuffer, Sample, fresh_group
from rl.turns import TurnPool
from tests.checkpoints import named_state
from tests.distributed.ranks import run_cases, run_ranks
from tests.distributed.test_policy_update import own_rows
from tests.models import parallel, spec, tiny_model
from tests.rl.algorithm import algorithm_config
from tests.rl.test_engine import CONFIG, CPU, EOS, MAX_NEW, engine_for, interrupted, requests, settings
from tests.rl.test_turns import replied
from trainer.batch import TrainBatch
from trainer.config.rl import RLConfig
from trainer.model.attention import BatchInvariantAttention, positions_of
from trainer.model.transformer import LanguageModel, Output
from trainer.state import TrainerSpec
from trainer.step import Trainer


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = LanguageModel.initialize(CONFIG, seed=0, batch_invariant=True)
    model.bias_LE += torch.linspace(-0.1, 0.1, model.bias_LE.numel()).view_as(model.bias_LE)
    return model


def forward(model: LanguageModel, tokens_BS: Tensor, documents_BS: Tensor, recorded_BSLK: Tensor | None = None) -> Output:
    attend = BatchInvariantAttention(documents_BS, model.config, documents_BS.device)
    arguments = (tokens_BS, positions_of(documents_BS), documents_BS >= 0, attend, model.experts.layers(), model.bias_LE)
    return model.dense(*arguments, recorded_BSLK=recorded_BSLK)  # type: ignore[no-any-return]


def chosen(model: LanguageModel, sample: Sample) -> Tensor:
    """(T, L, K): the experts of all tokens of a sample but the last, by a pass over all of them at once."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids][:-1]])
    return torch.stack(forward(model, ids, torch.zeros_like(ids, dtype=torch.int32)).experts_LTK, dim=1)


def recorded(sample: Sample) -> Tensor:
    assert sample.experts is not None and sample.recorded == len(sample.prompt_ids) + sample.length - 1
    return sample.experts.tensor().long()


@pytest.mark.parametrize("changes", [{}, {"slots": 3}, {"cache_tokens": 64}], ids=["at-once", "few-slots", "little-cache"])
def test_records_are_the_trainers_choices_through_prefill_sharing_and_lack_of_pages(
    model: LanguageModel, changes: dict[str, Any]
) -> None:
    done = complete(engine_for(model, record_routing=True, **changes), requests(20), 5)
    assert max(len(sample.segments) for sample in done) > 1 or not changes.get("cache_tokens")
    for sample in done:
        assert torch.equal(recorded(sample), chosen(model, sample))
    plain = complete(engine_for(model, **changes), requests(20), 5)
    assert [s.logprobs for s in plain] == [s.logprobs for s in done] and all(s.experts is None for s in plain)


def test_a_group_that_shares_pages_shares_their_records(model: LanguageModel) -> None:
    prompt = tuple(2 + place % 18 for place in range(37))
    group = fresh_group(0, prompt, 8).samples
    engine = engine_for(model, max_new=20, max_length=60, cache_tokens=16 * (2 + 8 * 2), record_routing=True)
    for sample in complete(engine, group, 5):
        assert torch.equal(recorded(sample), chosen(model, sample))


@pytest.mark.parametrize("advance", [1, 5])
def test_tokens_keep_the_experts_of_the_weights_that_went_on_from_them(model: LanguageModel, advance: int) -> None:
    """Through interruptions, conversations and checkpoints, under other weights each time."""
    models = [model, LanguageModel.initialize(CONFIG, seed=1, batch_invariant=True)]
    waiting, done, version = requests(20), list[Sample](), 0
    while waiting:
        engine = engine_for(models[version % 2], slots=20, version=version, record_routing=True, ahead=version % 4 > 1)
        pool = TurnPool(engine, replied)
        ended, waiting = interrupted(pool, waiting, advance)
        done += ended
        buffer = RolloutBuffer([Group(sample.group, (sample,)) for sample in waiting])
        state = json.loads(json.dumps(buffer.to_state()))
        waiting = [sample for group in RolloutBuffer.from_state(state).recycled for sample in group.samples]
        version += 1
    assert version > 3 and any(len(sample.turns) > 1 for sample in done)
    for sample in done:
        choices, found, place = [chosen(model, sample) for model in models], recorded(sample), 0
        for segment in sample.segments:
            if segment.experts is not None:
                end = place + segment.experts.tokens
                assert torch.equal(found[place:end], choices[segment.weight_version % 2][place:end])
                place = end
            else:
                assert not segment.sampled
        assert place == len(found)


def test_a_record_is_one_byte_an_expert_or_two_where_there_are_many() -> None:
    for dtype, size in ((torch.uint8, 1), (torch.int16, 2)):
        experts = torch.randint(0, 200, (5, 3, 2)).to(dtype)
        record = RoutedExperts.of(experts)
        assert len(record.data) == 30 * size and torch.equal(record.tensor(), experts) and record.tensor().dtype == dtype
        joined = RoutedExperts.joined([record, RoutedExperts.of(experts[:2])])
        assert torch.equal(joined.tensor(), torch.cat([experts, experts[:2]]))
        assert RoutedExperts.from_state(json.loads(json.dumps(joined.to_state()))) == joined


# ---------------------------------------------------------------- the trainer

TOLD = spec(tiny_model(), micro_rows=2, batch_invariant=True, temperature=0.8)
OBJECTIVE = PolicyObjective(algorithm_config(updates_per_round=1, off_policy="bypass"))


@cache
def rollouts(seed: int) -> list[Group]:
    """Finished groups with rewards, generated by an engine that records, with a model of this seed."""
    model = LanguageModel.initialize(TOLD.model, seed, batch_invariant=True)
    engine = Engine(model.config, settings(max_length=40, slots=16, record_routing=True), CPU, torch.float32)
    engine.load_weights(model.state(), 0)
    samples = [sample for index in range(5) for sample in fresh_group(index, (3, 4 + index, 5)[: 1 + index % 3], 3).samples]
    done = [replace(sample, reward=float(sample.uid % 3)) for sample in complete(engine, samples, 7)]
    assert EOS in {sample.response_ids[-1] for sample in done}
    return [Group(index, tuple(sample for sample in done if sample.group == index)) for index in range(5)]


def batch_of(groups: Sequence[Group], ranks: int) -> TrainBatch:
    documents = documents_of(groups, OBJECTIVE.config, 0, MAX_NEW)
    (batch,) = policy_batches(documents, OBJECTIVE.config, MAX_NEW, sequence_length=64, rows_multiple_of=2 * ranks, pad_id=0)
    assert batch.routed_BSLK is not None and batch.routed_BSLK.dtype == torch.uint8
    return batch


def update(world: World, told: TrainerSpec, batch: TrainBatch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An update, and the optimizer's state behind it, whose first moments are the gradients."""
    trainer = Trainer(told, world)
    metrics = trainer.learn(own_rows(batch, world), OBJECTIVE, 1e-3)
    return metrics, {name: tensor.clone() for name, tensor in named_state(trainer, with_moments=True)}


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-rank": (1, {}),
    "recompute": (1, {"recompute": True}),
    "two-ranks-with-copies": (2, {"recompute": True, "parallel": parallel(rematerialise=True)}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replay_of_the_trainers_own_routing_changes_no_bit(variant: str) -> None:
    ranks, changes = VARIANTS[variant]
    told = replace(TOLD, **changes)
    batch = batch_of(rollouts(TOLD.seed), ranks)
    without, replayed = run_cases(update, ranks, [(told, replace(batch, routed_BSLK=None)), (told, batch)])
    for (plain, state), (metrics, again) in zip(without, replayed, strict=True):
        assert metrics.pop("moe/replay_changed") == 0 and plain["train/grad_norm"] > 0
        assert {key: value for key, value in metrics.items() if not key.startswith("time/")} == {
            key: value for key, value in plain.items() if not key.startswith("time/")
        }
        assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


def test_with_replay_the_routing_is_the_engines_whatever_the_weights() -> None:
    """And the loss and its gradient are those of a single model with this routing, on one rank and on two."""
    groups = rollouts(TOLD.seed + 1)
    batch = batch_of(groups, 2)
    assert batch.routed_BSLK is not None
    model = LanguageModel.initialize(TOLD.model, TOLD.seed, batch_invariant=True)
    output = forward(model, batch.tokens_BS, batch.documents_BS, batch.routed_BSLK)
    valid = (batch.documents_BS >= 0).flatten()
    for layer, experts_TK in enumerate(output.experts_LTK):
        assert torch.equal(experts_TK[valid], batch.routed_BSLK[:, :, layer].flatten(0, 1)[valid].long())
    free = forward(model, batch.tokens_BS, batch.documents_BS)
    assert any((a != b)[valid].any() for a, b in zip(output.experts_LTK, free.experts_LTK, strict=True))
    assert output.replaced_BS is not None and 0.05 < output.replaced_BS[batch.weights_BS > 0].mean() < 1

    learned = batch.weights_BS > 0
    logprobs, _ = token_logprobs(
        output.hidden_BSD.flatten(0, 1), model.dense.head_VD, batch.targets_BS.flatten(), temperature=0.8
    )
    gap = (logprobs.view(batch.tokens_BS.shape) - batch.extras["behaviour_logprobs"])[learned].clamp(-20, 20)
    advantages, ratio = batch.extras["advantages"][learned], gap.exp()
    low, high = 1 - OBJECTIVE.config.clip_low, 1 + OBJECTIVE.config.clip_high
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(low, high) * advantages).mean()
    shares = output.counts_LE / output.counts_LE.sum(dim=1, keepdim=True)
    gates = [gate.weight for gate in model.dense.gates()]
    gradients = torch.autograd.grad(loss, gates)
    assert all(gradient.any() for gradient in gradients), "the gates learn"
    for ranks in (1, 2):
        for metrics, state in run_ranks(update, ranks, TOLD, batch):
            assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert torch.allclose(torch.tensor(metrics["moe/load"]), shares.float(), atol=1e-5)
            assert metrics["moe/replay_changed"] == pytest.approx(output.replaced_BS[learned].mean().item(), rel=1e-5)
            clip = min(1.0, TOLD.adamw.clip_norm / metrics["train/grad_norm"]) * (1 - TOLD.adamw.betas[0])
            for layer, gradient in enumerate(gradients, start=TOLD.model.num_dense_layers):
                found = state[f"dense.blocks.{layer}.mlp.gate.weight.exp_avg"]
                torch.testing.assert_close(found, clip * gradient, rtol=1e-3, atol=1e-7)


def test_tokens_without_a_record_choose_for_themselves() -> None:
    """Samples from before the option, padding, and what an answer left at the end."""
    model = LanguageModel.initialize(TOLD.model, TOLD.seed, batch_invariant=True)
    (first, *others) = rollouts(TOLD.seed + 1)
    bare = Group(
        first.id, tuple(replace(s, segments=tuple(replace(g, experts=None) for g in s.segments)) for s in first.samples)
    )
    batch = batch_of([bare, *others], 1)
    assert batch.routed_BSLK is not None
    unknown = (batch.routed_BSLK == 255).all(dim=-1).all(dim=-1)
    assert int(unknown.sum()) == int((batch.documents_BS < 0).sum()) + sum(
        len(s.prompt_ids) + s.length - 1 for s in bare.samples
    )
    free = forward(model, batch.tokens_BS, batch.documents_BS)
    replayed = forward(model, batch.tokens_BS, batch.documents_BS, batch.routed_BSLK)
    known_first = torch.equal(free.experts_LTK[0][unknown.flatten()], replayed.experts_LTK[0][unknown.flatten()])
    assert known_first and replayed.replaced_BS is not None and not replayed.replaced_BS[unknown].any()


def test_a_completion_server_is_refused() -> None:
    options = ["checkpoint=a", "rollout=sync", "rollout.server=http://a:1/v1", "algorithm.off_policy=bypass"]
    load(RLConfig, "rl", options)
    with pytest.raises(UserError, match=r"replay_routing needs the experts of every token.*token_band"):
        load(RLConfig, "rl", [*options, "rollout.replay_routing=true"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_records_in_bfloat16_on_a_gpu_are_the_trainers_choices() -> None:
    """Graphs are replayed, rows that are done decode on in vain, and every sample is interrupted."""
    cuda = torch.device("cuda")
    config = CONFIG.model_copy(update={"hidden_size": 192, "expert_hidden_size": 96, "max_positions": 512, "head_dim": 32})
    model = LanguageModel.initialize(config, seed=0, batch_invariant=True).to(cuda, torch.bfloat16)
    engine = Engine(config, settings(slots=24, max_length=256, max_new_tokens=200, record_routing=True), cuda, torch.bfloat16)
    engine.load_weights(model.state(), 0)
    waiting = [Sample(uid, uid // 4, tuple(2 + (uid // 4 + place) % 18 for place in range(56))) for uid in range(40)]
    done: list[Sample] = []
    while waiting:
        ended, waiting = interrupted(engine, waiting, 67)
        done += ended
    for sample in done:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids][:-1]], device=cuda)
        output = forward(model, ids, torch.zeros_like(ids, dtype=torch.int32))
        assert torch.equal(recorded(sample), torch.stack(output.experts_LTK, dim=1).cpu())
