"""PPO's value head and the reference policy: several ranks equal one, and a checkpoint holds all there is to go on."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.vocab_loss import token_logprobs
from parallel.topology import World
from rl.algorithms import PolicyObjective
from rl.april import rollout_round
from rl.engine.engine import Engine
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.extras import PROXIMAL, REFERENCE, RETURNS, VALUES
from rl.packing import Document, Rows, documents_of, pack, policy_batches
from rl.returns import with_token_advantages
from rl.trajectory import RolloutBuffer
from rl.update import learn
from tests.checkpoints import named_state, write
from tests.distributed.ranks import run_cases, run_ranks
from tests.models import parallel, spec, tiny_model
from tests.rl.algorithm import algorithm_config
from tests.rl.test_april import each, rollout_config
from tests.rl.test_staged import OneRank
from trainer.batch import TrainBatch, cross_entropy
from trainer.checkpoint import CheckpointMeta
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.transformer import LanguageModel
from trainer.state import TrainerSpec
from trainer.step import Trainer
from trainer.value_head import RIDGES, ValueHead, depths_read
from trainer.worker import named_tensors

CONFIG = algorithm_config(
    advantage="gae",
    gae_lambda=0.9,
    value_coefficient=0.5,
    value_clip=0.05,
    kl_coefficient=0.02,
    kl_estimator="k1",
    off_policy="recompute",
)
LR, DECAY = 3e-3, 0.9


def batch_of(seed: int) -> TrainBatch:
    draw, documents = random.Random(seed), []
    for _ in range(14):
        prompt, response = (tuple(draw.randrange(61) for _ in range(draw.randint(1, n))) for n in (6, 9))
        behaviour = tuple(draw.uniform(-5, -0.1) for _ in response)
        documents.append(Document(prompt, response, behaviour, draw.gauss(0, 1), (True,) * len(response)))
    return pack(documents, sequence_length=24, rows_multiple_of=4, aggregation="token", pad_id=0)


def told(**changes: Any) -> TrainerSpec:
    model = tiny_model(**changes.pop("model", {}))
    return spec(model, value_decay=DECAY, **{"micro_rows": 4, **changes})


def meta_of(trainer: Trainer, step: int) -> CheckpointMeta:
    return CheckpointMeta("rl", step, trainer.updates, trainer.spec.model.model_dump(mode="json"), "unknown", {})


def own(batch: TrainBatch, world: World) -> TrainBatch:
    return batch.rows(*(batch.num_rows * part // world.size for part in (world.rank, world.rank + 1)))


def gathered(values: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """The rows of all ranks; every rank has equally many."""
    whole = {}
    for name, rows in values.items():
        places = torch.zeros(world.size, *rows.shape, device=world.device)
        places[world.rank] = rows.to(world.device)
        whole[name] = world.sum(places).flatten(0, 1).cpu()
    return whole


NAMES = {"logprobs": PROXIMAL, "values": VALUES, "reference_logprobs": REFERENCE}


def rounds(trainer: Trainer, world: World, first: int, last: int, warm: int = 0) -> list[dict[str, Any]]:
    """Rounds of one update each, the first `warm` of them with a frozen policy."""
    history = []
    for number in range(first, last):
        batch = batch_of(number)
        found = gathered(trainer.predict(own(batch, world), policy=True, reference=True), world)
        batch = replace(batch, extras={**batch.extras, **{NAMES[name]: value for name, value in found.items()}})
        (batch,), metrics = with_token_advantages([batch], CONFIG)
        objective = PolicyObjective(CONFIG)
        update = (
            trainer.learn_values(own(batch, world), objective)
            if number < warm
            else trainer.learn(own(batch, world), objective, LR)
        )
        history.append({**metrics, **update})
    return history


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in named_state(trainer, with_moments=True)}


def train_and_save(world: World, spec: TrainerSpec, folder: str) -> tuple[list[Any], dict[str, Tensor], list[Any]]:
    """(history of 4 rounds, state after 3 of them, predictions of the reference before and after)."""
    trainer = Trainer(spec, world)
    write(Path(folder) / "reference", trainer.state_to_save(with_moments=False), meta_of(trainer, 0), {}, world)
    trainer.keep_reference(Path(folder) / "reference")
    before = gathered(trainer.predict(own(batch_of(9), world), policy=True, reference=True), world)
    history = rounds(trainer, world, 0, 3, warm=1)
    write(Path(folder) / "step_000003", trainer.state_to_save(with_moments=True), meta_of(trainer, 3), {}, world)
    state = state_of(trainer)
    after = gathered(trainer.predict(own(batch_of(9), world), policy=True, reference=True), world)
    return history + rounds(trainer, world, 3, 4), state, [before, after]


def go_on(world: World, spec: TrainerSpec, folder: str) -> tuple[list[Any], dict[str, Tensor]]:
    trainer = Trainer(spec, world)
    trainer.load(Path(folder) / "step_000003", with_moments=True)
    trainer.keep_reference(Path(folder) / "reference")
    state = state_of(trainer)
    return rounds(trainer, world, 3, 4), state


def test_several_ranks_equal_one_and_resume_bit_for_bit(tmp_path: Path) -> None:
    results = {}
    for size in (1, 2, 4):
        (tmp_path / str(size)).mkdir()
        written = run_ranks(train_and_save, size, told(), str(tmp_path / str(size)))
        results[size] = written[0]
        history, state, (before, after) = written[0]
        torch.testing.assert_close(before["logprobs"], before["reference_logprobs"], rtol=0, atol=0 if size == 1 else 1e-5)
        assert torch.equal(before["reference_logprobs"], after["reference_logprobs"]), "the reference has moved"
        assert (after["logprobs"] - after["reference_logprobs"]).abs().max() > 1e-2, "the policy has not"
        assert history[0]["policy/kl_reference"] == pytest.approx(0, abs=1e-9) and history[3]["policy/kl_reference"] > 1e-6
        assert "train/grad_norm" not in history[0] and history[1]["train/grad_norm"] > 0
        assert all(torch.equal(state[name], other[1][name]) for other in written for name in state if name.startswith("value."))
        if size < 4:
            loaded = run_ranks(go_on, size, told(), str(tmp_path / str(size)))
            for (_, mine, _), (resumed, theirs) in zip(written, loaded, strict=True):
                assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
                exact = [key for key in resumed[0] if not key.startswith("time/")]
                assert {key: resumed[0][key] for key in exact} == {key: history[3][key] for key in exact}
    for size in (2, 4):
        for found, wanted in zip(results[size][0], results[1][0], strict=True):
            for key in ("train/loss", "value/loss", "value/explained_variance", "value/clip_share", "policy/kl_reference"):
                assert found[key] == pytest.approx(wanted[key], rel=2e-3, abs=1e-5), key
        for name in ("value.products", "value.targets"):
            torch.testing.assert_close(results[size][1][name], results[1][1][name], rtol=1e-2, atol=1e-4)


def one_update(
    world: World, spec: TrainerSpec, batch: TrainBatch, alone: bool, coefficient: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a second update on the same batch changes, when the head has learned something in a first one."""
    trainer = Trainer(spec, world)
    config = algorithm_config(advantage="gae", value_coefficient=coefficient, value_clip=None, off_policy="recompute")
    objective = PolicyObjective(config)
    trainer.learn_values(batch, objective)
    before = state_of(trainer)
    metrics = trainer.learn_values(batch, objective) if alone else trainer.learn(batch, objective, LR)
    after = state_of(trainer)
    return {name: after[name] - before[name] for name in before}, metrics


def batch_with_returns() -> TrainBatch:
    batch = batch_of(0)
    returns = torch.where(batch.targets_BS % 2 == 0, 0.9, 0.1)
    return replace(batch, extras={**batch.extras, VALUES: torch.zeros_like(returns), RETURNS: returns})


def hidden_states(spec: TrainerSpec, batch: TrainBatch, head: ValueHead) -> tuple[LanguageModel, Tensor]:
    """(the model, the head's inputs at all positions)."""
    model = LanguageModel.initialize(spec.model, spec.seed)
    for parameter in (model.experts.gate_up_LECD, model.experts.down_LEDF):
        parameter.requires_grad_()
    documents = batch.documents_BS
    arguments = (batch.tokens_BS, positions_of(documents), documents >= 0, PackedAttention(documents, documents.device))
    output = model.dense(*arguments, model.experts.layers(), model.bias_LE, depths=head.depths)
    return model, head.inputs(output.depths_BSD)


def test_the_head_alone_learns_where_the_policy_is_frozen() -> None:
    ((changes, metrics),) = run_ranks(one_update, 1, told(), batch_with_returns(), True, 0.5)
    moved = {name for name, change in changes.items() if change.any()}
    assert moved and all(name.startswith("value.") for name in moved)
    assert 0 < metrics["value/loss"] < 0.5 * 0.41, "half the mean square of the returns"


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_the_value_loss_moves_the_trunk_by_its_coefficient(coefficient: float) -> None:
    """AdamW's first moment of the embedding is that of the policy loss plus coefficient * d mean(0.5 (V - R)^2)."""
    batch, learned = batch_with_returns(), batch_of(0).weights_BS > 0
    cases = [(told(), batch, False, each) for each in (coefficient, 0.0)]
    ((changes, metrics),), ((policy, plain),) = run_cases(one_update, 1, cases)
    head = head_of(told())
    model, inputs = hidden_states(told(), batch, head)
    returns = batch.extras[RETURNS]
    head.observe(inputs, returns, batch.weights_BS)
    head.step()
    loss = 0.5 * (head(inputs)[learned] - returns[learned]).square().mean()
    assert metrics["value/loss"] == pytest.approx(loss.item(), rel=1e-3)
    (wanted,) = torch.autograd.grad(loss, model.dense.embedding.weight)
    clip = [min(1.0, told().adamw.clip_norm / m["train/grad_norm"]) * (1 - told().adamw.betas[0]) for m in (metrics, plain)]
    name = "dense.embedding.weight.exp_avg"
    found = changes[name] / clip[0] - policy[name] / clip[1]
    torch.testing.assert_close(found, coefficient * wanted, rtol=2e-3, atol=1e-5)


def head_of(spec: TrainerSpec, decay: float = DECAY) -> ValueHead:
    return ValueHead(spec.model.hidden_size, spec.model.num_layers, World(0, 1, torch.device("cpu"), 1), decay)


def test_the_fit_is_ridge_regression_on_all_that_was_seen_older_updates_counting_less() -> None:
    draw, head = torch.Generator().manual_seed(0), head_of(told(), decay=0.7)
    size = 32 * len(head.depths)
    rows, targets, masses, judged = list[Tensor](), list[Tensor](), list[Tensor](), torch.zeros(len(RIDGES)).double()
    fits = torch.zeros(len(RIDGES), size + 1).double()
    truth = torch.randn(size, generator=draw) * 0.1
    for tokens in (200, 90, 150):
        hidden = [torch.randn(1, tokens, 32, generator=draw) for _ in head.depths]
        inputs = head.inputs(hidden)
        assert torch.allclose(inputs[..., :-1].unflatten(2, (-1, 32)).square().mean(-1), torch.ones(1), atol=1e-3)
        returns = inputs[..., :-1] @ truth + 0.5 + 0.3 * torch.randn(1, tokens, generator=draw)
        weights = torch.randint(0, 3, (1, tokens), generator=draw).float()
        head.observe(inputs, returns, weights)
        head.step()
        x, y, w = inputs[0].double(), returns[0].double(), weights[0].double() / weights.sum()
        judged = 0.7 * judged + torch.stack([(w * (x @ fit - y).square()).sum() for fit in fits])
        masses = [0.7 * mass for mass in masses] + [w]
        rows, targets = [*rows, x], [*targets, y]
        for place, ridge in enumerate(RIDGES):
            total = sum(mass.sum() for mass in masses)
            if math.isinf(ridge):
                mean = sum((m * t).sum() for m, t in zip(masses, targets, strict=True)) / total
                fits[place] = torch.cat([torch.zeros(size), torch.ones(1)]).double() * mean
                continue
            scale = torch.cat(masses).sqrt()[:, None]
            penalty = math.sqrt(ridge * float(total)) * torch.eye(size + 1).double()[:-1]  # of all weights but the constant's
            stacked = torch.cat([torch.cat(rows) * scale, penalty])
            wanted = torch.cat([torch.cat(targets) * scale[:, 0], torch.zeros(size).double()])
            fits[place] = torch.linalg.lstsq(stacked, wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(head.weight_P.double(), fits[int(judged.argmin())], rtol=1e-3, atol=1e-4)
    assert not math.isinf(RIDGES[int(judged.argmin())])


def test_where_nothing_can_be_predicted_the_head_says_the_mean() -> None:
    draw, head = torch.Generator().manual_seed(1), head_of(told())
    for _ in range(4):
        inputs = head.inputs([torch.randn(1, 60, 32, generator=draw) for _ in head.depths])
        head.observe(inputs, 0.4 + 0.2 * torch.randn(1, 60, generator=draw), torch.ones(1, 60))
        head.step()
        assert not head.weight_P[:-1].any(), "also after the first update, when no fit has been judged"
    assert head.weight_P[-1] == pytest.approx(0.4, abs=0.06)
    before = dict(head.named_state())["value.products"].clone()
    head.observe(inputs, torch.ones(1, 60), torch.ones(1, 60))
    head.drop()
    head.step()
    assert torch.equal(before, dict(head.named_state())["value.products"]), "dropped observations are not learned"


def test_four_depths_are_spread_evenly_and_end_with_the_last() -> None:
    assert [depths_read(layers) for layers in (1, 3, 4, 6, 48)] == [
        (0,), (0, 1, 2), (0, 1, 2, 3), (0, 2, 3, 5), (11, 23, 35, 47)
    ]  # fmt: skip


def reference_logprobs(world: World, spec: TrainerSpec, folder: str, batch: TrainBatch) -> Tensor:
    trainer = Trainer(replace(spec, seed=spec.seed + 1), world)
    trainer.keep_reference(Path(folder))
    return gathered(trainer.predict(own(batch, world), policy=False, reference=True), world)["reference_logprobs"]


@pytest.mark.parametrize("changes", [{}, {"parallel": parallel(zero_stage=2, rematerialise=True)}, {"batch_invariant": True}])
def test_the_reference_is_the_policy_of_its_checkpoint_on_any_number_of_ranks(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec, batch = told(**changes), batch_of(1)
    model = LanguageModel.initialize(spec.model, spec.seed)
    model.bias_LE.normal_(generator=torch.Generator().manual_seed(0))
    meta = CheckpointMeta("rl", 0, 0, spec.model.model_dump(mode="json"), "unknown", {})
    write(tmp_path / "reference", named_tensors(model), meta, {}, World(0, 1, torch.device("cpu"), 1))
    documents = batch.documents_BS
    output = model.forward(
        batch.tokens_BS, positions_of(documents), documents >= 0, PackedAttention(documents, documents.device)
    )
    wanted, _ = token_logprobs(output.hidden_BSD.flatten(0, 1), model.dense.head_VD, batch.targets_BS.flatten())
    learned = batch.weights_BS > 0
    for size in (1, 2):
        found, *_ = run_ranks(reference_logprobs, size, spec, str(tmp_path / "reference"), batch)
        torch.testing.assert_close(found[learned], wanted.view_as(found)[learned].detach(), rtol=1e-5, atol=1e-5)


def both(world: World, spec: TrainerSpec, folder: str) -> dict[str, Tensor]:
    """Predictions of the policy after an update, and of the reference that is read from a checkpoint of it."""
    trainer = Trainer(spec, world)
    trainer.learn(own(batch_of(0), world), cross_entropy, LR)
    write(Path(folder), trainer.state_to_save(with_moments=False), meta_of(trainer, 0), {}, world)
    trainer.keep_reference(Path(folder))
    return trainer.predict(own(batch_of(1), world), policy=True, reference=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_rounds_as_the_trainer_does(tmp_path: Path, dtype: str) -> None:
    (found,) = run_ranks(both, 1, told(dtype=dtype), str(tmp_path / "reference"))
    assert torch.equal(found["logprobs"], found["reference_logprobs"])


def explained(world: World, spec: TrainerSpec, rounds: int) -> list[float]:
    """Of rollouts of an engine whose rewards the prompt decides in part, and the first token of the response in part."""
    trainer, buffer, config = Trainer(spec, world), RolloutBuffer(), algorithm_config(advantage="gae", updates_per_round=2)
    ranks, rows = OneRank(trainer), Rows(sequence_length=32, rows_multiple_of=1, pad_id=0)
    engine = Engine(spec.model, EngineSettings(64, 32, 8, None, Sampling(1.0, seed=5), eos_id=1), world.device, torch.float32)
    rollout = rollout_config(groups=24, samples_per_group=4, max_new_tokens=8, advance_tokens=2)
    found = []
    for version in range(rounds):
        engine.load_weights(ranks.weights(), version)
        score = each(lambda s: 0.7 * (s.prompt_ids[-1] % 2) + 0.3 * (s.response_ids[0] % 2))
        result = rollout_round(engine, buffer, lambda index: (3, 4 + index % 7), rollout, version, score)  # type: ignore[arg-type]
        batches = policy_batches(documents_of(result.groups, config, version, 8), config, 8, **rows)
        found.append(learn(ranks, batches, config, 3e-4, version)["value/explained_variance"])  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


def test_values_predict_what_can_be_predicted_within_a_few_rounds() -> None:
    (found,) = run_ranks(explained, 1, told(micro_rows=8, batch_invariant=True), 10)
    assert found[0] == 0 and min(found) > -0.1 and min(found[-2:]) > 0.3, found
