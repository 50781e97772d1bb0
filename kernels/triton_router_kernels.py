"""The Triton kernels of the router; kernels/triton_router.py launches them and tells their bounds.

Shape letters: T tokens, E experts, K top-k, G groups. A program holds a tile of some tokens (rows) and all experts (columns).

The selection goes over integer keys, the bits of the biased score above the complement of the expert's index. No two keys of a
token are equal, so ties need no care, a pass needs one reduction, and K different experts come out even where scores are NaN.
What a token gets must not depend on its batch, so the layout of a tile, and with it the order of sums, may depend on constants
only: the launcher guarantees the alignment of logits (VECTOR), and nothing is specialised on addresses or on T.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.launches import begin
from kernels.triton_log1p import log1p

LOWEST = tl.constexpr(-(2**63))  # below every key
HIGHEST = tl.constexpr(2**63 - 1)  # above every key
INDEX_BITS = tl.constexpr(0xFFFF)  # of a key, the complement of the index
TAIL = tl.constexpr(-40.0)  # as SQRT_SOFTPLUS_TAIL of kernels/router.py


@triton.jit
def _experts_of_columns(E: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, GROUP_PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(the expert of each column of a tile, whether there is one): every group begins at a multiple of GROUP_PADDED."""
    columns = tl.arange(0, GROUPS_PADDED * GROUP_PADDED)
    group, inside = columns // GROUP_PADDED, columns % GROUP_PADDED
    return group * (E // GROUPS) + inside, (group < GROUPS) & (inside < E // GROUPS)


@triton.jit
def _load_tile(logits, rows, stride, columns, inside, real, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 logits, -inf where no expert is and 0 where no token is. Addresses are multiples of VECTOR numbers."""
    pointers = logits + rows[:, None] * (stride * VECTOR) + columns[None, :]
    pointers = tl.multiple_of(pointers, [1, VECTOR * logits.dtype.element_ty.primitive_bitwidth // 8])
    x = tl.load(pointers, mask=inside[:, None] & real[None, :], other=0.0)
    return tl.where(real[None, :], x.to(tl.float32), float("-inf"))


@triton.jit
def _counted_rows(valid, rows, num_tokens):  # type: ignore[no-untyped-def]
    counted = rows < num_tokens
    if valid is not None:
        counted = counted & (tl.load(valid + rows, mask=counted, other=0) != 0)
    return counted


@triton.jit
def _score(x, top, total, SCORES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scores of logits x, of which `top` is the row's largest and `total` the row's sum of exp(x - top)."""
    if SCORES == "softmax":
        return tl.exp(x - top) / total
    if SCORES == "sigmoid":
        return tl.sigmoid(x)
    softplus = tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))
    return tl.where(x < TAIL, tl.exp(x * 0.5), tl.sqrt(softplus))


@triton.jit
def _key(value, index):  # type: ignore[no-untyped-def]
    """int64 keys in the order of the float32 values, among equal values in the reverse order of the indices."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (index ^ INDEX_BITS).to(tl.int64)


@triton.jit
def _value(key):  # type: ignore[no-untyped-def]
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _next_best(keys, last):  # type: ignore[no-untyped-def]
    """The largest key of each row below the row's last one."""
    return tl.max(tl.where(keys < last[:, None], keys, LOWEST), axis=1)


@triton.jit
def _of_best_groups(  # type: ignore[no-untyped-def]
    keys,
    BLOCK_T: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
):
    """The keys, lowered below all others outside the TOP_GROUPS groups whose two best values have the largest sum."""
    by_group = tl.reshape(keys, [BLOCK_T, GROUPS_PADDED, GROUP_PADDED])
    first = tl.max(by_group, axis=2)
    second = tl.max(tl.where(by_group == first[:, :, None], LOWEST, by_group), axis=2)
    group = tl.arange(0, GROUPS_PADDED)[None, :]
    group_keys = tl.where(group < GROUPS, _key(_value(first) + _value(second), group), LOWEST)
    last = tl.full([BLOCK_T], HIGHEST, tl.int64)
    for _ in range(TOP_GROUPS):
        last = _next_best(group_keys, last)
    kept = (group_keys >= last[:, None])[:, :, None]
    return tl.reshape(tl.where(kept, by_group, LOWEST), [BLOCK_T, GROUPS_PADDED * GROUP_PADDED])


@triton.jit(
    do_not_specialize=["num_tokens", "stride", "scale", "smallest_sum"],
    do_not_specialize_on_alignment=["logits", "bias", "valid"],
)
def route_kernel(  # type: ignore[no-untyped-def]
    logits,
    bias,
    valid,
    experts,
    weights,
    counts,
    partial_sums,
    num_tokens,
    stride,
    scale,
    smallest_sum,
    E: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCORES: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    VECTOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert, real = _experts_of_columns(E, GROUPS, GROUPS_PADDED, GROUP_PADDED)
    inside = rows < num_tokens
    x = _load_tile(logits, rows, stride, expert, inside, real, VECTOR)
    top = tl.max(x, axis=1)
    total = tl.sum(tl.exp(x - top[:, None]), axis=1)
    score = _score(x, top[:, None], total[:, None], SCORES)

    biased = score
    if bias is not None:
        biased = score + tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    keys = tl.where(real[None, :], _key(biased, expert[None, :]), LOWEST)
    if GROUPS > 1:
        keys = _of_best_groups(keys, BLOCK_T, GROUPS, GROUPS_PADDED, GROUP_PADDED, TOP_GROUPS)
    k = tl.arange(0, K_PADDED)[None, :]
    last = tl.full([BLOCK_T], HIGHEST, tl.int64)
    chosen = tl.zeros([BLOCK_T, K_PADDED], tl.int64)
    for step in range(K):
        last = _next_best(keys, last)
        chosen = tl.where(k == step, ((last & INDEX_BITS) ^ INDEX_BITS)[:, None], chosen)

    # The logits of the chosen are read again, from the cache: cheaper than picking them out of the tile.
    entries = inside[:, None] & (k < K)
    chosen_x = tl.load(logits + rows[:, None] * (stride * VECTOR) + chosen, mask=entries, other=0.0).to(tl.float32)
    weight = tl.where(k < K, _score(chosen_x, top[:, None], total[:, None], SCORES), 0.0)
    if RENORMALIZE:
        weight = weight / (tl.sum(weight, axis=1) + smallest_sum)[:, None]
    tl.store(experts + rows[:, None] * K + k, chosen, mask=entries)
    tl.store(weights + rows[:, None] * K + k, weight * scale, mask=entries)

    counted = _counted_rows(valid, rows, num_tokens)
    count = tl.sum(((keys >= last[:, None]) & counted[:, None]).to(tl.int32), axis=0)
    tl.atomic_add(counts + expert, count.to(tl.int64), mask=real & (count > 0), sem="relaxed")
    if partial_sums is not None:
        share = score
        if SCORES != "softmax":
            share = score / (tl.sum(score, axis=1) + smallest_sum)[:, None]
        log_sum = top + tl.log(total)
        partial_sums += tl.program_id(0) * (E + 2)
        tl.store(partial_sums + expert, tl.sum(tl.where(counted[:, None], share, 0.0), axis=0), mask=real)
        tl.store(partial_sums + E, tl.sum(tl.where(counted, log_sum * log_sum, 0.0), axis=0))
        tl.store(partial_sums + E + 1, tl.sum(counted.to(tl.float32), axis=0))


@triton.jit(do_not_specialize=["num_programs"])
def add_kernel(  # type: ignore[no-untyped-def]
    partial_sums,
    score_sums,
    z_loss,
    num_valid,
    num_programs,
    E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The sums over programs, in a fixed order. `num_valid` is at least 1, to divide by."""
    columns = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    sums = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    squares = tl.zeros([BLOCK_P], tl.float32)
    tokens = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, num_programs, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        there = program < num_programs
        row = partial_sums + program * (E + 2)
        sums += tl.load(row[:, None] + columns[None, :], mask=there[:, None] & (columns < E)[None, :], other=0.0)
        squares += tl.load(row + E, mask=there, other=0.0)
        tokens += tl.load(row + E + 1, mask=there, other=0.0)
    tl.store(score_sums + columns, tl.sum(sums, axis=0), mask=columns < E)
    if tl.program_id(0) == 0:
        valid = tl.maximum(tl.sum(tokens, axis=0), 1.0)
        tl.store(num_valid, valid)
        tl.store(z_loss, tl.sum(squares, axis=0) / valid)


@triton.jit
def _with_choice(k, grad, selected, experts, grad_weights, entries, inside, column):  # type: ignore[no-untyped-def]
    """The gradient of choice k put where its expert is, and that expert marked."""
    hit = tl.load(experts + entries + k, mask=inside, other=0)[:, None] == column
    grad = tl.where(hit, tl.load(grad_weights + entries + k, mask=inside, other=0.0)[:, None], grad)
    return grad, selected | hit


@triton.jit
def _grad_through_weights(  # type: ignore[no-untyped-def]
    experts,
    grad_weights,
    score,
    rows,
    inside,
    scale,
    smallest_sum,
    K: tl.constexpr,
    E_PADDED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """dL/dscore; for weights scale * s / S of selected scores s with sum S it is (g - sum_j g_j s_j / S) * scale / S."""
    column = tl.arange(0, E_PADDED)[None, :]
    entries = rows * K
    grad = tl.zeros_like(score)
    selected = column < tl.zeros_like(rows)[:, None]
    if K <= 8:  # all loads at once; more would spill
        for k in tl.static_range(K):
            grad, selected = _with_choice(k, grad, selected, experts, grad_weights, entries, inside, column)
    else:
        for k in range(K):
            grad, selected = _with_choice(k, grad, selected, experts, grad_weights, entries, inside, column)
    if RENORMALIZE:
        total = tl.sum(tl.where(selected, score, 0.0), axis=1) + smallest_sum
        common = tl.sum(grad * score, axis=1) / total
        grad = tl.where(selected, grad - common[:, None], 0.0) / total[:, None]
    return grad * scale


@triton.jit(
    do_not_specialize=["num_tokens", "stride", "scale", "smallest_sum"],
    do_not_specialize_on_alignment=["logits", "valid"],
)
def route_backward_kernel(  # type: ignore[no-untyped-def]
    logits,
    experts,
    valid,
    num_valid,
    grad_weights,
    grad_score_sums,
    grad_z_loss,
    grad_logits,
    num_tokens,
    stride,
    scale,
    smallest_sum,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    K: tl.constexpr,
    SCORES: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    VECTOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, E_PADDED)
    inside = rows < num_tokens
    real = columns < E
    x = _load_tile(logits, rows, stride, columns, inside, real, VECTOR)
    top = tl.max(x, axis=1)
    total = tl.sum(tl.exp(x - top[:, None]), axis=1)
    score = _score(x, top[:, None], total[:, None], SCORES)
    counted = _counted_rows(valid, rows, num_tokens)

    grad = tl.zeros_like(score)  # of the scores
    if grad_weights is not None:
        grad += _grad_through_weights(experts, grad_weights, score, rows, inside, scale, smallest_sum, K, E_PADDED, RENORMALIZE)
    if grad_score_sums is not None:
        grad_sums = tl.load(grad_score_sums + columns, mask=real, other=0.0)[None, :]
        grad_share = tl.where(counted[:, None], grad_sums, 0.0)
        if SCORES != "softmax":
            row_sum = (tl.sum(score, axis=1) + smallest_sum)[:, None]
            common = tl.sum(grad_share * score, axis=1)[:, None] / row_sum
            grad_share = (grad_share - common) / row_sum
        grad += grad_share
    if SCORES == "softmax":
        grad = score * (grad - tl.sum(grad * score, axis=1)[:, None])
    elif SCORES == "sigmoid":
        grad = score * (1.0 - score) * grad
    else:
        tail = x < TAIL
        grad *= tl.where(tail, score * 0.5, tl.sigmoid(x) / (2.0 * tl.where(tail, 1.0, score)))
    if grad_z_loss is not None:
        factor = 2.0 * (top + tl.log(total)) * tl.load(grad_z_loss) / tl.load(num_valid)
        grad += tl.where(counted, factor, 0.0)[:, None] * (tl.exp(x - top[:, None]) / total[:, None])
    tl.store(grad_logits + rows[:, None] * E + columns[None, :], grad, mask=inside[:, None] & real[None, :])
