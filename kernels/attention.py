"""Causal attention of ragged sequences over keys that lie in one piece or in pages, batch-invariant.

A query walks over the keys of its sequence from the first one, a block at a time, with a running softmax (Milakov &
Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). The blocks count from the sequence's own start, so a query's
result is the same, bit for bit, in a packed training row, in a chunk of a prefix and in a decoding step over a paged cache
(Kwon et al., arXiv 2309.06180); blocks after its position change nothing, not even a bit.

Shape letters: T query tokens, N sequences, H query heads, G key/value heads, d head_dim, P pages, p tokens of a page.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from kernels.limits import require_hopper
from kernels.pullback import pullback
from kernels.ragged import CPU_ROWS, PAGE_TOKENS, Ragged


def put_pages(k_TGd: Tensor, v_TGd: Tensor, places_T: Tensor, keys_PpGd: Tensor, values_PpGd: Tensor) -> None:
    """Writes each token's key and value to its place, page * p + place in the page (int64)."""
    if k_TGd.is_cuda:
        from kernels.triton_attention import launch_put  # here, because CPU machines may lack Triton

        launch_put(k_TGd, v_TGd, places_T, keys_PpGd, values_PpGd)
    else:
        keys_PpGd.flatten(0, 1)[places_T] = k_TGd
        values_PpGd.flatten(0, 1)[places_T] = v_TGd


def attend_pages(q_THd: Tensor, keys_PpGd: Tensor, values_PpGd: Tensor, spans: Ragged) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the pages of `spans.table_NP`, (T, H, d); no gradients."""
    assert spans.table_NP is not None
    if _takes_kernel(q_THd):
        from kernels.triton_attention import launch_attention

        return launch_attention(q_THd, keys_PpGd, values_PpGd, spans)[0]
    return _reference(q_THd, keys_PpGd, values_PpGd, spans)


def attend(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, spans: Ragged) -> Tensor:
    """Causal self-attention within each sequence, (T, H, d); differentiable. `spans` has no table."""
    out_THd: Tensor = _Attend.apply(q_THd, k_TGd, v_TGd, spans)
    return out_THd


def attend_flash(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, first_N: Tensor, longest: int) -> Tensor:
    """The same function as `attend` by the library's FlashAttention, on a GPU in half precision, not batch-invariant.

    `first_N` (int32, N + 1) and `longest` are those of `Ragged`. Called below the library's own varlen_attn, whose face differs
    between its versions and costs the host more than the launch.
    """
    out_THd: Tensor = _AttendFlash.apply(q_THd, k_TGd, v_TGd, first_N, longest)
    return out_THd


class _AttendFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, first_N: Tensor, longest: int) -> Tensor:
        out_THd, log_sum_HT, *random, _ = torch.ops.aten._flash_attention_forward(
            q_THd, k_TGd, v_TGd, first_N, first_N, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, out_THd, log_sum_HT, first_N, *random)
        ctx.longest = longest
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THd: Tensor) -> tuple[Tensor | None, ...]:
        *saved, first_N, seed, offset = ctx.saved_tensors
        found = torch.ops.aten._flash_attention_backward(
            d_out_THd.contiguous(), *saved, first_N, first_N, ctx.longest, ctx.longest, 0.0, True, seed, offset
        )
        return (*found, None, None)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, spans: Ragged) -> Tensor:
        ctx.spans = spans
        if _takes_kernel(q_THd):
            from kernels.triton_attention import launch_attention

            out_THd, log_sum_HT = launch_attention(q_THd, k_TGd, v_TGd, spans)
            ctx.save_for_backward(q_THd, k_TGd, v_TGd, out_THd, log_sum_HT)
            return out_THd
        ctx.save_for_backward(q_THd, k_TGd, v_TGd)
        return _reference(q_THd, *_in_pages(k_TGd, v_TGd, spans))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THd: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_TGd, v_TGd, *saved = ctx.saved_tensors
        spans: Ragged = ctx.spans
        if q_THd.dtype == torch.bfloat16 and q_THd.is_cuda:
            out_THd, log_sum_HT = saved
            first, longest, nothing = spans.first_N, spans.longest, torch.zeros((), dtype=torch.int64, device=q_THd.device)
            found = torch.ops.aten._flash_attention_backward(
                d_out_THd.contiguous(), q_THd, k_TGd, v_TGd, out_THd, log_sum_HT, first, first, longest, longest,
                0.0, True, nothing, nothing,
            )  # fmt: skip
            return (*found, None)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q_THd, k_TGd, v_TGd)]
            out_THd = _plain(leaves[0], leaves[1], leaves[2], spans)
        return (*pullback(out_THd, leaves, d_out_THd), None)


def _takes_kernel(q_THd: Tensor) -> bool:
    if not q_THd.is_cuda or q_THd.dtype == torch.float64:
        return False
    require_hopper(q_THd.device, "the attention's")
    return True


def _plain(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, spans: Ragged) -> Tensor:
    """The same function by the library, sequences filled up to the longest; what the reference's gradient is taken of."""
    counts = spans.length_N.tolist()
    # A query sees only what is before it, so what fills a sequence up, after it, is seen by nobody who is kept.
    q, k, v = (pad_sequence(x.split(counts), batch_first=True).transpose(1, 2) for x in (q_THd, k_TGd, v_TGd))
    out_NLHd = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    return torch.cat([out_LHd[:count] for out_LHd, count in zip(out_NLHd, counts, strict=True)])


def _in_pages(k_TGd: Tensor, v_TGd: Tensor, spans: Ragged) -> tuple[Tensor, Tensor, Ragged]:
    """Keys and values copied into pages, for the reference."""
    size = PAGE_TOKENS["cpu"]
    counts = spans.length_N.tolist()
    pages = [-(-count // size) for count in counts]
    table = torch.zeros(len(counts), max(pages), dtype=torch.int32)
    keys, values = (x.new_zeros(sum(pages), size, *x.shape[1:]) for x in (k_TGd, v_TGd))
    places_T = torch.empty(sum(counts), dtype=torch.int64)
    first_page = first = 0
    for index, (count, number) in enumerate(zip(counts, pages, strict=True)):
        table[index, :number] = torch.arange(first_page, first_page + number)
        places_T[first : first + count] = torch.arange(count) + first_page * size
        first_page, first = first_page + number, first + count
    keys.flatten(0, 1)[places_T], values.flatten(0, 1)[places_T] = k_TGd, v_TGd
    return keys, values, replace(spans, table_NP=table)


def _reference(q_THd: Tensor, keys_PpGd: Tensor, values_PpGd: Tensor, spans: Ragged) -> Tensor:
    """Tiles of CPU_ROWS rows, all tiles side by side, a page at a time: products of one shape always."""
    (tokens, heads, size), (_, page, groups, _) = q_THd.shape, keys_PpGd.shape
    wide = torch.promote_types(q_THd.dtype, torch.float32)
    sequence, first, shared = spans.tile_sequence.long(), spans.tile_first.long(), heads // groups
    counts_N = spans.first_N.diff().long()
    offsets = first[:, None] + torch.arange(spans.tile_queries)  # (tiles, queries), within the sequence
    real = offsets < counts_N[sequence, None]
    token = (spans.first_N[sequence, None] + offsets).clamp(max=tokens - 1).long()
    position = (spans.length_N.long() - counts_N)[sequence, None] + offsets
    rows = spans.tile_queries * shared
    q = q_THd[token].unflatten(2, (groups, shared)).permute(0, 2, 1, 3, 4).reshape(-1, rows, size).to(wide) * size**-0.5
    q = functional.pad(q, (0, 0, 0, CPU_ROWS - rows)) if rows < CPU_ROWS else q
    reach = position.repeat_interleave(shared, dim=1).repeat_interleave(groups, dim=0)  # of the rows (tiles * G, rows)
    reach = functional.pad(reach, (0, max(0, CPU_ROWS - rows)))[..., None]
    top = q.new_full((*q.shape[:2], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    assert spans.table_NP is not None
    for block in range(-(-spans.longest // page)):
        pages = spans.table_NP[sequence, block].long()
        k, v = (x[pages].transpose(1, 2).flatten(0, 1).to(wide) for x in (keys_PpGd, values_PpGd))
        scores = torch.bmm(q, k.transpose(1, 2))
        scores = scores.masked_fill(block * page + torch.arange(page) > reach, -torch.inf)
        new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        weights, old = torch.exp(scores - new_top), torch.exp(top - new_top)
        total = total * old + weights.sum(dim=-1, keepdim=True)
        out = out * old + torch.bmm(weights, v)
        top = new_top
    out = (out / total)[:, :rows].view(-1, groups, spans.tile_queries, shared, size).permute(0, 2, 1, 3, 4)
    result = torch.empty_like(q_THd)
    result[token[real]] = out.reshape(*real.shape, heads, size)[real].to(q_THd.dtype)
    return result
