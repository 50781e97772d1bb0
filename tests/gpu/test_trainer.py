"""The same updates on GPUs: NCCL ranks equal the plain loop on a CPU in float32, and bfloat16 stays near it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.topology import World
from tests.distributed.ranks import run_ranks
from tests.distributed.test_trainer import (
    CHOICE,
    COSINE,
    NOISY,
    STEPS,
    learn,
    load_and_go_on,
    own_state,
    plain_loop,
    require_equal,
    save_and_go_on,
    train,
    whole,
)
from tests.distributed.test_value_head import go_on, told, train_and_save
from tests.gpu.needs import gpus, hopper
from tests.models import parallel, spec, tiny_model
from trainer.config.model import ModelConfig
from trainer.state import TrainerSpec
from trainer.step import Trainer

SMALLEST = tiny_model(hidden_size=64, expert_hidden_size=32)  # that the kernels take in bfloat16
pytestmark = [pytest.mark.gpu, gpus(1)]
sizes = pytest.mark.parametrize("size", [1, pytest.param(2, marks=gpus(2))])


@sizes
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_float32_updates_on_gpus_equal_the_plain_loop_on_a_cpu(size: int, offload: str) -> None:
    told = spec(tiny_model(), micro_rows=2, parallel=parallel(offload=offload))
    expected_history, expected = plain_loop(told.model)
    results = run_ranks(train, size, told, kind="cuda")
    for step, wanted in enumerate(expected_history):
        assert results[0][0][step]["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)
        assert results[0][0][step]["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-4)
    found = whole([state for _, state in results])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].cpu(), tensor, rtol=1e-3, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize("model", [NOISY, COSINE, CHOICE], ids=["noisy_top_k", "cosine", "expert_choice"])
def test_each_router_on_a_gpu_gives_the_updates_of_a_cpu(model: ModelConfig) -> None:
    told = spec(model, micro_rows=8, recompute=True)
    expected, _ = plain_loop(told.model)
    for found, wanted in zip(run_ranks(train, 1, told, kind="cuda")[0][0], expected, strict=True):
        assert found["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)
        assert found["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-4)


def learn_slowly(world: World, told: TrainerSpec) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """So slowly that a choice of experts which rounding turns changes that token, and no later update."""
    trainer = Trainer(told, world)
    history = learn(trainer, world, 0, STEPS, lr=1e-4)
    return history, own_state(trainer, with_moments=True)


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of the mean gradients, relative to their norm."""
    names = [name for name in exact if name.endswith("exp_avg")]
    squared = sum(float((found[name].cpu() - exact[name]).double().square().sum()) for name in names)
    return float((squared / sum(float(exact[name].double().square().sum()) for name in names)) ** 0.5)


@hopper()
@sizes
@pytest.mark.parametrize("changes", [{}, *({"router": m.router} for m in (NOISY, COSINE))], ids=["top_k", "noisy", "cosine"])
def test_bfloat16_updates_on_gpus_are_as_exact_as_those_of_a_cpu(size: int, changes: dict[str, Any]) -> None:
    smallest = SMALLEST.model_copy(update=changes)
    rounded = spec(smallest, micro_rows=4, dtype="bfloat16")
    ((exact_history, exact),) = run_ranks(learn_slowly, 1, spec(smallest, micro_rows=4))
    on_cpus, on_gpus = (run_ranks(learn_slowly, size, rounded, kind=kind) for kind in ("cpu", "cuda"))
    expected, found = (distance(whole([state for _, state in results]), exact) for results in (on_cpus, on_gpus))
    assert found < 1.5 * expected, f"{found} on GPUs, {expected} on CPUs"
    for step, wanted in enumerate(exact_history):
        assert on_gpus[0][0][step]["train/loss"] == pytest.approx(wanted["train/loss"], rel=2e-2)
        assert on_gpus[0][0][step]["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=6e-2)


def first_update_and_more(world: World, told: TrainerSpec) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    trainer = Trainer(told, world)
    history = learn(trainer, world, 0, 1)
    state = own_state(trainer, with_moments=True)
    return history + learn(trainer, world, 1, STEPS), state


@hopper()
@pytest.mark.parametrize(
    ("size", "sent"), [(1, "auto"), pytest.param(2, "auto", marks=gpus(2)), pytest.param(2, "messages", marks=gpus(2))]
)
def test_bfloat16_updates_with_offload_are_those_without(size: int, sent: str) -> None:
    def run(offload: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        changes = parallel(offload=offload, reshard_every=1, transport=sent)
        results = run_ranks(
            first_update_and_more, size, spec(SMALLEST, micro_rows=2, dtype="bfloat16", parallel=changes), kind="cuda"
        )
        return results[0][0], whole([state for _, state in results])

    (expected_history, expected), (history, found) = run("none"), run("cpu")
    # Later updates start from weights of which a few have been rounded differently, so the first is what is compared. Messages
    # take gradients of own experts in bfloat16 in any case; else products add them in float32, and offload rounds each.
    if sent == "messages":
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}")
    assert distance(found, {name: wanted.cpu() for name, wanted in expected.items()}) < 2**-8
    for step, wanted in enumerate(expected_history):
        assert history[step]["train/loss"] == pytest.approx(wanted["train/loss"], rel=5e-3)
        first = 1e-5 if sent == "messages" else 2**-8
        assert history[step]["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=2e-2 if step else first)


@hopper()
@sizes
@pytest.mark.parametrize(("offload", "loading"), [("none", "none"), ("none", "cpu"), ("cpu", "none"), ("cpu", "cpu")])
def test_a_checkpoint_of_gpus_loads_bit_for_bit_on_gpus_and_on_cpus(
    size: int, offload: str, loading: str, tmp_path: Path
) -> None:
    told = [spec(SMALLEST, micro_rows=2, dtype="bfloat16", parallel=parallel(offload=kind)) for kind in (offload, loading)]
    written = whole([state for state, _ in run_ranks(save_and_go_on, size, told[0], str(tmp_path), kind="cuda")])
    for kind, ranks in (("cuda", size), ("cpu", 2)):
        loaded = whole([state for state, _ in run_ranks(load_and_go_on, ranks, told[1], str(tmp_path), kind=kind)])
        require_equal(loaded, written, same_ranks=ranks == size)


@sizes
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=hopper())])
def test_a_value_head_and_a_reference_go_on_bit_for_bit(size: int, dtype: str, tmp_path: Path) -> None:
    spec = told(model={"hidden_size": 64, "expert_hidden_size": 32}, dtype=dtype, batch_invariant=True)
    written = run_ranks(train_and_save, size, spec, str(tmp_path), kind="cuda")
    loaded = run_ranks(go_on, size, spec, str(tmp_path), kind="cuda")
    for (history, state, (before, after)), (resumed, again) in zip(written, loaded, strict=True):
        assert torch.equal(before["reference_logprobs"], after["reference_logprobs"])
        if size == 1:
            assert torch.equal(before["logprobs"], before["reference_logprobs"]), "masters round as the trainer rounds them"
        assert all(torch.equal(state[name], again[name]) for name in state)
        for key in ("train/loss", "value/loss", "policy/kl_reference"):
            assert resumed[0][key] == pytest.approx(history[3][key], rel=1e-3), key
