"""Predictions are arithmetic that can be redone by hand; the command says what it would choose, why, and what it left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cli import load, main
from launch.plan import plan
from launch.predicted_layer import gradient_slices
from launch.prediction import EP, FSSDP, NEAR, Cluster, Layout, Prediction, best_of_each, chosen, dense_bytes
from parallel.flows import Plan
from parallel.layer_cost import layer_time
from parallel.placement import without_copies
from parallel.schedule.pipeline import OFF, WHOLE
from trainer.config.plan import PlanConfig
from trainer.config.run import ParallelConfig, PretrainConfig
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
    dense, link_s = dense_bytes(model), 7 / 8 / 370e9  # of a byte, one way
    assert dense.total(48) == 2 * counts.dense
    slices_s = [2 * (7 * 10e-6 + size * link_s) for size in (dense.head, *[dense.layer] * 47, dense.layer + dense.below)]
    hidden_s = 2 * way_s + 2 * expert_s + sums_s  # the backward pass of a layer, whose tokens the device itself reads
    waited_s = sum(max(slice_s - hidden_s, 0.0) for slice_s in slices_s[:-1]) + slices_s[-1]
    assert step.gradients_s == pytest.approx(waited_s + 7 * 10e-6 + 2 * counts.dense * link_s)
    assert 0 < waited_s < sum(slices_s) / 2 and step.copies_s == step.offload_s == 0
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
    gathering_s = found.gathering.seconds(2 * found.counts.dense)
    waited_s = plain.step.gradients_s - gathering_s
    assert waited_s > 0 and twice.step.gradients_s == pytest.approx(8 * waited_s + gathering_s), "8 micro-batches are reduced"
    assert twice.memory.gradients < plain.memory.gradients
    ahead, back, again = plain.layer.forward, plain.layer.backward, plain.layer.again
    assert again.products_s < ahead.products_s and again.tokens_s < ahead.tokens_s, "results are known, and stay away"
    recomputed_s = 48 * 8 * again.products_s  # layers and micro-batches
    rest_s = plain.step.products_s - 48 * 8 * (ahead.products_s + back.products_s)
    assert recomputed.step.products_s == pytest.approx(plain.step.products_s + recomputed_s + rest_s / 3)
    assert recomputed.step.tokens_s == pytest.approx(plain.step.tokens_s + 48 * 8 * again.tokens_s)
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


@pytest.mark.parametrize(("gpus", "kind"), [(8, EP), (64, EP), (64, FSSDP), (8, FSSDP)])
def test_a_step_is_what_its_timelines_add_up_to(gpus: int, kind: ParallelConfig) -> None:
    """With even loads all steps of the trace are alike, so the mean layer is each of them."""
    of = cluster(f"gpus={gpus}")
    prediction = of.predict(Layout(kind, 2, False))
    layer, typical, degrees = prediction.layer, prediction.layer.typical, prediction.layer.degrees
    assert layer.forward.total_s == pytest.approx(typical.forward(degrees).seconds + typical.costs.announce_s)
    assert layer.backward.total_s == pytest.approx(typical.backward(degrees).seconds)
    for one in (layer.forward, layer.backward):
        assert one.tokens_s > 0 and one.copies_s >= 0
    assert (degrees == WHOLE) == (gpus == 8), "ranks that read each other's memory cut no layers"
    off = of.unscheduled(prediction)
    assert off.products_s == prediction.step.products_s and off.tokens_s >= prediction.step.tokens_s
    assert typical.forward(OFF).seconds >= typical.forward(degrees).seconds
    if gpus == 8 and kind == EP:  # nothing but tokens travels, and nothing hides them: the model of the placement policies
        plan, loads_E = Plan(without_copies(of.owner_E, 8)), of.loads(2, "even")[0]
        attention_s = 3 * layer.setting.costs.attention_s
        assert layer.forward.total_s + layer.backward.total_s - attention_s == pytest.approx(
            layer_time(plan, loads_E, layer.setting).total_s
        )


@pytest.mark.parametrize("gpus", [8, 64])
def test_slices_of_dense_gradients_cost_no_more_than_behind_the_pass_and_no_less_than_what_is_last(gpus: int) -> None:
    of = cluster(f"gpus={gpus}")
    prediction = of.predict(Layout(EP, 4, False))
    found, added_s = gradient_slices(prediction.layer, 48, of.dense, of.slice_line)
    assert found == prediction.slices and sum(found.taken_S) + found.exposed_bytes == of.dense.total(48)
    last_s = of.slice_line.seconds(of.dense.layer + of.dense.below)
    assert last_s * (1 - 1e-9) <= added_s < of.slice_line.seconds(of.dense.total(48))
    titles = [title for title, _ in of.timelines(prediction)]
    assert [title.split(",")[0] for title in titles] == ["forward", "forward", "backward", "backward"]
    names = {span.task.name for span in of.timelines(prediction)[-1][1].spans}
    assert "gradients" in names and "weights" in names


def test_tokens_travel_as_the_planner_expects_to_be_the_fastest() -> None:
    of = cluster("gpus=64")
    choice = of.transport(2)
    assert choice.kind == "two_level" and choice.seconds["two_level"] < choice.seconds["messages"]
    assert of.predict(Layout(EP, 2, False)).layer.setting.two_level
    machine = of.machine  # links inside nodes that carry nothing more than those between them
    slow = machine.model_copy(update={"within": machine.across.model_copy(update={"gbytes": 5.0})})
    other = Cluster(of.config.model_copy(update={"machine": slow}))
    assert other.transport(2).kind == "messages" and not other.predict(Layout(EP, 2, False)).layer.setting.two_level
    assert cluster("gpus=8").transport(2).kind == "peer_memory"
    assert cluster("gpus=8", "machine.gpus_per_node=1").transport(2).kind == "messages"


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
    """Of plain expert parallelism: what nothing hides grows with the loads of each step."""
    of = cluster("gpus=16", "machine.gpus_per_node=16", "loads=drift", "batch_rows=16")
    layer = of.predict(Layout(EP, 1, False)).layer
    plan = Plan(without_copies(of.owner_E, 16))
    times = [layer_time(plan, loads_E, layer.setting).total_s for loads_E in of.loads(1, "drift")[1:]]
    attention_s = 3 * layer.setting.costs.attention_s
    assert layer.forward.total_s + layer.backward.total_s - attention_s == pytest.approx(mean(times))
