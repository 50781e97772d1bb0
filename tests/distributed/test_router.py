"""The router in RL: gates that are frozen keep every bit, and a selection bias that moves reaches the engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.topology import World
from rl.engine.engine import Engine
from rl.engine.sampler import Sampling
from rl.engine.settings import EngineSettings
from rl.trajectory import fresh_group
from tests.distributed.ranks import run_cases, run_ranks
from tests.distributed.test_trainer import learn as learn_steps
from tests.distributed.test_trainer import own_state
from tests.models import parallel, random_batch, spec, tiny_model
from trainer.batch import cross_entropy
from trainer.config.rl import SyncConfig
from trainer.state import TrainerSpec
from trainer.step import Trainer
from trainer.weights import unpack
from trainer.worker import TrainWorker


def changes(world: World, told: TrainerSpec) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    trainer = Trainer(told, world)
    before = own_state(trainer, with_moments=True)
    history = learn_steps(trainer, world, 0, 3)
    after = own_state(trainer, with_moments=True)
    return {name: after[name] - before[name] for name in before if name.startswith("dense.")}, history


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1, {"dtype": "bfloat16", "micro_rows": 8}),
        (2, {"recompute": True, "micro_rows": 4}),
        (2, {"parallel": parallel(zero_stage=2), "micro_rows": 2}),
    ],
    ids=["bfloat16", "2-ranks-recompute", "2-ranks-zero2"],
)
def test_frozen_gates_keep_every_bit_and_all_else_learns(size: int, options: dict[str, Any]) -> None:
    """With weight decay, which would shrink a matrix without a gradient, and a bias that moves."""
    learning, told = spec(tiny_model(), **options), spec(tiny_model(), freeze_router=True, **options)
    assert told.adamw.weight_decay > 0
    ((free, free_history), *_), ((frozen, history), *_) = run_cases(changes, size, [(learning,), (told,)])
    gates = {name for name in frozen if ".gate." in name}
    assert len(gates) == 3 * told.model.num_moe_layers, "masters and two moments of every MoE layer"
    for name, change in frozen.items():
        assert change.any() == (name not in gates) and free[name].any(), name
    assert history[0]["train/loss"] == free_history[0]["train/loss"]
    assert history[0]["train/grad_norm"] < free_history[0]["train/grad_norm"], "the norm is of what learns"
    assert history[-1]["moe/bias_range"] > 0


STEPS, LR = 8, 3e-2  # experts move and are copied meanwhile, and losses fall to a tenth
ROUTERS: list[dict[str, Any]] = [
    {"kind": "noisy_top_k"},
    {"kind": "cosine", "size": 6, "temperature": 0.3},
    {"kind": "expert_choice", "most_experts": 5},
    {"kind": "group_limited", "groups": 4, "top_groups": 2},
    {"kind": "top_k"},
]


def losses_of_one_batch(world: World, told: TrainerSpec, steps: int = STEPS) -> tuple[list[float], dict[str, Tensor]]:
    trainer = Trainer(told, world)
    share = random_batch(0).num_rows // world.size
    batch = random_batch(0).rows(world.rank * share, (world.rank + 1) * share)
    losses = [float(trainer.learn(batch, cross_entropy, LR)["train/loss"]) for _ in range(steps)]  # type: ignore[arg-type]
    return losses, own_state(trainer)


@pytest.mark.parametrize("router", ROUTERS, ids=[router["kind"] for router in ROUTERS])
def test_each_router_trains_to_a_lower_loss(router: dict[str, Any]) -> None:
    model = tiny_model(router=router, selection_bias=router["kind"] != "expert_choice")
    losses, state = run_ranks(losses_of_one_batch, 2, spec(model, micro_rows=4))[0]
    assert losses[-1] < 0.3 * losses[0]
    gate = [tensor for name, tensor in state.items() if ".gate." in name]
    assert all(bool(tensor.any()) for tensor in gate)


def test_experts_that_take_tokens_give_the_same_bits_in_chunks() -> None:
    """Where a token may have no expert at all."""
    model = tiny_model(router=ROUTERS[2], selection_bias=False)
    layouts = [parallel(transport="messages", schedule=schedule) for schedule in ("off", 3)]
    told = [(spec(model, micro_rows=2, parallel=layout),) for layout in layouts]
    ((whole, wanted), _), ((cut, found), _) = run_cases(losses_of_one_batch, 2, told)
    assert cut == whole and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("message_dtype", ["bfloat16", "float8"])
def test_rounded_messages_train_too_and_give_the_same_bits_in_chunks(message_dtype: str) -> None:
    """Losses stay near those of messages that nothing rounds; the first, of one forward pass, within what is rounded."""
    changes = ({}, {"message_dtype": message_dtype}, {"message_dtype": message_dtype, "schedule": 3})
    told = [spec(tiny_model(), micro_rows=4, parallel=parallel(transport="messages", **one)) for one in changes]
    by_rank = run_cases(losses_of_one_batch, 2, [(told[0], 1), (told[1],), (told[2],)])
    (exact, _), (whole, wanted), (cut, found) = (first for first, _ in by_rank)
    assert whole == cut and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    rounded = 2.0**-8 if message_dtype == "bfloat16" else 2.0**-4
    assert exact[0] != whole[0] and abs(exact[0] - whole[0]) < rounded * exact[0]
    assert whole[-1] < 0.3 * whole[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_where_passes_must_equal_generation_no_noise_is_drawn_or_learned(stage: int) -> None:
    options: dict[str, Any] = {"micro_rows": 2, "batch_invariant": True, "parallel": parallel(zero_stage=stage)}
    told = [(spec(tiny_model(router=router), **options), 4) for router in (ROUTERS[0], {"kind": "top_k"})]
    ((noisy, state), _), ((plain, _), _) = run_cases(losses_of_one_batch, 2, told)
    assert noisy == plain
    noise = [tensor for name, tensor in state.items() if name.endswith("gate.noise")]
    assert noise and not any(bool(tensor.any()) for tensor in noise)


def weights_of_an_update(world: World, told: TrainerSpec) -> tuple[dict[str, Tensor], Tensor]:
    worker = TrainWorker(world.rank)
    worker.world = world
    worker.build(told)
    batch = random_batch(0)
    worker.learn(batch, cross_entropy, 1e-2)
    update = worker.weights(1, SyncConfig(transport="store", anchor_every=1, check=False))
    weights = {} if update is None else unpack(update.weights)  # type: ignore[arg-type]
    return weights, worker.trainer.bias_LE.clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_that_moves_reaches_the_engines_and_changes_what_they_select(dtype: str) -> None:
    told = spec(tiny_model(), micro_rows=4, dtype=dtype)
    (state, bias_LE), (nothing, same_LE) = run_ranks(weights_of_an_update, 2, told)
    assert not nothing and torch.equal(bias_LE, same_LE) and bias_LE.any()
    answers = EngineSettings(8, 32, 16, None, Sampling(1.0, seed=5), eos_id=1)
    logprobs = []
    for bias in (state["bias"], torch.zeros_like(state["bias"])):
        engine = Engine(told.model, answers, torch.device("cpu"), getattr(torch, dtype))
        engine.load_weights({**state, "bias": bias}, 1)
        engine.submit(fresh_group(0, (3, 4, 5), 8).samples)
        done = engine.advance(16)
        logprobs.append({sample.uid: sample.logprobs for sample in done})
    assert state["bias"].dtype == torch.float32 and torch.equal(state["bias"], bias_LE)
    assert logprobs[0] != logprobs[1]
