"""The distributed update equals a plain loop on one device: every gradient reaches its owner once and at the right scale.

The reference knows nothing of ranks: it computes the weighted mean loss of the whole batch with autograd, clips by the norm of
all parameters together, and takes AdamW steps. A factor of the world size in expert gradients, a norm that misses experts, or a
count that is not all-reduced, each shows here. (The most frequent fault of MoE trainers, see pytorch#160285, Megatron #5916.)
"""

from __future__ import annotations

import resource
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.errors import UserError
from kernels.linear import one_matrix
from kernels.vocab_loss import token_logprobs
from parallel.adamw import adamw, set_lr
from parallel.balance import updated_bias
from parallel.hooks import NONE
from parallel.placement import TransportKind
from parallel.schedule.pipeline import OFF, WHOLE, Degrees
from parallel.topology import World
from tests import checkpoints
from tests.checkpoints import file_size_limit
from tests.distributed.ranks import run_cases, run_ranks
from tests.models import parallel, random_batch, spec, tiny_model
from trainer import checkpoint
from trainer.batch import cross_entropy
from trainer.checkpoint_writer import Writer
from trainer.config.model import ModelConfig
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.gate import router_noise
from trainer.model.transformer import ExpertWeights, LanguageModel
from trainer.state import MACHINE, OWNERS, TrainerSpec, fixed_degrees, hooks_of
from trainer.step import Trainer
from trainer.worker import named_tensors

pytestmark = pytest.mark.cpu_adam

STEPS = 3
LR = 1e-2
DISK = Path(tempfile.gettempdir())
NOISY = tiny_model(router={"kind": "noisy_top_k"})
COSINE = tiny_model(router={"kind": "cosine", "size": 6, "temperature": 0.3})
CHOICE = tiny_model(router={"kind": "expert_choice", "most_experts": 6}, selection_bias=False)


@cache
def plain_loop(config: ModelConfig) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The same updates in one process without DeepSpeed, exchange or micro-batches."""
    told = spec(config)
    model = LanguageModel.initialize(config, told.seed)
    pairs = [[p[layer].clone().requires_grad_() for layer in range(config.num_moe_layers)] for p in expert_parts(model)]
    parameters = [*model.dense.parameters(), *pairs[0], *pairs[1]]
    optimizer = adamw(parameters, told.adamw)
    set_lr(optimizer, LR)
    history = []
    for step in range(STEPS):
        batch = random_batch(step)
        model.experts = ExpertWeights(torch.stack(pairs[0]), torch.stack(pairs[1]))
        noisy = config.router.kind == "noisy_top_k"
        output = model.dense(
            batch.tokens_BS,
            positions_of(batch.documents_BS),
            batch.documents_BS >= 0,
            PackedAttention(batch.documents_BS, batch.documents_BS.device),
            model.experts.layers(),
            model.bias_LE,
            noise=router_noise(told.seed, step, range(8), 12, model.bias_LE.device) if noisy else None,
        )
        logprobs, _ = token_logprobs(output.hidden_BSD.flatten(0, 1), model.dense.head_VD, batch.targets_BS.flatten())
        loss = -(logprobs * batch.weights_BS.flatten()).sum() / batch.weights_BS.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, told.adamw.clip_norm)
        optimizer.step()
        model.bias_LE = updated_bias(model.bias_LE, output.counts_LE, told.balance.rule, told.balance.rate)
        history.append({"train/loss": loss.item(), "train/grad_norm": norm.item()})
    model.experts = ExpertWeights(torch.stack(pairs[0]).detach(), torch.stack(pairs[1]).detach())
    return history, {name: t.detach().clone() for name, t in named_tensors(model)}


def expert_parts(model: LanguageModel) -> tuple[Tensor, Tensor]:
    return model.experts.gate_up_LECD, model.experts.down_LEDF


def learn(trainer: Trainer, world: World, first: int, last: int, lr: float = LR) -> list[dict[str, Any]]:
    history = []
    for step in range(first, last):
        batch = random_batch(step)
        share = batch.num_rows // world.size
        history.append(trainer.learn(batch.rows(world.rank * share, (world.rank + 1) * share), cross_entropy, lr))
    return history


def own_state(trainer: Trainer, with_moments: bool = False) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in checkpoints.named_state(trainer, with_moments)}


def train(world: World, spec: TrainerSpec) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    trainer = Trainer(spec, world)
    history = learn(trainer, world, 0, STEPS)
    assert trainer.experts.arena.attention is None, (
        "what is timed is known by now, or nobody asks; on a GPU events would pile up"
    )
    first = trainer.model.blocks[0].attention
    assert one_matrix([first.query.weight, first.key.weight, first.value.weight]) is not None, "which the library needs"
    return history, own_state(trainer)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {"micro_rows": 8}),
        (2, {"micro_rows": 2}),
        (4, {"micro_rows": 1, "recompute": True}),
        (2, {"micro_rows": 4, "parallel": parallel(zero_stage=2, overlap=0, memory=0, reshard_every=0)}),
        (2, {"micro_rows": 2, "recompute": True, "parallel": parallel(rematerialise=True, overlap=4, memory=4)}),
        (4, {"micro_rows": 1, "parallel": parallel(overlap=5, memory=1, reshard_every=1)}),
        (2, {"micro_rows": 4, "parallel": parallel(policy="cost", overlap="auto", memory="auto", calibrate=True)}),
        (4, {"micro_rows": 1, "parallel": parallel(policy="llep", overlap="auto", memory=3)}),
        (1, {"micro_rows": 8, "model": CHOICE, "recompute": True}),
        (1, {"micro_rows": 4, "model": NOISY}),
        (2, {"micro_rows": 2, "model": NOISY, "recompute": True}),
        (2, {"micro_rows": 4, "model": COSINE, "parallel": parallel(zero_stage=2)}),
        (2, {"micro_rows": 2, "recompute": True, "parallel": parallel(transport="messages", schedule=3, rematerialise=True)}),
        (4, {"micro_rows": 1, "parallel": parallel(policy="llep", transport="messages", schedule=16, memory=3, zero_stage=2)}),
        (2, {"micro_rows": 2, "parallel": parallel(transport="messages", schedule="auto")}),
        (1, {"micro_rows": 2, "parallel": parallel(offload="cpu")}),
        (2, {"micro_rows": 2, "parallel": parallel(offload="cpu", overlap=5, memory=1, reshard_every=1)}),
        pytest.param(
            *(4, {"micro_rows": 1, "parallel": parallel(offload="nvme", nvme_dir=DISK, overlap=5, memory=1, reshard_every=1)}),
            marks=pytest.mark.aio,
        ),
    ],
    ids=[
        *["1-rank", "2-ranks-accumulating", "4-ranks-recompute", "2-ranks-zero2-ep", "2-ranks-rematerialise"],
        *[
            "4-ranks-reshard",
            "2-ranks-measured",
            "4-ranks-llep",
            "1-rank-expert-choice",
            "1-rank-noisy",
            "2-ranks-noisy-recompute",
        ],
        *["2-ranks-cosine-zero2", "2-ranks-3-chunks", "4-ranks-16-chunks", "2-ranks-planned"],
        *["1-rank-offload", "2-ranks-offload-reshard"],
        "4-ranks-nvme-reshard",
    ],
)
def test_updates_equal_a_plain_loop_for_any_number_of_ranks(size: int, changes: dict[str, Any]) -> None:
    told = spec(**{"model": tiny_model(), **changes})
    expected_history, expected = plain_loop(told.model)
    results = run_ranks(train, size, told)
    for history, _ in results:
        for step, wanted in enumerate(expected_history):
            assert history[step]["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-6)
            assert history[step]["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-5)
    assert expected_history[0]["train/grad_norm"] > told.adamw.clip_norm  # clipping is active, so the norm matters
    for name, wanted in expected.items():
        states = [state[name] for _, state in results if name in state]
        found = states[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert len(states) == (1 if name.startswith("experts.") else size), f"{name} is on {len(states)} ranks"
        assert all(torch.equal(found, state) for state in states), f"{name} differs between ranks"


def save_and_go_on(world: World, told: TrainerSpec, folder: str) -> tuple[dict[str, Tensor], list[float]]:
    trainer = Trainer(told, world)
    learn(trainer, world, 0, 2)
    meta = checkpoint.CheckpointMeta("pretrain", 2, trainer.updates, told.model.model_dump(mode="json"), "unknown", {})
    checkpoints.save(trainer, Path(folder) / "step_000002", meta, {"note.txt": "two"})
    state = own_state(trainer, with_moments=True)
    losses = [m["train/loss"] for m in learn(trainer, world, 2, 4)]
    check_reset(trainer)
    return state, losses


def check_reset(trainer: Trainer) -> None:
    before = own_state(trainer, with_moments=True)
    trainer.reset_optimizer()
    for name, tensor in own_state(trainer, with_moments=True).items():
        wanted = torch.zeros_like(tensor) if ".exp_avg" in name else before[name]
        assert torch.equal(tensor, wanted), f"{name} after reset_optimizer"
    assert trainer.updates == 0


def load_and_go_on(world: World, told: TrainerSpec, folder: str) -> tuple[dict[str, Tensor], list[float]]:
    trainer = Trainer(told, world)
    path = Path(folder) / "step_000002"
    trainer.load(path, with_moments=True)
    state = own_state(trainer, with_moments=True)
    return state, [m["train/loss"] for m in learn(trainer, world, 2, 4)]


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor], same_ranks: bool) -> None:
    """Bit for bit, wherever the tensors are; another number of ranks has owners and a machine of its own."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name not in (OWNERS, MACHINE) or same_ranks:
            assert torch.equal(found[name].cpu(), tensor.cpu()), name


def whole(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for state in states for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("dtype", "model"), [("float32", COSINE), ("bfloat16", NOISY)], ids=["float32-cosine", "bfloat16-noisy"]
)
def test_a_checkpoint_of_two_ranks_loads_bit_for_bit_on_one_two_and_four(
    tmp_path: Path, dtype: str, model: ModelConfig
) -> None:
    told = spec(model, micro_rows=4, dtype=dtype)
    written = run_ranks(save_and_go_on, 2, told, str(tmp_path))
    expected = whole([state for state, _ in written])
    for size in (1, 2, 4) if dtype == "float32" else (2,):
        loaded = run_ranks(load_and_go_on, size, told, str(tmp_path))
        require_equal(whole([state for state, _ in loaded]), expected, same_ranks=size == 2)
        if size == 2:
            assert loaded[0][1] == written[0][1], (
                "the losses after a resume are not those of the uninterrupted run, bit for bit"
            )
        else:
            assert loaded[0][1] == pytest.approx(written[0][1], rel=1e-5)
    damaged = next((tmp_path / "step_000002" / "state").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=rf"damaged: state/{damaged.name} has .* expected"):
        checkpoint.verify(tmp_path / "step_000002")
    with pytest.raises(UserError, match=r"model.top_k: checkpoint 2, configuration 3"):
        damaged.write_bytes(bytes(content[:-5]) + bytes([content[-5] ^ 1]) + bytes(content[-4:]))
        checkpoint.read_meta(tmp_path / "step_000002", model.model_copy(update={"top_k": 3}))


@pytest.mark.parametrize("size", [1, 2])
def test_checkpoints_with_and_without_offload_load_each_other_bit_for_bit(tmp_path: Path, size: int) -> None:
    told = {offload: spec(tiny_model(), micro_rows=4, parallel=parallel(offload=offload)) for offload in ("none", "cpu")}
    written = written_by(told, size, tmp_path)
    pairs = [("none", "cpu"), ("cpu", "none"), ("cpu", "cpu")]
    for (offload, loading), loaded in zip(pairs, loaded_by(told, size, pairs, tmp_path), strict=True):
        require_equal(whole([s for s, _ in loaded]), whole([s for s, _ in written[offload]]), same_ranks=True)
        if loading == offload:
            assert loaded[0][1] == written[offload][0][1], "with offload a run does not go on bit for bit"
        assert loaded[0][1] == pytest.approx(written[offload][0][1], rel=1e-5)
    assert written["cpu"][0][1] == pytest.approx(written["none"][0][1], rel=1e-5)


Found = list[tuple[dict[str, Tensor], list[float]]]  # by rank: what save_and_go_on and load_and_go_on return


def written_by(told: dict[str, TrainerSpec], size: int, folder: Path) -> dict[str, Found]:
    for offload in told:
        (folder / offload).mkdir()
    cases = [(one, str(folder / offload)) for offload, one in told.items()]
    return dict(zip(told, run_cases(save_and_go_on, size, cases), strict=True))


def loaded_by(told: dict[str, TrainerSpec], size: int, pairs: list[tuple[str, str]], folder: Path) -> list[Found]:
    """Of (who has written, who loads), by other processes than those that have written."""
    return run_cases(load_and_go_on, size, [(told[loading], str(folder / offload)) for offload, loading in pairs])


@pytest.mark.aio
def test_on_disk_a_run_has_the_bits_of_memory_and_checkpoints_go_both_ways(tmp_path: Path) -> None:
    told = {
        offload: spec(tiny_model(), micro_rows=4, parallel=parallel(offload=offload, nvme_dir=DISK, reshard_every=1))
        for offload in ("cpu", "nvme")
    }
    written = written_by(told, 2, tmp_path)
    states = {offload: whole([state for state, _ in found]) for offload, found in written.items()}
    losses = {offload: found[0][1] for offload, found in written.items()}
    assert torch.equal(states["nvme"][OWNERS], states["cpu"][OWNERS])
    require_equal(states["nvme"], states["cpu"], same_ranks=False)  # each has measured the machine for itself
    assert losses["nvme"] == losses["cpu"]
    pairs = [("cpu", "nvme"), ("nvme", "cpu")]
    for (offload, _), loaded in zip(pairs, loaded_by(told, 2, pairs, tmp_path), strict=True):
        require_equal(whole([state for state, _ in loaded]), states[offload], same_ranks=True)
        assert loaded[0][1] == losses["cpu"], "a run does not go on bit for bit"


def go_on_after_a_full_disk(world: World, told: TrainerSpec, folder: str) -> list[str | None]:
    trainer, writer, found = Trainer(told, world), Writer(world), []
    learn(trainer, world, 0, 1)
    for size in (20_000, resource.RLIM_INFINITY):
        meta = checkpoint.CheckpointMeta("pretrain", 1, 1, told.model.model_dump(mode="json"), "unknown", {})
        held, passing = trainer.state_to_save(with_moments=True), trainer.state_on_disk(with_moments=True)
        with file_size_limit(size):
            writer.start(Path(folder) / "step_000001", held, meta, {}, 1, passing)
        found.append(writer.settle())
        learn(trainer, world, 1, 2)
    return found


@pytest.mark.aio
def test_on_disk_a_run_goes_on_where_a_checkpoint_had_no_room(tmp_path: Path) -> None:
    told = spec(tiny_model(), micro_rows=2, parallel=parallel(offload="nvme", nvme_dir=DISK))
    for full, free in run_ranks(go_on_after_a_full_disk, 2, told, str(tmp_path)):
        assert full is not None and "no space to write" in full and free is None
    checkpoint.verify(tmp_path / "step_000001")


def test_chunks_are_refused_where_nothing_travels_as_messages() -> None:
    kinds: tuple[TransportKind, ...] = ("messages", "two_level", "peer_memory")
    for kind in kinds:
        assert fixed_degrees(parallel(schedule="off"), kind) == OFF
        assert fixed_degrees(parallel(schedule="auto"), kind) is None
        assert fixed_degrees(parallel(schedule=1), kind) == WHOLE
        if kind != "peer_memory":
            assert fixed_degrees(parallel(schedule=4), kind) == Degrees(4, 4)
    with pytest.raises(UserError, match=r"parallel\.schedule=4 .*each other's memory.* set parallel\.transport=messages"):
        fixed_degrees(parallel(schedule=4), "peer_memory")
    assert hooks_of(parallel(), "peer_memory", torch.float32) == NONE
    with pytest.raises(UserError, match=r"message_dtype=float8 .*each other's memory.* set parallel\.transport=messages"):
        hooks_of(parallel(message_dtype="float8"), "peer_memory", torch.float32)
