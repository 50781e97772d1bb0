"""Metrics are declared once, and a record, a line and a table never show anything else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.metrics import (
    AXES,
    COLUMNS,
    CONSOLE,
    GROUPS,
    LENGTHS,
    LOAD,
    METRICS,
    Stage,
    clock,
    console_line,
    emit,
    markdown_table,
    metrics_of,
)
from trainer.records import SUMMARY, read_records, summary

REPOSITORY = Path(__file__).parents[2]
SCALARS = [key for key in METRICS if key != LOAD]


def test_keys_are_grouped_snake_case_and_declared_once() -> None:
    for key, metric in METRICS.items():
        assert key == metric.key
        assert re.fullmatch(r"(train|eval|moe|reward|rollout|policy|value|sync|perf|time|mem)/[a-z][a-z0-9_]*", key)
        assert metric.meaning and metric.label and "|" not in metric.meaning
        assert metric.text(0.5)


def test_units_agree_with_the_suffix_of_the_key() -> None:
    suffixes = {"_per_s": "tokens/s", "_s": "s", "_gib": "GiB", "_share": "share", "_samples": "samples", "_groups": "groups"}
    for key, metric in METRICS.items():
        expected = next((unit for suffix, unit in suffixes.items() if key.endswith(suffix)), metric.unit)
        assert metric.unit == expected, key


def test_console_and_summary_show_declared_numbers() -> None:
    for keys in (*CONSOLE.values(), *SUMMARY.values()):
        assert set(keys) <= set(SCALARS) and len(set(keys)) == len(keys)


def test_the_code_names_the_keys_that_are_declared_and_no_others() -> None:
    """Strings that look like a key, in any room, are in the table; and each of its keys is one, so something logs it."""
    pattern = re.compile(rf"({'|'.join(GROUPS)})/[a-z_]+")
    table, found = REPOSITORY / "trainer" / "metrics.py", {LOAD, LENGTHS, *AXES.values()}
    for room in ("parallel", "trainer", "rl", "launch"):
        for file in (REPOSITORY / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file != table else ():
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and pattern.fullmatch(node.value):
                    assert node.value in METRICS or node.value in AXES.values(), f"{file}:{node.lineno} {node.value}"
                    found |= {node.value} if room != "launch" else set()  # which only shows them
    assert found == {*METRICS, *AXES.values()}, "declared, and nothing logs them"


def test_an_undeclared_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(KeyError, match=r"train/los is not declared in trainer/metrics.py; the nearest is train/loss"):
        emit({"train/los": 1.0})


def test_emit_keeps_the_values_in_the_order_of_the_table() -> None:
    assert list(emit({"mem/peak_gib": 1.0, "train/loss": 2.0})) == ["train/loss", "mem/peak_gib"]


@given(
    st.sampled_from(["pretrain", "rl"]),
    st.dictionaries(st.sampled_from(SCALARS), st.floats(-1e6, 1e6)),
    st.integers(0, 10**6),
    st.floats(0, 1e6) | st.none(),
)
def test_a_console_line_is_one_short_line_without_control_characters(
    stage: Stage, values: dict[str, float], step: int, eta_s: float | None
) -> None:
    line = console_line(stage, step, 10**6, {**values, LOAD: [[1.0]]}, eta_s)
    assert len(line) <= COLUMNS and line.isprintable()
    assert ("ETA" in line) == (eta_s is not None)


def test_a_console_line_reads_as_it_should() -> None:
    values = {"train/loss": 3.21456, "moe/max_vio": 0.3, "train/grad_norm": 1.2345, "time/step_s": 0.4, "train/lr": 1.0}
    assert (
        console_line("pretrain", 40, 160, values, 65)
        == "step  40/160  loss 3.2146  MaxVio 0.300  norm 1.23  step 0.40 s  ETA 1:05"
    )
    assert (
        console_line("rl", 1, 30, {"reward/mean": 0.5, "rollout/stale_token_share": 0.12}, None)
        == "round  1/30  reward 0.500  stale 12%"
    )


@pytest.mark.parametrize("stage", ["pretrain", "rl"])
def test_every_step_line_says_how_the_devices_were_used(stage: Stage) -> None:
    """Where GPUs are known and have a price, also of large numbers and on the lines that show an evaluation."""
    values = dict.fromkeys(SCALARS, 1234.5) | {"train/loss": 3.2146, "moe/max_vio": 2.5, "reward/mean": 0.5}
    values |= {"reward/eval_mean": -0.25, "rollout/stale_token_share": 1.0, "eval/bits_per_byte": 1.234}
    values |= {"perf/mfu": 0.456, "perf/gpu_idle_share": 0.37, "perf/tokens_per_s_per_device": 123_456.0}
    values |= {"time/communication_exposed_s": 1.234, "perf/dollars_per_million_tokens": 12.34}
    line = console_line(stage, 9_999, 10_000, values, 35_999)
    for part in ("tok/s/dev 123,456", "MFU 45.6%", "exposed 1.234 s", "idle 37%", "$/M 12.34", "ETA 9:59:59"):
        assert part in line, line


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        *(
            ("perf/mfu", 0.0, "0.0%"),
            ("perf/mfu", 0.000_041_9, "0.0042%"),
            ("perf/mfu", 0.0047, "0.47%"),
            ("perf/mfu", 0.01, "1.0%"),
        ),
        *(("perf/gpu_idle_share", 0.003, "0.3%"), ("perf/mfu", 5e-324, "4.9e-322%"), ("moe/replay_changed", 0.9996, "99.96%")),
        *(("perf/dollars_per_million_tokens", 0.0012, "0.0012"), ("perf/dollars_per_million_tokens", 0.012, "0.01")),
    ],
)
def test_a_small_share_or_price_does_not_read_as_0(key: str, value: float, text: str) -> None:
    """As the MFU of a tiny model on a large GPU."""
    assert METRICS[key].text(value) == text


def test_every_metric_is_in_a_group_and_every_group_has_a_stage_that_logs_it() -> None:
    assert {key.partition("/")[0] for key in METRICS} == set(GROUPS)
    both = [metric.key for stage in AXES for metrics in metrics_of(stage).values() for metric in metrics]
    assert set(both) == set(METRICS) - {LOAD, LENGTHS}
    assert "reward/mean" not in {metric.key for metrics in metrics_of("pretrain").values() for metric in metrics}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3600, "1:00:00"), (360000, "100:00:00")]
)
def test_durations_read_as_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_documentation_has_a_row_for_each_metric() -> None:
    rows = markdown_table().splitlines()
    assert len(rows) == 2 + len(METRICS) and all(row.count("|") == 4 for row in rows)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_records(file) == []
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_records(file) == [{"step": 1}, {"step": 2}]


def test_the_summary_has_first_and_last_values_that_exist() -> None:
    records = [{"eval/bits_per_byte": 3.5}, {"train/loss": 7.0}, {"train/loss": 3.0, "eval/bits_per_byte": 1.5, LOAD: [[1.0]]}]
    changes = {change.label: (change.first, change.last) for change in summary("pretrain", records)}
    assert changes == {"loss": ("7.0000", "3.0000"), "bits/byte": ("3.500", "1.500")}
