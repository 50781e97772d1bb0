"""The race for tokens: its noise, its distribution, and the kernel against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.race import exponential_noise, race
from kernels.random_bits import random_bits


def numbers(rows: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits_BV, uids_B, positions_B)."""
    generator = torch.Generator().manual_seed(seed)
    logits_BV = 3 * torch.randn(rows, vocabulary, generator=generator)
    return logits_BV, torch.arange(rows) + (seed << 40), torch.randint(0, 5000, (rows,), generator=generator)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 50), (2, 5000), (40, 2049), (0, 7)])
@pytest.mark.parametrize(("seed", "temperature"), [(0, 1.0), (2**40 + 3, 0.6)])
def test_the_kernel_draws_what_the_reference_draws(
    rows: int, vocabulary: int, seed: int, temperature: float, kernel_device: str
) -> None:
    from kernels.triton_race import launch_race

    logits, uids, positions = numbers(rows, vocabulary)
    logits[:, vocabulary // 2 + 1 :: 3] = -torch.inf  # what may not be drawn
    expected = race(logits, uids, positions, seed, temperature)
    on_device = [x.to(kernel_device) for x in (logits, uids, positions)]
    found = launch_race(*on_device, seed, temperature)  # type: ignore[arg-type]
    assert torch.equal(found.cpu(), expected)
    turned = on_device[0].t().contiguous().t()
    assert torch.equal(launch_race(turned, *on_device[1:], seed, temperature).cpu(), expected)  # type: ignore[arg-type]


def test_the_first_of_equal_scores_wins_whatever_the_parts(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import triton_race

    _, uids, positions = (x.to(kernel_device) for x in numbers(4, 1))
    nothing = torch.full((4, 4100), -torch.inf, device=kernel_device)
    assert triton_race.launch_race(nothing, uids, positions, 1, 1.0).tolist() == [0, 0, 0, 0]
    logits = numbers(4, 4100)[0].to(kernel_device)
    whole = triton_race.launch_race(logits, uids, positions, 1, 1.0)
    for programs in (1, 8, 4096):
        monkeypatch.setattr(triton_race, "PROGRAMS", programs)
        assert torch.equal(triton_race.launch_race(logits, uids, positions, 1, 1.0), whole)
    for row in range(4):
        one = slice(row, row + 1)
        assert triton_race.launch_race(logits[one], uids[one], positions[one], 1, 1.0) == whole[row]


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    count = 20000
    tokens = race(logits.expand(count, 4), torch.arange(count), torch.arange(count) % 7, 3, 1.5)
    shares = tokens.bincount(minlength=4) / count
    torch.testing.assert_close(shares, (logits / 1.5).softmax(0), atol=0.015, rtol=0)


def test_noise_is_exponential_and_uncorrelated_between_uids_positions_tokens_and_seeds() -> None:
    uids, positions = torch.arange(64).repeat_interleave(64), torch.arange(64).repeat(64)
    noise = exponential_noise(uids, positions, 0, 32).view(64, 64, 32)
    assert noise.mean().item() == pytest.approx(1, abs=0.02)
    assert noise.var().item() == pytest.approx(1, abs=0.05)
    assert (noise > math.log(2)).double().mean().item() == pytest.approx(0.5, abs=0.01)
    other_seed = exponential_noise(uids, positions, 1, 32).view(64, 64, 32)
    pairs = [(noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1]), (noise, other_seed)]
    for left, right in pairs:
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].item()
        assert abs(correlation) < 0.015


def test_random_bits_equal_the_same_arithmetic_on_plain_integers() -> None:
    def mix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def bits(uid: int, position: int, seed: int, token: int) -> int:
        key = mix64((mix64((mix64(seed) + uid) % 2**64) + position) % 2**64)
        x = (token * 0x9E3779B9 + key) % 2**32
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x ^= key >> 32
        x = (x ^ (x >> 15)) * 0xD35A2D97 % 2**32
        return x ^ (x >> 15)

    uids, positions = torch.tensor([0, 7, 3 << 40]), torch.tensor([0, 5, 31000])
    got = random_bits(uids, positions, 11, 50)
    for row in range(3):
        for token in range(50):
            assert got[row, token].item() % 2**32 == bits(uids[row].item(), positions[row].item(), 11, token)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_as_a_cpu_does_from_a_large_vocabulary() -> None:
    logits, uids, positions = numbers(200, 151_936)
    found = race(logits.cuda(), uids.cuda(), positions.cuda(), 5, 0.9).cpu()
    expected = race(logits, uids, positions, 5, 0.9)
    assert (found != expected).sum() <= 1, "but for a photo finish"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sampling_noise_is_the_same_on_cpu_and_gpu() -> None:
    uids, positions = torch.arange(16) << 33, torch.arange(16)
    assert torch.equal(random_bits(uids, positions, 9, 4096), random_bits(uids.cuda(), positions.cuda(), 9, 4096).cpu())
