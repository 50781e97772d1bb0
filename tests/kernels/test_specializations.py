"""Tokens and experts of a rank differ from layer to layer and from step to step, and no kernel is compiled for that."""

from __future__ import annotations

import json

from tests.kernels.programs import said_by


def test_kernels_of_a_layer_are_compiled_once_for_all_numbers_of_tokens_and_experts() -> None:
    told = json.loads(said_by("tests.kernels.specializations"))
    assert told["more"] == {}
    assert {"hopper.row_tiles.kernel", "hopper.columns.kernel", "triton_expert_order._order_kernel"} <= told["first"].keys()
