"""What must not become an update does not: it is named, kept, and leaves no trace; ranks decide alike."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel.topology import World
from tests.checkpoints import named_state
from tests.distributed.ranks import run_cases, run_ranks
from tests.models import parallel, random_batch, spec, tiny_model
from trainer.batch import Predictions, TokenLoss, TrainBatch, cross_entropy
from trainer.guard import FaultFinder, Guard, LossWindow, UpdateRefused, first_fault, keep_batch, zscore
from trainer.state import TrainerSpec
from trainer.step import Trainer

pytestmark = pytest.mark.cpu_adam

STOP = Guard(skip_nonfinite=0, spike_zscore=None, spike_window=4, on_spike="stop")
LR = 1e-2
BAD = 1  # the update whose batch is poisoned
finite = st.floats(-1e6, 1e6)

# ---------------------------------------------------------------- spikes


@given(st.lists(finite, min_size=2, max_size=20), finite)
def test_the_zscore_is_that_of_its_definition(history: list[float], loss: float) -> None:
    tensor = torch.tensor(history, dtype=torch.float64)
    above, deviation = loss - tensor.mean().item(), tensor.std().item()
    score = zscore(history, loss)
    if above < -1e-6:  # nearer to the mean, rounding decides on which side it is
        assert score == 0
    elif deviation > 1e-3:
        assert score == pytest.approx(max(above, 0) / deviation, rel=1e-6, abs=1e-6)


def test_a_window_judges_when_it_is_full_and_accepts_a_lasting_level() -> None:
    window = LossWindow(replace(STOP, spike_zscore=4.0))
    assert [window.spike(loss) for loss in (9.0, 1.0, 1.1, 0.9)] == [None] * 4
    assert LossWindow(STOP).spike(1e9) is None
    calm = LossWindow(replace(STOP, spike_zscore=4.0))
    for loss in (1.0, 1.1, 0.9, 1.0):
        calm.spike(loss)
    score = calm.spike(3.0)
    assert score is not None and score > 4
    assert calm.spike(3.1) is None, "one of four at the new level is deviation enough"
    assert calm.spike(math.nan) is None and len(calm.losses) == 4


# ---------------------------------------------------------------- where it begins


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sqrt(self.first(x) * 0.0))


def test_the_first_bad_output_is_named_or_else_the_first_bad_gradient() -> None:
    model, alone = Halves(), World(0, 1, torch.device("cpu"), ranks_per_node=1)
    finder = FaultFinder(model, rank=0)
    with finder.watching():
        model(torch.ones(2, 4)).sum().backward()  # a root of zero has an infinite slope
    assert str(first_fault(finder.fault, alone)).startswith("the gradient of first.")
    with torch.no_grad():
        model.first.weight[0, 0] = math.inf
        model.second.bias.fill_(math.nan)
    with finder.watching():
        model(torch.ones(2, 4)).sum()
    assert str(finder.fault) == "the output of first on rank 0"
    assert first_fault(None, alone) is None
    assert not model.first._forward_hooks and not model.first.weight._backward_hooks


# ---------------------------------------------------------------- on two ranks


def poisoned(predicted: Predictions, batch: TrainBatch) -> TokenLoss:
    return TokenLoss(loss_BS=-predicted.logprobs_BS * batch.extras["factor"])


def batch_of(number: int, poison: float | None) -> TrainBatch:
    """`poison` multiplies one token of the last row, which the last rank has."""
    batch = random_batch(number)
    factor = torch.ones(batch.tokens_BS.shape)
    if poison is not None:
        weighted = torch.nonzero(batch.weights_BS[-1])[0]
        factor[-1, weighted] = poison
    return replace(batch, extras={"factor": factor})


def learn(world: World, told: TrainerSpec, poison: float | None, numbers: list[int], folder: str) -> dict[str, Any]:
    """Learns these batches, the one numbered BAD with `poison` in it; what was told, raised, and the state at the end."""
    trainer = Trainer(told, world, Path(folder))
    metrics, raised = [], None
    for number in numbers:
        batch = batch_of(number, poison if number == BAD else None)
        share = batch.num_rows // world.size
        try:
            metrics.append(trainer.learn(batch.rows(world.rank * share, (world.rank + 1) * share), poisoned, LR))
        except UpdateRefused as error:
            raised = str(error)
            break
    state = {name: tensor.detach().cpu().clone() for name, tensor in named_state(trainer, with_moments=False)}
    return {"metrics": metrics, "raised": raised, "state": state}


CASES: dict[str, dict[str, Any]] = {
    "zero1": {"micro_rows": 4},
    "zero2": {"micro_rows": 2, "parallel": parallel(zero_stage=2)},
    "bfloat16": {"micro_rows": 2, "dtype": "bfloat16"},
    "offload": {"micro_rows": 4, "parallel": parallel(offload="cpu")},
}


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_update_leaves_no_trace(tmp_path: Path, case: str) -> None:
    told = spec(tiny_model(), guard=replace(STOP, skip_nonfinite=1), **CASES[case])
    poisoned = (told, math.nan, [0, BAD, 2, 3], str(tmp_path))
    skipped, without = run_cases(learn, 2, [poisoned, (told, None, [0, 2, 3], str(tmp_path / "unused"))])
    for rank in range(2):
        found, expected = skipped[rank], without[rank]
        assert found["raised"] is None
        marks = [m.get("train/skipped", 0) for m in found["metrics"]]
        assert marks == [0, 1, 0, 0]
        assert all(math.isfinite(v) for m in found["metrics"] for v in m.values() if not isinstance(v, list))
        losses = [m["train/loss"] for m in found["metrics"] if "train/skipped" not in m]
        assert losses == [m["train/loss"] for m in expected["metrics"]]
        assert found["state"].keys() == expected["state"].keys()
        for name, tensor in expected["state"].items():
            assert torch.equal(found["state"][name], tensor), name
    assert not (tmp_path / "unused").exists()
    kept = load_file(tmp_path / "update_000002_refusal_1_rank_1.safetensors")
    whole = batch_of(BAD, math.nan)
    assert torch.equal(kept["tokens"], whole.tokens_BS[4:]) and kept["extras.factor"].isnan().sum() == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"update_000002_refusal_1_rank_{rank}.safetensors" for rank in range(2)
    ]


def test_all_ranks_stop_together_and_name_rank_and_layer(tmp_path: Path) -> None:
    told = spec(tiny_model(), micro_rows=4, guard=STOP)
    cases = [(told, math.inf, [0, BAD], str(tmp_path)), (told, None, [0], str(tmp_path))]
    results, before = run_cases(learn, 2, cases)
    for found, expected in zip(results, before, strict=True):
        assert found["raised"] == results[0]["raised"], "ranks disagree"
        for name, tensor in expected["state"].items():
            assert torch.equal(found["state"][name], tensor), f"{name} was changed"
    told_of = results[0]["raised"]
    assert "update 2 is refused: its gradient is not finite, beginning in the gradient of" in told_of
    assert "on rank 1; nothing was changed" in told_of and "update_000002_refusal_1_rank_*.safetensors" in told_of


def weights_are_bad(world: World, told: TrainerSpec) -> str:
    trainer = Trainer(told, world)
    with torch.no_grad():
        dict(trainer.model.named_parameters())["blocks.1.attention.query.weight"].fill_(math.nan)
    share = 8 // world.size
    with pytest.raises(UpdateRefused) as caught:
        trainer.learn(random_batch(0).rows(world.rank * share, (world.rank + 1) * share), cross_entropy, LR)
    return str(caught.value)


def test_a_bad_layer_is_named(tmp_path: Path) -> None:
    messages = run_ranks(weights_are_bad, 2, spec(tiny_model(), micro_rows=4))
    assert messages[0] == messages[1]
    assert "beginning in the output of blocks.1.attention.query_norm on rank 0; nothing was changed" in messages[0]


def test_a_limit_of_skips_in_a_row(tmp_path: Path) -> None:
    told = spec(tiny_model(), micro_rows=8, guard=replace(STOP, skip_nonfinite=2))
    (found,) = run_ranks(learn, 1, told, math.nan, [BAD, 0, BAD, BAD, BAD], str(tmp_path))
    assert [m.get("train/skipped", 0) for m in found["metrics"]] == [1, 0, 1, 1]
    assert "update 2 is refused" in found["raised"] and "So were the 2 before it, which is the limit" in found["raised"]
    kept = {p.name.removesuffix("_rank_0.safetensors") for p in tmp_path.iterdir()}
    assert kept == {"update_000001_refusal_1", *(f"update_000002_refusal_{n}" for n in (1, 2, 3))}


def test_a_batch_that_cannot_be_kept_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = keep_batch(random_batch(0), tmp_path / "file" / "folder", "update_000001_refusal_1", 0)
    assert told.startswith("the batch could not be kept: ")


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_spike_is_skipped_or_stops_on_all_ranks(tmp_path: Path, action: str) -> None:
    guard = Guard(skip_nonfinite=0, spike_zscore=8.0, spike_window=3, on_spike=action)  # type: ignore[arg-type]
    results = run_ranks(learn, 2, spec(tiny_model(), micro_rows=4, guard=guard), 1e4, [0, 2, 3, BAD, 4], str(tmp_path))
    assert results[0]["raised"] == results[1]["raised"]
    if action == "stop":
        assert "standard deviations above the last 3; nothing was changed" in results[0]["raised"]
        assert "train.on_spike=skip" in results[0]["raised"]
    else:
        assert [m.get("train/skipped", 0) for m in results[0]["metrics"]] == [0, 0, 0, 1, 0]
        assert results[0]["metrics"][3]["train/loss"] > 10
