"""The plan before a run adds up, and its memory follows what the trainer really keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.errors import UserError
from launch.cli import load
from parallel.moe_layer import LocalExperts
from trainer.config.model import CosineRouter, ModelConfig
from trainer.config.rl import RLConfig
from trainer.config.run import PretrainConfig
from trainer.estimate import Memory, budget_lines, flops_per_token, in_gib, memory_per_rank, millions, scaled
from trainer.model.attention import PackedAttention, positions_of
from trainer.model.transformer import LanguageModel, parameter_counts

CONFIG = load(PretrainConfig, "pretrain", ["train.steps=160", "train.batch_rows=16", "train.sequence_length=256"])
MODEL = CONFIG.model.model_copy(update={"vocab_size": 2048})


def kept_for_backward(model: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: str = "cpu") -> int:
    """Bytes of the distinct tensors, parameters aside, that autograd saves in a forward pass."""
    whole = LanguageModel.initialize(model, seed=0)
    dense = whole.dense.to(device, dtype)
    gate_up_LECD, down_LEDF = (part.to(device, dtype) for part in (whole.experts.gate_up_LECD, whole.experts.down_LEDF))
    pairs = list(zip(gate_up_LECD, down_LEDF, strict=True))
    for weight in (w for pair in pairs for w in pair):
        weight.requires_grad_()
    parameters = {p.untyped_storage().data_ptr() for p in [*dense.parameters(), *(w for pair in pairs for w in pair)]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    documents_BS = torch.zeros(rows, length, dtype=torch.int32, device=device)
    tokens_BS = torch.randint(model.vocab_size or 0, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    bias_LE = torch.zeros(model.num_moe_layers, model.num_experts, device=device)
    experts = [LocalExperts(*pair) for pair in pairs]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dense(
            tokens_BS,
            positions_of(documents_BS),
            documents_BS >= 0,
            PackedAttention(documents_BS, documents_BS.device),
            experts,
            bias_LE,
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": False, "num_shared_experts": 0, "top_k": 4},
        {"num_dense_layers": 4, "dense_hidden_size": 1024},
        {"router": CosineRouter(kind="cosine", size=256, temperature=0.07), "num_experts": 64},
    ],
)
def test_activations_are_what_autograd_keeps_within_a_fifth(dtype: str, changes: dict[str, object]) -> None:
    model = MODEL.model_copy(update=changes)
    measured = kept_for_backward(model, rows=4, length=256, dtype=getattr(torch, dtype))
    estimated = memory_per_rank(model, 1, 4, 256, dtype, parallel=CONFIG.parallel, recompute=False, on_gpu=False).activations
    assert estimated == pytest.approx(measured, rel=0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_keep_less_than_their_references() -> None:
    measured = kept_for_backward(MODEL, rows=4, length=256, dtype=torch.bfloat16, device="cuda")
    on_gpu, on_cpu = (
        memory_per_rank(MODEL, 1, 4, 256, "bfloat16", parallel=CONFIG.parallel, recompute=False, on_gpu=on_gpu).activations
        for on_gpu in (True, False)
    )
    assert on_gpu == pytest.approx(measured, rel=0.2) and on_gpu < 0.8 * on_cpu


def test_blocks_for_the_exchange_are_there_unless_ranks_send_messages() -> None:
    def exchange(ranks: int, transport: str) -> int:
        parallel = CONFIG.parallel.model_copy(update={"transport": transport})
        return memory_per_rank(MODEL, ranks, 8, 256, "bfloat16", parallel, recompute=False, on_gpu=False).exchange

    assert exchange(1, "auto") == exchange(2, "messages") == 0
    assert exchange(2, "auto") == 2 * 2 * 8 * 256 * MODEL.hidden_size * 2


@pytest.mark.parametrize(
    ("options", "on_gpu", "expected"),
    [
        ([], False, ["through the object store\n"]),
        ([], True, ["engines 1, on the ranks' GPUs", "to the engines directly"]),
        (["rollout.placement=separate"], True, ["engines 1, each on a GPU of its own", "to the engines directly"]),
        (
            ["rollout.placement=separate", "rollout.engines=3", "rollout.min_engines=2"],
            True,
            ["engines 2 to 3, each on a GPU of its own", "to the engines directly"],
        ),
        (["sync.transport=store"], True, ["through the object store\n"]),
        (["sync=delta"], True, ["through the object store every 32 rounds", "host    {both} of rank 0's memory at a sync"]),
    ],
)
def test_the_plan_of_rl_says_where_engines_are_and_how_weights_reach_them(
    options: list[str], on_gpu: bool, expected: list[str]
) -> None:
    size = 2 * parameter_counts(MODEL).total
    config = load(RLConfig, "rl", ["checkpoint=x", *options])
    text = "\n".join(budget_lines(config, MODEL, 2, "bfloat16", "asked", on_gpu))
    assert f"sync    {in_gib(size)} " in text and ("rank 0's memory" in text) == ("sync=delta" in options)
    assert all(line.format(both=in_gib(2 * size)) in text for line in expected), text


def test_state_of_one_float32_rank_is_exact() -> None:
    counts = parameter_counts(MODEL)
    memory = memory_per_rank(MODEL, 1, 1, 256, "float32", parallel=CONFIG.parallel, recompute=False, on_gpu=False)
    assert memory.parameters == memory.gradients == 4 * counts.total
    assert memory.optimizer_state == 12 * counts.total and memory.copies == 0
    assert memory.backward_weights == 4 * (counts.total - counts.dense), "the reference keeps experts' weights for backward"
    kept = memory.backward_weights + memory.activations + memory.logits
    assert memory.total == memory.parameters * 2 + memory.optimizer_state + kept
    fused = memory_per_rank(MODEL, 2, 1, 256, "bfloat16", parallel=CONFIG.parallel, recompute=False, on_gpu=True)
    assert fused.backward_weights == 0


def test_more_ranks_zero_2_and_recomputation_save_what_they_should() -> None:
    def plan(ranks: int = 2, stage: int = 1, recompute: bool = False) -> tuple[int, int, int, int]:
        parallel = CONFIG.parallel.model_copy(update={"zero_stage": stage})
        memory = memory_per_rank(MODEL, ranks, 8, 256, "bfloat16", parallel, recompute, on_gpu=False)
        return memory.parameters, memory.gradients, memory.optimizer_state, memory.activations

    assert plan(ranks=4)[0] < plan()[0] and plan(ranks=4)[2] == plan()[2] // 2
    assert plan(stage=2)[1] < plan()[1] and plan(stage=2)[2] == plan()[2]
    assert plan(recompute=True)[3] < 0.5 * plan()[3] and plan(recompute=True)[:3] == plan()[:3]


def test_copies_take_room_for_every_layer_or_for_one() -> None:
    def copies(**changes: object) -> int:
        parallel = CONFIG.parallel.model_copy(update={"memory": 2, **changes})
        return memory_per_rank(MODEL, 2, 8, 256, "bfloat16", parallel, recompute=False, on_gpu=False).copies

    one = 2 * 3 * MODEL.hidden_size * MODEL.expert_hidden_size
    assert copies() == 2 * MODEL.num_moe_layers * one and copies(rematerialise=True) == 2 * one and copies(memory=0) == 0


def test_offloading_moves_the_state_of_experts_from_a_gpu_to_its_host() -> None:
    counts = parameter_counts(MODEL)
    experts = (counts.total - counts.dense) // 2

    def plan(offload: str, on_gpu: bool) -> Memory:
        parallel = CONFIG.parallel.model_copy(update={"offload": offload})
        return memory_per_rank(MODEL, 2, 8, 256, "bfloat16", parallel, recompute=False, on_gpu=on_gpu)

    without, offloaded = plan("none", on_gpu=True), plan("cpu", on_gpu=True)
    assert without.host == 0 and offloaded.host == 16 * experts
    assert offloaded.optimizer_state == without.optimizer_state - 12 * experts == 12 * counts.dense // 2
    assert offloaded.gradients == without.gradients - 4 * experts + 2 * experts  # those on their way to the host
    assert plan("cpu", on_gpu=False) == plan("none", on_gpu=False), "on a CPU there is one memory"
    on_disk, three = plan("nvme", on_gpu=True), 3 * 12 * counts.per_expert
    assert on_disk.disk == 12 * experts and on_disk.host == 4 * experts + three
    assert on_disk.optimizer_state == offloaded.optimizer_state and on_disk.gradients == offloaded.gradients
    beside = plan("nvme", on_gpu=False)
    assert (beside.disk, beside.host) == (12 * experts, 0)
    assert beside.optimizer_state == without.optimizer_state - 12 * experts + three


def test_a_reference_takes_the_room_of_a_second_set_of_weights_whose_experts_are_sharded() -> None:
    counts = parameter_counts(MODEL)
    plans = [
        memory_per_rank(MODEL, ranks, 8, 256, "bfloat16", CONFIG.parallel, recompute=False, on_gpu=True, reference=kept)
        for ranks in (1, 2)
        for kept in (False, True)
    ]
    assert [plan.reference for plan in plans] == [0, 2 * counts.total, 0, 2 * counts.dense + counts.total - counts.dense]
    assert plans[3].total == plans[2].total + plans[3].reference
    options = ["checkpoint=a", "algorithm.kl_coefficient=0.1", "algorithm.updates_per_round=2"]
    text = "\n".join(budget_lines(load(RLConfig, "rl", options), MODEL, 1, "bfloat16", "asked", on_gpu=False))
    assert ", reference " in text and "2 updates a round" in text


def test_flops_count_products_once_whether_embeddings_are_tied_or_not() -> None:
    untied = MODEL.model_copy(update={"tie_embeddings": False})
    assert flops_per_token(MODEL, 256) == flops_per_token(untied, 256)
    attention = 6 * MODEL.num_layers * MODEL.num_heads * MODEL.head_dim * 256
    assert flops_per_token(MODEL, 256) == 6 * parameter_counts(MODEL).active + attention


def test_the_plan_of_a_pretraining_spells_out_its_arithmetic() -> None:
    text = "\n".join(budget_lines(CONFIG, MODEL, 2, "float32", "no GPU", on_gpu=False))
    for part in (
        "16 rows x 256 tokens = 4,096",
        "160 steps x 4,096 tokens = 655,360",
        "2 x 4 experts a layer",
        "float32: no GPU",
    ):
        assert part in text
    assert millions(parameter_counts(MODEL).total) in text
    assert all(len(line) <= 128 for line in text.splitlines())


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_the_plan_names_the_memory_of_the_host_and_the_disk(offload: str) -> None:
    changes = {"offload": offload, "nvme_dir": Path("/local")}
    config = CONFIG.model_copy(update={"parallel": CONFIG.parallel.model_copy(update=changes)})
    train = config.train
    memory = memory_per_rank(MODEL, 2, train.micro_rows, 256, "bfloat16", config.parallel, train.recompute, on_gpu=True)
    text = "\n".join(budget_lines(config, MODEL, 2, "bfloat16", "a GPU", on_gpu=True))
    assert f"memory  {in_gib(memory.total)} a rank" in text and f"host    {in_gib(memory.host)} of its memory a rank" in text
    assert all(len(line) <= 128 for line in text.splitlines())
    assert (f"disk    {in_gib(memory.disk)} in /local a rank" in text) == (offload == "nvme")
    assert "host" not in "\n".join(budget_lines(config, MODEL, 2, "float32", "no GPU", on_gpu=False))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_counts_checkpoints_in_memory(ranks: int) -> None:
    train = CONFIG.train.model_copy(update={"memory_checkpoint_every": 5})
    config = CONFIG.model_copy(update={"train": train})
    text = "\n".join(budget_lines(config, MODEL, ranks, "float32", "no GPU", on_gpu=False))
    state = 12 * parameter_counts(MODEL).total // ranks
    assert f"host    {in_gib(3 * state)} of its memory a rank for checkpoints there, {in_gib(5 * state)} where" in text
    rl = load(RLConfig, "rl", ["checkpoint=x", "loop.memory_checkpoint_every=1"])
    assert "for checkpoints there" in "\n".join(budget_lines(rl, MODEL, ranks, "float32", "no GPU", on_gpu=False))
    with pytest.raises(UserError, match=r"loop.memory_checkpoint_every=1 keeps what .* parallel.offload=nvme says"):
        load(
            RLConfig, "rl", ["checkpoint=x", "loop.memory_checkpoint_every=1", "parallel.offload=nvme", "parallel.nvme_dir=/a"]
        )


def test_the_plan_of_an_rl_run_counts_samples() -> None:
    config = load(
        RLConfig,
        "rl",
        ["checkpoint=a", "rollout.groups=4", "rollout.samples_per_group=8", "rollout.over_provision=2", "loop.rounds=10"],
    )
    text = "\n".join(budget_lines(config, MODEL, 1, "float32", "asked", on_gpu=False))
    assert "4 groups x 8 samples = 32" in text and "10 rounds x 32 samples = 320" in text and "2 times as many groups" in text


def test_a_published_model_has_its_published_size() -> None:
    config = load(PretrainConfig, "pretrain", ["model=qwen3_30b_a3b", "balance=frozen"])
    counts = parameter_counts(config.model.model_copy(update={"vocab_size": 151936}))
    assert millions(counts.total) == "30.53 billion" and millions(counts.active) == "3.35 billion"


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1.234e6, "1.23 M"), (9.68e21, "9.68 Z")])
def test_large_numbers_are_short(number: float, text: str) -> None:
    assert scaled(number) == text


def test_sizes_have_their_unit() -> None:
    assert (in_gib(5 * 2**20), in_gib(3 * 2**30)) == ("5.0 MiB", "3.00 GiB")
