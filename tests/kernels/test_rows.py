"""Rows of tokens to places and back: the references by definition, the kernels against the references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import rows
from kernels.errors import UserError
from kernels.expert_order import expert_order

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def case(tokens: int, top_k: int, hidden: int, absent: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x_TD, y_ND, place_N, weights_TK, partials_PN); if `absent`, without some of the entries, whose weights are NaN."""
    generator = torch.Generator().manual_seed(tokens + hidden)
    experts_TK = torch.randint(-1 if absent else 0, 5, (tokens, top_k), generator=generator)
    entries = int((experts_TK >= 0).sum())
    order = expert_order(experts_TK, 5, num_entries=entries)
    x_TD, y_ND = torch.randn(tokens, hidden, generator=generator), torch.randn(entries, hidden, generator=generator)
    weights_TK, partials_PN = torch.rand(tokens, top_k, generator=generator), torch.randn(3, entries, generator=generator)
    weights_TK = weights_TK.masked_fill(experts_TK < 0, float("nan"))
    return x_TD, y_ND, order.place_N, weights_TK, partials_PN


def spread(x_TD: Tensor, place_N: Tensor, top_k: int) -> Tensor:
    out_ND = x_TD.new_full((int((place_N >= 0).sum()), x_TD.shape[1]), float("nan"))
    rows.spread_rows(x_TD, place_N, top_k, out_ND)
    return out_ND


@pytest.mark.parametrize("absent", [False, True])
def test_rows_go_to_their_places_and_come_back_weighted(absent: bool) -> None:
    x_TD, y_ND, place_N, weights_TK, partials_PN = case(7, 3, 8, absent)
    out_ND = spread(x_TD, place_N, 3)
    out_TD, sums_TK = rows.combine_rows_and_partials(y_ND, place_N, 3, partials_PN)
    weighted_TD = rows.combine_rows(y_ND, place_N, 3, weights_TK=weights_TK)
    for t in range(7):
        here_K = place_N[3 * t : 3 * t + 3] >= 0
        at_K = place_N[3 * t : 3 * t + 3][here_K]
        assert all(torch.equal(out_ND[at], x_TD[t]) for at in at_K)
        torch.testing.assert_close(out_TD[t], y_ND[at_K].sum(dim=0))
        torch.testing.assert_close(weighted_TD[t], (weights_TK[t, here_K, None] * y_ND[at_K]).sum(dim=0))
        torch.testing.assert_close(sums_TK[t, here_K], partials_PN[:, at_K].sum(dim=0))
        assert not sums_TK[t, ~here_K].any()


def test_the_sum_of_half_precision_rows_is_rounded_once() -> None:
    y_ND = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16).expand(3, 8)
    assert rows.combine_rows(y_ND.contiguous(), torch.arange(3), 3).tolist() == [[258.0] * 8]


def test_rows_that_do_not_fit_16_bytes_are_refused() -> None:
    with pytest.raises(UserError, match=r"rows of 12 numbers.*multiple of 8"):
        rows.combine_rows(torch.zeros(2, 12), torch.arange(2), 1)


@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(0, 2, 8), (1, 1, 8), (9, 3, 24), (5, 2, 2056)])
@pytest.mark.parametrize(("stride", "absent"), [(0, False), (8, False), (3, False), (8, True)])
def test_kernels_equal_the_references(
    tokens: int, top_k: int, hidden: int, stride: int, absent: bool, kernel_device: str
) -> None:
    """`stride`: by how much rows lie further apart than they have numbers."""
    from kernels.triton_rows import launch_combine, launch_spread

    x_TD, y_ND, place_N, weights_TK, partials_PN = case(tokens, top_k, hidden, absent)
    out_TD = torch.full((tokens, hidden), float("nan"), device=kernel_device)
    sums_TK = torch.full((tokens, top_k), float("nan"), device=kernel_device)

    def placed(matrix: Tensor) -> Tensor:
        wide = torch.full((matrix.shape[0], hidden + stride), float("nan"), device=kernel_device)
        wide[:, :hidden] = matrix.to(kernel_device)
        return wide[:, :hidden]

    place, y = place_N.to(kernel_device), placed(y_ND)
    out_ND = placed(torch.zeros_like(y_ND))
    launch_spread(placed(x_TD), place, top_k, out_ND)
    assert torch.equal(out_ND.cpu(), spread(x_TD, place_N, top_k))
    launch_combine(y, place, top_k, weights_TK.to(kernel_device), None, out_TD, None)
    torch.testing.assert_close(out_TD.cpu(), rows.combine_rows(y_ND, place_N, top_k, weights_TK=weights_TK))
    launch_combine(y, place, top_k, None, partials_PN.to(kernel_device), out_TD, sums_TK)
    expected = rows.combine_rows_and_partials(y_ND, place_N, top_k, partials_PN)
    for ours, theirs in zip((out_TD, sums_TK), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize("present", [0, 2])
def test_tokens_without_entries_get_zeros(present: int, kernel_device: str) -> None:
    """Only the last `present` of 4 tokens have entries; with none, there are no rows either."""
    from kernels.triton_rows import launch_combine, launch_spread

    place_N = torch.full((4, 3), -1, dtype=torch.int32)
    place_N[4 - present :, 1] = torch.arange(present, dtype=torch.int32)
    x_TD, weights_TK, partials_PN = torch.randn(4, 16), torch.full((4, 3), torch.nan), torch.randn(2, present)
    weights_TK[place_N >= 0] = 2.0
    out_ND, place = torch.empty(present, 16, device=kernel_device), place_N.flatten().to(kernel_device)
    launch_spread(x_TD.to(kernel_device), place, 3, out_ND)
    out_TD, sums_TK = torch.full((4, 16), torch.nan, device=kernel_device), torch.full((4, 3), torch.nan, device=kernel_device)
    launch_combine(out_ND, place, 3, weights_TK.to(kernel_device), None, out_TD, None)
    expected_TD = 2.0 * x_TD
    expected_TD[: 4 - present] = 0.0
    assert torch.equal(out_TD.cpu(), expected_TD)
    assert torch.equal(rows.combine_rows(out_ND.cpu(), place_N.flatten(), 3, weights_TK=weights_TK), expected_TD)
    launch_combine(out_ND, place, 3, None, partials_PN.to(kernel_device), out_TD, sums_TK)
    expected = rows.combine_rows_and_partials(out_ND.cpu(), place_N.flatten(), 3, partials_PN)
    for ours, theirs in zip((out_TD, sums_TK), expected, strict=True):
        assert torch.equal(ours.cpu(), theirs) and not theirs[: 4 - present].any()


@gpu
@needs_gpu
@pytest.mark.parametrize("hidden", [64, 2048, 7168, 8 * 33])
@pytest.mark.parametrize("absent", [False, True])
def test_bfloat16_on_a_gpu(hidden: int, absent: bool) -> None:
    x_TD, y_ND, place_N, weights_TK, partials_PN = case(500, 8, hidden, absent)
    x_TD, y_ND = x_TD.bfloat16(), y_ND.bfloat16()
    assert torch.equal(spread(x_TD.cuda(), place_N.cuda(), 8).cpu(), spread(x_TD, place_N, 8))
    out_TD = rows.combine_rows(y_ND.cuda(), place_N.cuda(), 8, weights_TK=weights_TK.cuda())
    # A fused multiply-add may move a sum across the edge of a rounding: one unit of bfloat16's last place.
    torch.testing.assert_close(out_TD.cpu(), rows.combine_rows(y_ND, place_N, 8, weights_TK=weights_TK), rtol=2**-7, atol=1e-6)
    sum_TD, sums_TK = rows.combine_rows_and_partials(y_ND.cuda(), place_N.cuda(), 8, partials_PN.cuda())
    assert torch.equal(sum_TD.cpu(), rows.combine_rows(y_ND, place_N, 8))
    torch.testing.assert_close(sums_TK.cpu(), rows.combine_rows_and_partials(y_ND, place_N, 8, partials_PN)[1])


@gpu
@needs_gpu
def test_offsets_beyond_32_bits() -> None:
    tokens, hidden = 2**15, 2**16 + 8  # N * D > 2^31 numbers, 4.3 GB
    x_TD = torch.arange(tokens, device="cuda", dtype=torch.float32).bfloat16()[:, None].expand(tokens, hidden).contiguous()
    place_N = torch.arange(tokens, device="cuda", dtype=torch.int32).flip(0)
    out_ND = torch.empty_like(x_TD)
    rows.spread_rows(x_TD, place_N, 1, out_ND)
    assert torch.equal(out_ND[:, -1], x_TD[:, -1].flip(0))
    assert torch.equal(rows.combine_rows(out_ND, place_N, 1)[:, -1], x_TD[:, -1])


@gpu
@needs_gpu
def test_a_gpu_replays_in_a_graph() -> None:
    x_TD, y_ND, place_N, weights_TK, _ = (tensor.cuda() for tensor in case(300, 4, 64))
    out_ND = torch.empty_like(y_ND)

    def both() -> Tensor:
        rows.spread_rows(x_TD, place_N, 4, out_ND)
        return rows.combine_rows(out_ND, place_N, 4, weights_TK=weights_TK)

    both()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = both()
    x_TD.mul_(-3.0)
    graph.replay()
    torch.testing.assert_close(out_TD, x_TD * weights_TK.sum(dim=1, keepdim=True))


def test_tokens_that_32_bits_cannot_count_are_refused() -> None:
    assert rows.Tokens.of(torch.empty(2**20 - 1, 2048, device="meta"), 8).rows_TD.shape == (2**20 - 1, 2048)
    with pytest.raises(
        UserError, match=r"1048576 tokens of 2048 numbers each are more .*; give at most 1048575 tokens at once"
    ):
        rows.Tokens.of(torch.empty(2**20, 2048, device="meta"), 8)
    with pytest.raises(UserError, match="65536 tokens of 32768 numbers each"):
        rows.Tokens.of(torch.empty(2**16, 2**15, device="meta")[:, :64], 2)


def test_rows_that_copies_of_16_bytes_cannot_load_are_copied() -> None:
    wide = torch.arange(40 * 64.0, dtype=torch.bfloat16).view(40, 64)
    for view, stays in (
        (wide, True),
        (wide[3:, 16:48], True),
        (wide[:, 4:36], False),
        (wide[:32].t(), False),
        (wide[:1].expand(9, 64), True),
    ):
        found = rows.Tokens.of(view, 2).rows_TD
        assert torch.equal(found, view) and (found.data_ptr() == view.data_ptr()) == stays
        assert found.stride(1) == 1 and found.stride(0) % 16 == 0 and found.data_ptr() % 16 == 0
