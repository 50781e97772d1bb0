"""Model FLOPs are counted token by token, and what cannot be known is not told."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models import tiny_model
from trainer.estimate import flops_per_token, training_flops
from trainer.usage import BFLOAT16_TFLOPS, IdleWatch, Used, published_peak, work_of

MODEL = tiny_model()
SECONDS = 0.5


def used(**changes: float) -> Used:
    values = {"tokens": 1000.0, "pairs": 9000.0, "peak_flops": 2e12, "exposed_s": 0.2, "idle_s": 0.4}
    return Used(**{**values, **changes})


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=4))
def test_work_is_what_the_tokens_see_of_their_documents(lengths_B: list[list[int]]) -> None:
    length = max(sum(lengths) for lengths in lengths_B) + 2
    documents_BS = torch.full((len(lengths_B), length), -1, dtype=torch.int32)
    for row, lengths in enumerate(lengths_B):
        ids = [number for number, count in enumerate(lengths) for _ in range(count)]
        documents_BS[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    tokens, pairs = work_of(documents_BS)
    same_BSS = (documents_BS[:, :, None] == documents_BS[:, None, :]) & (documents_BS >= 0)[:, :, None]
    assert tokens == sum(map(sum, lengths_B)) and pairs == int(same_BSS.tril().sum())


def test_a_row_of_one_document_costs_what_the_estimate_says_but_for_its_diagonal() -> None:
    tokens, pairs = work_of(torch.zeros(1, 64, dtype=torch.int32))
    assert pairs == 64 * 65 // 2
    assert training_flops(MODEL, tokens, pairs - 32) == 64 * flops_per_token(MODEL, 64)


def test_mfu_is_the_share_of_the_published_peak_of_all_ranks() -> None:
    told = used().metrics(MODEL, SECONDS, ranks=2)
    assert told["perf/mfu"] == pytest.approx(training_flops(MODEL, 1000, 9000) / SECONDS / 2e12)
    assert told["train/model_tflops"] == pytest.approx(training_flops(MODEL, 1000, 9000) / 1e12)
    assert told["time/communication_exposed_s"] == 0.1 and told["time/gpu_idle_s"] == 0.2


def test_what_one_rank_cannot_tell_is_no_column() -> None:
    told = used(peak_flops=math.nan, idle_s=math.nan).metrics(MODEL, SECONDS, ranks=2)
    assert set(told) == {"train/model_tflops", "time/communication_exposed_s"}
    assert "time/communication_exposed_s" not in used().metrics(MODEL, SECONDS, ranks=1)


def test_a_peak_is_known_by_the_exact_name_and_for_bfloat16_alone() -> None:
    assert published_peak("NVIDIA H200", "bfloat16") == 989.4e12
    for device, dtype in (("NVIDIA H200", "float32"), ("NVIDIA H200 MIG 1g.18gb", "bfloat16"), ("", "bfloat16")):
        assert published_peak(device, dtype) is None
    assert all(name.startswith("NVIDIA ") for name in BFLOAT16_TFLOPS)


def test_a_cpu_has_no_idle_watch() -> None:
    assert IdleWatch.of(torch.device("cpu")) is None
