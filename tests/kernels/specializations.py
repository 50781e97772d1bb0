"""How often Triton would compile the kernels of a layer whose tokens, sequences and experts differ from call to call.

A program of its own: Triton takes its driver and its mode from the process. Nothing is compiled and nothing runs; what is
recorded of every launch is the key by which Triton would find the compiled kernel. It prints {"first": keys of calls of every
kind, "more": those that only later calls of other sizes need}, counted by kernel.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.accumulate import Sum
from kernels.expert_order import TILE_ROWS, ExpertOrder, cut, most_tiles, parts_of
from kernels.hopper import columns, ring, rows
from kernels.host_device import to_device
from kernels.peers import LANE_BYTES, PeerChoices, PeerRows, capacity_for
from kernels.ragged import ragged
from kernels.rows import Tokens
from kernels.triton_attention import BLOCK, launch_attention, launch_put
from kernels.triton_destinations import launch_destinations
from kernels.triton_expert_order import order_with_kernels
from kernels.triton_linear import launch_linears
from kernels.triton_norm import launch_norm_rotate_backward, launch_rms_norm, launch_rms_norm_backward, launch_rotate
from kernels.triton_peer_routing import launch_lay_out, launch_plan
from kernels.triton_peer_rows import launch_pick, launch_pull, launch_sum
from kernels.triton_router import launch_route, launch_route_backward, settings_of
from kernels.triton_rows import launch_combine, launch_spread
from tests.kernels.compile_for_hopper import Chip

RANKS, TOKENS, TOP_K, HIDDEN, HEAD, EXPERT_HIDDEN = 2, 2048, 2, 64, 32, 64


def layer(rng: np.random.Generator, experts: int, tokens: int, parts: int) -> None:
    """Every launch of a layer, forward and backward, for `tokens` of each rank and so many experts on this one."""
    device = torch.device("cpu")
    chosen_TK = torch.from_numpy(rng.integers(0, experts, (tokens, TOP_K), dtype=np.int32))
    rank_TK = torch.zeros_like(chosen_TK)
    shares = rng.integers(1, experts + 1), experts
    _, slots_E = to_device([np.zeros(count, dtype=np.int32) for count in shares], device)
    launch_destinations(chosen_TK.long(), None, torch.ones(RANKS * experts, dtype=torch.float64), torch.ones(experts), 0.5)

    blocks = [torch.zeros(2**20, dtype=torch.uint8) for _ in range(RANKS)]
    pointers_W = torch.tensor([block.data_ptr() for block in blocks])
    capacity = capacity_for(tokens)
    choices = PeerChoices(blocks, pointers_W, capacity, TOP_K)
    sent = PeerRows(blocks, pointers_W, -(-choices.nbytes // LANE_BYTES) * LANE_BYTES, HIDDEN, torch.bfloat16)
    x_TD = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    launch_lay_out(choices, sent, 0, rank_TK, chosen_TK.long(), torch.zeros(tokens, TOP_K), x_TD)
    plan = launch_plan(choices, slots_E, 0)
    order = ordered(plan.slots_VK, experts)
    received = int(rng.integers(1, RANKS * tokens + 1))
    x_RD = torch.zeros(RANKS * capacity, HIDDEN, dtype=torch.bfloat16)
    peers = PeerRows(blocks, pointers_W, 0, HIDDEN, torch.bfloat16)
    launch_pull(peers, plan.row_WV[1], x_RD)
    launch_pull(peers, plan.row_WV[1], x_RD[:received])
    launch_sum(peers, rank_TK, plan.row_WV[:, capacity : capacity + tokens])
    launch_pick(PeerRows(blocks, pointers_W, 0, TOP_K, torch.float32), rank_TK, plan.row_WV[:, capacity : capacity + tokens])
    experts_pass(cut(order, received * TOP_K, received * TOP_K), x_RD[:received], slots_E, plan.weights_VK[:received])

    # What came as messages has an order of its size, and comes in parts.
    order = ordered(chosen_TK, experts)
    for part in parts_of(order, chosen_TK, torch.arange(tokens) * parts // tokens, parts):
        experts_pass(part, torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16), slots_E, torch.zeros(tokens, TOP_K))


def ordered(chosen_TK: torch.Tensor, experts: int) -> ExpertOrder:
    entries = chosen_TK.numel()
    return ExpertOrder(*order_with_kernels(chosen_TK, experts, entries, most_tiles(entries, experts), TILE_ROWS))


def experts_pass(order: ExpertOrder, x_RD: torch.Tensor, slots_E: torch.Tensor, weights_RK: torch.Tensor) -> None:
    """kernels/expert_mlp._HopperMLP, and with rows of entries, as kernels/expert_passes.py."""
    gate_up_SCD = torch.zeros(len(slots_E), 2 * EXPERT_HIDDEN, HIDDEN, dtype=torch.bfloat16)
    down_SDF = torch.zeros(len(slots_E), HIDDEN, EXPERT_HIDDEN, dtype=torch.bfloat16)
    dy, rows_ND = ring.clippable(order.entry_N.shape[0], HIDDEN, x_RD)
    launch_spread(x_RD, order.place_N, TOP_K, rows_ND)
    tokens = Tokens.of(x_RD, TOP_K)
    h, a_NF = rows.up(rows_ND, gate_up_SCD, slots_E, order)
    rows.up(tokens, gate_up_SCD, slots_E, order)
    y_ND = rows.down(a_NF, down_SDF, slots_E, order)
    launch_combine(y_ND, order.place_N, TOP_K, weights_RK, None, torch.empty_like(x_RD), None)
    d_h, weighted_NF, dots_PN = rows.d_hidden(rows_ND, h, weights_RK, down_SDF, slots_E, order)
    rows.d_hidden(tokens, h, weights_RK, down_SDF, slots_E, order)
    own = len(slots_E) // 2
    for fresh in (True, False) if own else ():
        sums = Sum(torch.zeros(own, HIDDEN, EXPERT_HIDDEN), fresh)
        columns.d_weights(dy, weighted_NF, len(slots_E), None, order, sums)
    columns.d_weights(d_h, rows_ND, len(slots_E), None, order)
    columns.d_weights(tokens, weighted_NF, len(slots_E), None, order)
    columns.d_weights(d_h, tokens, len(slots_E), None, order)
    d_rows_ND = rows.d_rows(d_h[ring.HALF.value :], gate_up_SCD, slots_E, order)
    launch_combine(d_rows_ND, order.place_N, TOP_K, None, dots_PN, torch.empty_like(x_RD), torch.empty_like(weights_RK))


def dense(rng: np.random.Generator, tokens: int, sequences: int) -> None:
    """Norms, products, rotations, attention and router for so many tokens, forward and backward."""
    x_TD, weight_D = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16), torch.zeros(HIDDEN, dtype=torch.bfloat16)
    launch_rms_norm(x_TD, x_TD, weight_D, 1e-6)
    launch_rms_norm_backward(x_TD, weight_D, 1e-6, x_TD, x_TD)
    weights = [torch.zeros(columns, HIDDEN, dtype=torch.bfloat16) for columns in (HIDDEN, HEAD, HEAD)]
    q_TC, k_TC, v_TC = launch_linears(x_TD, weights, torch.bfloat16)
    q_THd, k_TGd, v_TGd = (found.view(tokens, -1, HEAD) for found in (q_TC, k_TC, v_TC))
    angles_Td = torch.zeros(tokens, HEAD // 2)
    launch_rotate(q_THd, weight_D[:HEAD], 1e-6, angles_Td, angles_Td)
    launch_norm_rotate_backward(q_THd, weight_D[:HEAD], 1e-6, angles_Td, angles_Td, q_THd)
    cuts = sorted(rng.integers(0, tokens + 1, sequences - 1).tolist())
    lengths = np.diff([0, *cuts, tokens]).tolist()
    launch_attention(q_THd, k_TGd, v_TGd, ragged(lengths, lengths, None, HIDDEN // HEAD, x_TD.device))
    keys, table_NP = torch.zeros(8, BLOCK, *k_TGd.shape[1:], dtype=k_TGd.dtype), torch.zeros(sequences, -(-tokens // BLOCK))
    launch_put(k_TGd, v_TGd, torch.zeros(tokens, dtype=torch.int64), keys, keys)
    launch_attention(q_THd, keys, keys, ragged(lengths, lengths, table_NP.int(), HIDDEN // HEAD, x_TD.device))
    settings = settings_of(16, TOP_K, 1, 1, "softmax", True, 1.0, True, 1e-20)
    logits_TE = torch.zeros(tokens, 16)
    experts_TK, weights_TK, _, sums = launch_route(logits_TE, None, None, settings)
    assert sums is not None
    launch_route_backward(logits_TE, experts_TK, None, sums[2], (weights_TK, *sums[:2]), settings)


def main() -> None:
    driver.set_active(Chip())
    found: set[tuple[str, str]] = set()

    def record(kernel: Any, key: str, *_: Any) -> None:
        """In place of a compiled kernel nothing, which Triton does not run."""
        found.add((kernel._fn_name.removeprefix("kernels."), key))

    JITFunction._do_compile = record  # type: ignore[method-assign]
    rows.multiprocessors = columns.multiprocessors = lambda device: 132  # type: ignore[assignment]
    rng = np.random.default_rng(0)
    for experts in (16, 32, 64):  # what the kernels that order entries hold numbers for
        for tokens in (64, TOKENS):
            for parts in (1, 3):
                layer(rng, experts, tokens, parts)
                dense(rng, tokens, parts)
    first = set(found)
    for _ in range(60):
        tokens = int(rng.integers(1, TOKENS + 1))
        layer(rng, int(rng.integers(2, 65)), tokens, int(rng.integers(1, 5)))
        dense(rng, tokens, int(rng.integers(1, 9)))
    told = {"first": first, "more": found - first}
    print(json.dumps({name: Counter(kernel for kernel, _ in keys) for name, keys in told.items()}))


if __name__ == "__main__":
    main()
