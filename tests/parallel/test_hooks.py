"""What rows are rounded to on their way: how far it moves them, and that doing it again moves them no further."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.hooks import LARGEST, NONE, MessageDtype, from_float8, message_hooks, to_float8


@given(st.integers(0, 5), st.sampled_from([8, 24, 64]), st.integers(0, 99), st.integers(-30, 30))
def test_float8_keeps_four_bits_of_each_number_and_zeros(rows: int, hidden: int, seed: int, power: int) -> None:
    x_SD = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    x_SD[:, ::3] = 0.0
    x_SD[:1] = 0.0
    there = to_float8(x_SD)
    assert there.dtype == torch.uint8 and there.shape == (rows, hidden + 8)
    found = from_float8(there, torch.float32)
    smallest = x_SD.abs().amax(dim=1, keepdim=True) / LARGEST * 2.0**-10  # half of the least step of float8
    assert bool(((found - x_SD).abs() <= x_SD.abs() / 16 + smallest).all()) and bool((found[x_SD == 0] == 0).all())
    torch.testing.assert_close(from_float8(to_float8(found), torch.float32), found, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("wanted", "row_bytes"), [("auto", 4 * 64), ("bfloat16", 2 * 64), ("float8", (72 + 128) / 2)])
def test_rows_come_back_as_they_were_but_for_rounding(wanted: MessageDtype, row_bytes: float) -> None:
    hooks, x_SD = message_hooks(wanted, torch.float32), torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    assert hooks.row_bytes(64, torch.float32) == row_bytes and (hooks == NONE) == (wanted == "auto")
    for before, after in ((hooks.before_dispatch, hooks.after_dispatch), (hooks.before_combine, hooks.after_combine)):
        found = after(before(x_SD))
        assert found.dtype == torch.float32 and found.shape == x_SD.shape
        torch.testing.assert_close(found, x_SD, rtol=1 / 16, atol=1e-2)
        assert torch.equal(after(before(x_SD[2:5])), found[2:5]), "row by row"
