"""Compiles every launch of kernels/hopper for the chip, without one, and prints what the assembler says of each.

A program of its own: Triton takes its driver and its mode from the process. One line of JSON for each compiled kernel:
{"launch", "spilled" bytes, "serialized" products}.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.accumulate import Sum
from kernels.expert_order import expert_order
from kernels.hopper import columns, ring, rows, vocabulary
from kernels.rows import Tokens

TARGET = "sm_90a"


class Chip:
    """What Triton asks its driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled(modules: list[ModuleType]) -> Iterator[list[Any]]:
    """Launches of `modules.kernel` only compile; the results of the compiler are collected."""
    results: list[Any] = []

    def compile_only(run: Any, *args: Any, **options: Any) -> None:
        results.append(run(*args, **{**options, "warmup": True}))

    patches = [patch.object(m, "multiprocessors", lambda device: 132) for m in modules]
    patches += [patch.object(rows, "early", lambda device, rows: {"EARLY": True, "launch_pdl": True})]
    patches += [patch.object(m.kernel, "run", partial(compile_only, m.kernel.run)) for m in modules]
    for one in patches:
        one.start()
    try:
        yield results
    finally:
        for one in patches:
            one.stop()


def assemble(ptx: str) -> tuple[int, int]:
    """(bytes of registers spilled to memory, products that run one by one instead of overlapping)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, f"-arch={TARGET}", "-v", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    messages = said.stdout + said.stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", messages)), messages.count("serialized")


def launch_everything() -> Iterator[str]:
    """Every kind and width of launch, with an irregular routing."""
    order = expert_order(torch.tensor([[0, 1], [2, 0], [2, 1]]), 3)
    slots_E = torch.tensor([2, 0, 1], dtype=torch.int32)
    for hidden, slots in ((768, None), (64, slots_E), (96, slots_E)):
        size = 128 if hidden == 64 else 320
        like = torch.zeros(6, size, dtype=torch.bfloat16)
        gate_up_SCD = torch.zeros(3, 2 * hidden, size, dtype=torch.bfloat16)
        down_SDF = torch.zeros(3, size, hidden, dtype=torch.bfloat16)
        h, a_RF = rows.up(like, gate_up_SCD, slots, order)
        yield f"up, F={hidden}"
        rows.down(a_RF, down_SDF, slots, order)
        yield f"down, F={hidden}"
        tokens = Tokens.of(torch.zeros(3, size, dtype=torch.bfloat16), 2)
        rows.up(tokens, gate_up_SCD, slots, order)
        yield f"up of tokens, F={hidden}"
        rows.d_hidden(tokens, h, torch.ones(6), down_SDF, slots, order)
        yield f"d_hidden of tokens, F={hidden}"
        for weights_N in (None, torch.ones(6)):
            d_h, weighted_RF, _ = rows.d_hidden(like, h, weights_N, down_SDF, slots, order)
            yield f"d_hidden, F={hidden}, {'no ' if weights_N is None else ''}weights"
        rows.d_rows(d_h[ring.HALF.value :], gate_up_SCD, slots, order)
        yield f"d_rows, F={hidden}"
        columns.d_weights(d_h, like, 3, slots, order)
        yield f"gradient of gate_up, F={hidden}"
        if slots is not None:
            columns.d_weights(d_h, like, 3, None, order)
            yield f"gradient of gate_up in the order of experts, F={hidden}"
        for fresh in (True, False):
            sums = Sum(torch.zeros(2, 2 * hidden, size), fresh)
            columns.d_weights(d_h, like, 3, None, order, sums)
            yield f"gradient of gate_up {'into' if fresh else 'added to'} sums, F={hidden}"
        dy, _ = ring.clippable(6, size, like)
        columns.d_weights(dy, weighted_RF, 3, slots, order)
        yield f"gradient of down, F={hidden}"
        columns.d_weights(tokens, weighted_RF, 3, slots, order)
        yield f"gradient of down from tokens, F={hidden}"
        columns.d_weights(d_h, tokens, 3, slots, order)
        yield f"gradient of gate_up from tokens, F={hidden}"
    hidden_TD, head_VD = torch.zeros(300, 128, dtype=torch.bfloat16), torch.zeros(1000, 128, dtype=torch.bfloat16)
    targets_T = torch.zeros(300, dtype=torch.int64)
    with patch.object(vocabulary, "reduce_kernel", {(10,): lambda *args, **options: None}):
        vocabulary.statistics_of(hidden_TD, head_VD, targets_T, 0.7)
    yield "statistics of logits"
    out_TW = torch.zeros(300, 512, dtype=torch.bfloat16)
    vocabulary.logit_gradients(hidden_TD, head_VD, targets_T, 0.7, torch.zeros(4, 300), 512, out_TW)
    yield "gradient of logits"


def main() -> None:
    driver.set_active(Chip())
    with compiled([rows, columns, vocabulary]) as results:
        for launch in launch_everything():
            spilled, serialized = assemble(results.pop().asm["ptx"])
            print(json.dumps({"launch": launch, "spilled": spilled, "serialized": serialized}), flush=True)


if __name__ == "__main__":
    main()
