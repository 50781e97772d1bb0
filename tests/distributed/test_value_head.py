"""PPO's value head and the reference policy: several ranks equal one, and a checkpoint holds all there is to go on."""

from __future__ import annotations

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
from rl.extras import PROXIMAL, REFERENCE, RETURNS, VALUES
from rl.packing import Document, pack
from rl.returns import explained_variance, with_token_advantages
from tests.checkpoints import named_state, write
from tests.distributed.ranks import run_ranks
from tests.models import parallel, spec, tiny_model
from tests.rl.algorithm import algorithm_config
from trainer.batch import TrainBatch, cross_entropy
from trainer.checkpoint import CheckpointMeta
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.transformer import LanguageModel
from trainer.step import Trainer, TrainerSpec
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
LR, VALUE_LR = 3e-3, 2e-2


def batch_of(seed: int) -> TrainBatch:
    draw, documents = random.Random(seed), []
    for _ in range(14):
        prompt, response = (tuple(draw.randrange(61) for _ in range(draw.randint(1, n))) for n in (6, 9))
        behaviour = tuple(draw.uniform(-5, -0.1) for _ in response)
        documents.append(Document(prompt, response, behaviour, draw.gauss(0, 1), (True,) * len(response)))
    return pack(documents, sequence_length=24, rows_multiple_of=4, aggregation="token", pad_id=0)


def told(**changes: Any) -> TrainerSpec:
    model = tiny_model(**changes.pop("model", {}))
    return spec(model, value_lr=VALUE_LR, **{"micro_rows": 2, **changes})


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
        for name in ("value.weight", "value.bias", "value.weight.exp_avg"):
            torch.testing.assert_close(results[size][1][name], results[1][1][name], rtol=1e-2, atol=1e-4)


def one_update(world: World, spec: TrainerSpec, batch: TrainBatch, alone: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    trainer = Trainer(spec, world)
    objective = PolicyObjective(algorithm_config(advantage="gae", value_coefficient=0.5, off_policy="recompute"))
    before = state_of(trainer)
    metrics = trainer.learn_values(batch, objective) if alone else trainer.learn(batch, objective, LR)
    after = state_of(trainer)
    assert trainer.value_head is not None
    return {name: after[name] - before[name] for name in before}, metrics


@pytest.mark.parametrize("alone", [True, False], ids=["head-alone", "with-the-policy"])
def test_the_gradient_of_the_head_is_that_of_a_loop_and_a_frozen_policy_stays(alone: bool) -> None:
    """AdamW's first moment after one step is (1 - beta) times the gradient of value_coefficient * mean(0.5 (V - R)^2)."""
    batch = batch_of(0)
    returns = torch.randn(batch.tokens_BS.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    batch = replace(batch, extras={**batch.extras, VALUES: torch.zeros_like(returns), RETURNS: returns})
    ((changes, metrics),) = run_ranks(one_update, 1, told(), batch, alone)
    model = LanguageModel.initialize(tiny_model(), told().seed)
    documents = batch.documents_BS
    hidden = model.forward(batch.tokens_BS, positions_of(documents), documents >= 0, PackedAttention(documents)).hidden_BSD
    learned = batch.weights_BS > 0
    error = -returns[learned]  # the head starts at 0
    wanted = 0.5 * (hidden[learned] * error[:, None]).sum(0) / learned.sum()
    scale = 1 - told().adamw.betas[0]
    torch.testing.assert_close(changes["value.weight.exp_avg"], scale * wanted.detach(), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(changes["value.bias.exp_avg"], scale * 0.5 * error.mean()[None], rtol=1e-4, atol=1e-8)
    assert metrics["value/loss"] == pytest.approx(0.5 * error.square().mean().item(), rel=1e-5)
    moved = {name for name, change in changes.items() if change.any()}
    assert {name for name in moved if not name.startswith("value.")} == set() if alone else "bias" in moved


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
    output = model.forward(batch.tokens_BS, positions_of(documents), documents >= 0, PackedAttention(documents))
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


def explained_after(world: World, spec: TrainerSpec, updates: int) -> float:
    trainer, batch = Trainer(spec, world), batch_of(2)
    signs = torch.where(batch.targets_BS % 2 == 0, 1.0, -1.0)  # what comes next decides, and the hidden state knows it in part
    batch = replace(batch, extras={**batch.extras, VALUES: torch.zeros_like(signs), RETURNS: signs})
    objective = PolicyObjective(algorithm_config(advantage="gae", value_clip=None, off_policy="recompute"))
    for _ in range(updates):
        trainer.learn_values(batch, objective)
    values = trainer.predict(batch, policy=True, reference=False)["values"]
    return explained_variance([values], [signs], [batch.weights_BS > 0])


def test_the_head_alone_learns_to_predict_returns() -> None:
    none, many = (run_ranks(explained_after, 1, told(micro_rows=8), updates)[0] for updates in (0, 300))
    assert none == 0 and many > 0.3
