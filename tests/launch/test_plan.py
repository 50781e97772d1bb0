"""Predictions are arithmetic that can be redone by hand; the command says what it would choose, why, and what it left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.benchmarks.placement import replay
from launch.cli import load, main
from launch.plan import plan
from launch.prediction import EP, FSSDP, NEAR, Cluster, Layout, Prediction, best_of_each, chosen, pipeline
from trainer.config.plan import PlanConfig
from trainer.config.run import PretrainConfig
from trainer.estimate import GIB, flops_per_token, memory_per_rank
from trainer.model.transformer import parameter_counts

SMALL = ["model=demo", "sequence_length=512", "gpus=8", "batch_rows=64", "model.vocab_size=4096"]


def cluster(*arguments: str) -> Cluster:
    return Cluster(load(PlanConfig, "plan", arguments))


def predictions(of: Cluster) -> list[Prediction]:
    return [of.predict(layout) for layout in of.layouts()]


def test_plain_expert_parallelism_with_even_loads_by_hand() -> None:
    """One node, all experts alike: every term of a step from the model's sizes and the machine's rates."""
    found = cluster("gpus=8", "batch_rows=32")
    model, counts = found.model, parameter_counts(found.model)
    prediction = found.predict(Layout(EP, micro_rows=2, recompute=False))
    step, tokens, micro_batches = prediction.step, 2 * 4096, 2
    entries = tokens * 8
    expert_s = entries * 2 * counts.per_expert / 600e12 + 16 * 2 * counts.per_expert / 4.2e12
    dense_flops = flops_per_token(model, 4096) - 6 * 48 * 8 * counts.per_expert
    sums_s = 16 * 10 * counts.per_expert / 4.2e12  # a gradient in bfloat16 is read, its sum in float32 read and written
    assert step.products_s == pytest.approx(micro_batches * (tokens * dense_flops / 600e12 + 48 * (3 * expert_s + sums_s)))
    rows = tokens * (1 - (1 - 1 / 8) ** 8)  # of a device, to each of seven others unless none of 8 choices goes there
    way_s = 10e-6 + 7 * rows * 2 * 2048 / 370e9 + (tokens + 8 * rows) * 2 * 2 * 2048 / 4.2e12
    assert step.tokens_s == pytest.approx(micro_batches * 48 * (4 * way_s + 160e-6))
    ring_s = 7 * 10e-6 + 2 * counts.dense * 7 / 8 / 370e9
    assert step.gradients_s == pytest.approx(3 * ring_s) and step.copies_s == step.offload_s == 0
    owned = (counts.total - counts.dense) / 8
    assert step.optimizer_s == pytest.approx(38 * (owned + counts.dense / 8) / 4.2e12)
    assert step.total_s == pytest.approx(
        step.products_s + step.tokens_s + step.gradients_s + step.optimizer_s
    ) and step.exposed_s == pytest.approx(step.tokens_s + step.gradients_s)
    assert prediction.tokens_per_s == pytest.approx(32 * 4096 / step.total_s) and prediction.layer.imbalance == 1.0
    memory = memory_per_rank(model, 8, 2, 4096, "bfloat16", EP, recompute=False, on_gpu=True)
    assert prediction.memory == memory and prediction.fits == (memory.total <= (139.8 - 2) * GIB)


def test_what_each_option_costs_and_saves() -> None:
    found = cluster("gpus=64")
    plain, twice, recomputed, offloaded = (
        found.predict(layout)
        for layout in (
            Layout(EP, 2, False),
            Layout(EP.model_copy(update={"zero_stage": 2}), 2, False),
            Layout(EP, 2, True),
            Layout(EP.model_copy(update={"offload": "cpu"}), 2, False),
        )
    )
    assert twice.step.gradients_s == pytest.approx((2 * 8 + 1) / 3 * plain.step.gradients_s), "8 micro-batches are reduced"
    assert twice.memory.gradients < plain.memory.gradients
    sums_s = plain.layer.sums_s * 48 * 8  # layers and micro-batches; no gradient is added twice
    assert recomputed.step.products_s - sums_s == pytest.approx(4 / 3 * (plain.step.products_s - sums_s))
    assert recomputed.step.tokens_s == pytest.approx(1.5 * plain.step.tokens_s)
    assert recomputed.memory.activations < plain.memory.activations
    assert offloaded.memory.total < plain.memory.total and offloaded.memory.host > 0
    assert offloaded.step.optimizer_s > plain.step.optimizer_s and offloaded.step.offload_s > 0


def test_copies_pay_where_loads_are_skewed() -> None:
    found = cluster("gpus=64", "loads=zipf")
    ep, fssdp = found.predict(Layout(EP, 4, True)), found.predict(Layout(FSSDP, 4, True))
    assert fssdp.layer.imbalance < 1.5 < ep.layer.imbalance and fssdp.step.total_s < ep.step.total_s / 3
    assert fssdp.layer.setting.budget.memory > 0 and fssdp.memory.copies > 0 == ep.memory.copies
    assert ep.skewed == ep.step


@settings(max_examples=15)
@given(st.sampled_from(["even", "zipf", "burst"]), st.floats(1.0, 4.0), st.sampled_from([8, 16, 32]))
def test_a_faster_machine_is_never_slower(loads: str, factor: float, gpus: int) -> None:
    of = cluster(
        f"gpus={gpus}", "batch_rows=64", "model=demo", "model.num_experts=32", "sequence_length=1024", f"loads={loads}"
    )
    machine = of.machine
    faster = machine.model_copy(
        update={
            "product_tflops": machine.product_tflops * factor,
            "across": machine.across.model_copy(update={"gbytes": machine.across.gbytes * factor}),
        }
    )
    better = Cluster(of.config.model_copy(update={"machine": faster}))
    layout = Layout(EP, 1, False)
    assert better.predict(layout).step.total_s <= of.predict(layout).step.total_s * (1 + 1e-9)


def test_the_choice_fits_and_is_as_good_as_the_fastest() -> None:
    found = predictions(cluster("gpus=64", "machine=h100"))
    best = best_of_each(found)
    assert len(best) == 6 and len({one.layout.name for one in best}) == 6
    choice = chosen(best)
    assert choice is not None and choice.fits
    fitting = [one for one in found if one.fits]
    assert choice.step.total_s <= NEAR**2 * min(one.step.total_s for one in fitting)
    near = [one for one in best if one.fits and one.step.total_s <= NEAR * min(one.step.total_s for one in best if one.fits)]
    assert choice.skewed.total_s == min(one.skewed.total_s for one in near)
    assert chosen([replace(one, room_gib=0.0) for one in best]) is None
    least = best_of_each([replace(one, room_gib=0.0) for one in found])
    assert all(one.memory.total == min(o.memory.total for o in found if o.layout.name == one.layout.name) for one in least)


@pytest.mark.parametrize("gpus", [8, 64])
def test_chunks_never_cost_time(gpus: int) -> None:
    of = cluster(f"gpus={gpus}", "loads=drift")
    prediction = of.predict(Layout(FSSDP, 2, True))
    found = pipeline(of, prediction)
    assert found.saved_s >= 0 and 1 <= found.forward_degree <= 16 and 1 <= found.backward_degree <= 16
    whole = {title.split(",")[0]: timeline.seconds for title, timeline in found.panels if "whole" in title}
    cut = {title.split(",")[0]: timeline.seconds for title, timeline in found.panels if "chunks" in title}
    assert set(whole) == {"forward", "backward"} and all(cut[way] < whole[way] for way in cut)


def test_a_whole_layer_takes_in_its_timeline_what_it_takes_in_a_step() -> None:
    of = cluster("gpus=64")
    prediction = of.predict(Layout(EP, 2, False))
    layer, attention_s = prediction.layer, 3 * prediction.layer.setting.costs.attention_s
    whole = [timeline.seconds for title, timeline in pipeline(of, prediction).panels if "whole" in title]
    assert sum(whole) - attention_s == pytest.approx(layer.products_s + layer.tokens_s)


def test_more_gpus_than_experts_are_predicted_and_said_not_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan, PlanConfig, "plan", [*SMALL, "gpus=16"]) == 0
    printed = capsys.readouterr().out
    assert "Tessera cannot run it as it stands: model.num_experts (8) is not divisible by the number of ranks (16)" in printed
    assert cluster(*SMALL).obstacle() is None


def test_the_command_names_options_that_pretraining_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "schedule.svg"
    assert main(plan, PlanConfig, "plan", [*SMALL, f"picture={picture}"]) == 0
    printed = capsys.readouterr().out
    choice = next(line for line in printed.splitlines() if line.startswith("choice"))
    config = load(PretrainConfig, "pretrain", choice.split()[1:])
    assert config.train.batch_rows == 64 and config.cluster.ranks == 8 and config.train.sequence_length == 512
    assert "predicted, not measured. Left out: " in printed and "one layer's timeline is in" in printed
    assert picture.read_text().count("<svg") == 1
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert sum(">" in row for row in rows) == 1


def test_measured_times_change_the_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"products": [[1e12, 1.0], [2e12, 2.0]]}))
    assert main(plan, PlanConfig, "plan", [*SMALL, f"profile={profile}"]) == 0
    printed = capsys.readouterr().out
    assert "measured products  1 TFLOP/s, r² 1.0000" in printed and "1 TFLOP/s of products" in printed


def test_nothing_is_chosen_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan, PlanConfig, "plan", ["gpus=2", "batch_rows=2", "machine=v100"]) == 0
    printed = capsys.readouterr().out
    assert "nothing fits: ep + offload needs least" in printed and "choice" not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpus=12"], "gpus (12) do not fill nodes of 8"),
        (["batch_rows=63"], "batch_rows (63) does not divide over 64 gpus"),
        (["machine=h300"], "did you mean machine=h200"),
        (["picture=a.pdf"], "picture (a.pdf) should end in .svg or .png"),
        (["picture=nowhere/a.svg"], "there is no folder nowhere"),
        (["sequence_length=100000"], "larger than model.max_positions (40960)"),
        (["loads=zip"], "did you mean zipf?"),
        (["profile=nowhere.json"], "cannot be read: No such file or directory"),
        (["machine.acros.gbytes=5"], "did you mean machine.across"),
    ],
)
def test_mistakes_are_said_in_words(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan, PlanConfig, "plan", arguments) == 2
    assert said in capsys.readouterr().err


def test_help_lists_machines_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan, PlanConfig, "plan", ["--help"]) == 0
    printed = capsys.readouterr().out
    assert "machine=     h200  a100  h100  v100" in printed and "dry_run" not in printed and "experiment" not in printed
    assert all(f"  {name}=" in printed for name in ("gpus", "batch_rows", "loads", "profile", "picture"))


def test_layer_times_are_means_over_the_trace() -> None:
    of = cluster("gpus=16", "loads=drift", "batch_rows=16")
    layer = of.predict(Layout(EP, 1, False)).layer
    replayed = replay("plain", of.loads(1, "drift")[:, None], layer.setting)
    assert layer.tokens_s == pytest.approx(mean(time.tokens_s for time in replayed.times))
